"""The settings that producers, gateways and workers share: Redis and the ledger, S3, and what every service has.

`api_stub.settings` and `worker.settings` inherit the fields, so a name has one default, one bound and one text. A URL
may hold a password: no message repeats it. Timeouts and certificates are given as redis-py's keyword arguments and as
kombu's transport options; certificates are verified unless the URL says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypedDict
from urllib.parse import parse_qs, urlsplit

import redis
import redis.asyncio.retry
from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.backoff import NoBackoff
from redis.retry import Retry

from api_stub.contract import names
from api_stub.contract.finetune import s3_prefix

ENV_PREFIX: Final = "VISIONQ_"
_WAY: Final = "give one address that always leads to the master, a name that moves or a TCP proxy"
_SET_IN_THE_URL: Final = ("password", "username", "db")

#: What workers and gateways should agree on: each treats a job by its own values.
SHARED_SETTINGS: Final = (
    "max_attempts",
    "tenant_max_running",
    "grace_s",
    "ageing_s",
    "result_ttl_s",
    "events_ttl_s",
    "unserved_ttl_s",
)
#: A pooled connection that was idle this long is pinged before use, so that a silently cut one is replaced.
HEALTH_CHECK_S: Final = 10
_STALE: Final = (redis.ConnectionError,)  # a pooled connection may have died unnoticed


def check_redis_url(url: str) -> None:
    """Raise ValueError when `url` names no Redis, or says in its query what belongs before it."""
    _refuse_several(url)
    try:
        parts = urlsplit(url)
        is_redis = parts.scheme in {"redis", "rediss"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_redis = False
    # A '#' or '/' in a password cuts the host off: what follows would be printed as the path.
    if not is_redis or "@" in parts.path + parts.query + parts.fragment:
        raise ValueError("must be redis://[user:password@]host[:port][/db] or rediss://…")
    for name in _SET_IN_THE_URL:
        if name in parse_qs(parts.query, keep_blank_values=True):
            raise ValueError(f"{name}= does not belong into the query: redis://[user:password@]host[:port][/db]")


def _refuse_several(url: str) -> None:
    """Name what libraries take elsewhere, and the way that works here."""
    scheme, _, rest = url.partition("://")
    if "sentinel" in scheme.lower():
        raise ValueError(f"Redis Sentinel is not supported: {_WAY}")
    hosts = rest.partition("/")[0].rpartition("@")[2]
    if "," in hosts or ";" in hosts or "://" in rest:
        raise ValueError(f"several addresses are not supported: {_WAY}")


def redis_address(url: str) -> str:
    """Return `host:port` of a checked URL, for messages."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}"


@dataclass(frozen=True, slots=True)
class LedgerConfig:
    """Durations in seconds of Redis' clock.

    lease_s: silence after which a claimed job counts as lost; the same for every process on one Redis. Time in which
        nobody reached Redis does not count: after such a gap a dead worker's job may be taken one lease later. A worker
        that starts when all others are dead sees such a gap, too.
    grace_s: time after which a queued job is checked for a lost doorbell.
    max_attempts: lost leases after which a job is given up (`poison_job`); of training, since its last checkpoint.
    tenant_max_running: jobs of one tenant and model that run or are about to; 0 means no limit. The workers' own
        setting decides.
    ageing_s: time in the queue after which a job of a lower priority is served among those of priority 0.
    window: doorbells of one priority list that are out at a time; more when there are many workers.
    unserved_ttl_s: time after which a queued job ends when no worker of its model has been there.
    max_queued: queued and in-progress jobs per model that submit admits; 0 means no limit.
    """

    lease_s: float = 15.0
    grace_s: float = 15.0
    max_attempts: int = 3
    max_queued: int = 0
    tenant_max_running: int = 0
    ageing_s: float = 60.0
    window: int = 8
    result_ttl_s: int = 86_400
    events_ttl_s: int = 3_600
    unserved_ttl_s: int = 86_400


class _Environment(BaseSettings):
    """How every settings object reads the environment."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="ignore", env_ignore_empty=True, populate_by_name=True
    )


class LedgerSettings(_Environment):
    """Where Redis is, and how the ledger treats jobs. Durations are seconds."""

    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"), description="Redis that holds queue, ledger, events and results"
    )
    lease_s: float = Field(default=15.0, gt=0, description="A job whose worker is silent this long goes to another")
    grace_s: float = Field(default=15.0, gt=0, description="Time before a queued job is checked for a lost doorbell")
    max_attempts: int = Field(
        default=3, ge=1, le=100, description="Lost workers a job survives before it is a poison job"
    )
    tenant_max_running: int = Field(
        default=0, ge=0, description="Jobs of one tenant and model that run at a time; 0: no limit"
    )
    ageing_s: float = Field(
        default=60.0, gt=0, description="Time in the queue after which a job is served among those of priority 0"
    )
    result_ttl_s: int = Field(default=86_400, ge=1, description="Time a result is kept")
    events_ttl_s: int = Field(default=3_600, ge=1, description="Time an event stream is kept after its job is final")
    unserved_ttl_s: int = Field(
        default=86_400, ge=1, description="Time after which a queued job expires when no worker has served its model"
    )

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: SecretStr) -> SecretStr:
        check_redis_url(value.get_secret_value())
        return value

    @property
    def ledger(self) -> LedgerConfig:
        """The ledger's share of the settings."""
        return LedgerConfig(
            lease_s=self.lease_s,
            grace_s=self.grace_s,
            max_attempts=self.max_attempts,
            tenant_max_running=self.tenant_max_running,
            ageing_s=self.ageing_s,
            result_ttl_s=self.result_ttl_s,
            events_ttl_s=self.events_ttl_s,
            unserved_ttl_s=self.unserved_ttl_s,
        )


class S3Settings(_Environment):
    """Where media are. Credentials are not here: boto3 finds them itself."""

    media_bucket: str = Field(
        default="media", min_length=3, max_length=63, description="Bucket that clients and gateways upload to"
    )
    s3_endpoint_url: str | None = Field(
        default=None,
        validation_alias=AliasChoices("s3_endpoint_url", "AWS_ENDPOINT_URL_S3"),
        description="S3 endpoint; empty: AWS",
    )
    s3_region: str = Field(
        default="us-east-1", validation_alias=AliasChoices("s3_region", "AWS_REGION"), description="S3 region"
    )

    @field_validator("s3_endpoint_url")
    @classmethod
    def _is_endpoint(cls, value: str | None) -> str | None:
        return check_http_url(value)


class TrainingSettings(S3Settings):
    """Where fine-tuning keeps checkpoints, for those who let jobs in and for those who run them."""

    training_prefix: str = Field(
        default="",
        description="`s3://bucket/prefix/` for checkpoints of fine-tuning: over HTTP a key writes below its own name"
        " there, and bases are read from there; empty: `training/` in the media bucket",
    )

    @field_validator("training_prefix")
    @classmethod
    def _is_prefix(cls, value: str) -> str:
        return s3_prefix(value) if value else value

    @property
    def training_root(self) -> str:
        """The prefix, which ends with a slash."""
        return self.training_prefix or f"s3://{self.media_bucket}/training/"


class ServiceSettings(_Environment):
    """What a process that serves has, a gateway or a worker."""

    sweep_s: float = Field(default=1.0, gt=0, description="Time between two looks of the reaper")
    log_level: str = Field(
        default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Least level that is logged"
    )


def variable_of(settings: type[BaseSettings], field: str) -> str:
    """Return the environment variable that sets a field."""
    alias = settings.model_fields[field].validation_alias
    return str(alias.choices[-1]) if isinstance(alias, AliasChoices) else f"{ENV_PREFIX}{field.upper()}"


def explain_settings(settings: type[BaseSettings], error: ValidationError) -> str:
    """Return one clause per bad value, after its variable: what is wrong, and the value unless it may be secret."""
    fields = settings.model_fields
    problems = []
    for problem in error.errors(include_url=False):
        place = str(problem["loc"][0]) if problem["loc"] else ""
        variable = variable_of(settings, place) if place in fields else place
        is_ours = problem["type"] == "value_error"
        reason = str(problem["ctx"]["error"]) if is_ours else f"{problem['msg']} (got {problem['input']!r})"
        problems.append(f"{variable}: {reason}")
    return "; ".join(problems)


def check_http_url(value: str | None) -> str | None:
    """Return a URL that is absent or http(s). Raises ValueError."""
    if value is not None and urlsplit(value).scheme not in {"http", "https"}:
        raise ValueError("must be an http:// or https:// URL")
    return value


class SocketOptions(TypedDict):
    """A call costs at most about `socket_connect_timeout` plus `socket_timeout` seconds."""

    socket_timeout: float
    socket_connect_timeout: float
    socket_keepalive: bool


class QueueOptions(SocketOptions):
    """The names of a queue's lists in Redis; all Celery programs on one queue must agree on them."""

    priority_steps: list[int]
    sep: str


def socket_options(timeout_s: float, connect_s: float | None = None) -> SocketOptions:
    """Return the bounds of a connection; `connect_s` of None is the same."""
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s if connect_s is None else connect_s,
        "socket_keepalive": True,
    }


def queue_options(timeout_s: float, connect_s: float | None = None) -> QueueOptions:
    """Return kombu's transport options that producers and workers share."""
    return {
        **socket_options(timeout_s, connect_s),
        "priority_steps": list(names.PRIORITY_STEPS),
        "sep": names.PRIORITY_SEPARATOR,
    }


def retry(times: int) -> Retry:
    """Return how often a client tries again over a new connection, at once."""
    return Retry(NoBackoff(), times, _STALE)


def async_retry(times: int) -> redis.asyncio.retry.Retry:
    """`retry` for asyncio."""
    return redis.asyncio.retry.Retry(NoBackoff(), times, _STALE)


def tls_options(url: str) -> dict[str, str] | None:
    """Return what Celery must be told beside a rediss:// URL, None for redis://. What the URL's query says wins.

    Left alone, kombu speaks plain text to a rediss:// URL without ssl_ options, and the result backend refuses it.
    """
    return {"ssl_cert_reqs": "required"} if urlsplit(url).scheme == "rediss" else None
