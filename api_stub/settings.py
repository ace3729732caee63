"""The producer side's settings: one frozen object, read from the environment once and passed down.

`ClientSettings` is what every producer reads, `GatewaySettings` what the HTTP gateway reads beside it.

S3 credentials are not here: boto3 finds them itself (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, a profile, a role).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import SettingsConfigDict

from api_stub.contract.names import is_model_name
from api_stub.errors import InvalidSettings
from api_stub.ledger.settings import (
    LedgerConfig,
    LedgerSettings,
    S3Settings,
    ServiceSettings,
    TrainingSettings,
    check_http_url,
    explain_settings,
    variable_of,
)

T = TypeVar("T")


class ClientSettings(S3Settings, LedgerSettings):
    """Everything a producer can be configured from outside. Durations are seconds."""

    model_config = SettingsConfigDict(hide_input_in_errors=True)

    api_url: str | None = Field(
        default=None, description="Gateway that clients speak to over HTTP where VISIONQ_REDIS_URL is not set"
    )
    api_key: SecretStr = Field(default=SecretStr(""), description="API key that clients send to the gateway")
    s3_public_url: str | None = Field(
        default=None, description="S3 endpoint that presigned URLs name; empty: the S3 endpoint itself"
    )
    max_queued: int = Field(
        default=0, ge=0, description="Queued and running jobs per model that a submit admits; 0: no limit"
    )

    @field_validator("s3_public_url", "api_url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        return check_http_url(value)

    @classmethod
    def load(cls, redis_url: str | None = None) -> Self:
        """Read the environment; `redis_url` wins over it. Raises InvalidSettings that names the variable."""
        try:
            return cls() if redis_url is None else cls(redis_url=SecretStr(redis_url))
        except ValidationError as error:
            raise InvalidSettings(explain_settings(cls, error)) from error

    @property
    def ledger(self) -> LedgerConfig:
        """The ledger's share of the settings."""
        return replace(super().ledger, max_queued=self.max_queued)


class GatewaySettings(ServiceSettings, TrainingSettings, ClientSettings):
    """What the HTTP gateway can be configured from outside. Durations are seconds, sizes bytes."""

    api_host: str = Field(default="127.0.0.1", description="Address the gateway listens on; without keys loopback only")
    api_port: int = Field(default=8000, ge=0, le=65_535, description="Port of the gateway")
    api_keys: SecretStr = Field(
        default=SecretStr(""), description="API keys, hashed: lines or `;`-separated entries of `visionq api --new-key`"
    )
    api_keys_file: Path | None = Field(default=None, description="File with more API keys, one entry per line")
    api_rate_per_minute: int = Field(
        default=0, ge=0, description="Requests per minute and key, unless its entry says `rate=`; 0: no limit"
    )
    api_max_in_flight: int = Field(
        default=0, ge=0, description="Unfinished jobs per key, unless its entry says `in_flight=`; 0: no limit"
    )
    api_max_body_bytes: int = Field(
        default=32 * 1024 * 1024,
        ge=1024,
        description="Largest JSON body, media inside it included; largest sum of a request's http(s) media",
    )
    api_max_upload_bytes: int = Field(
        default=256 * 1024 * 1024, ge=1024, description="Largest upload, presigned or as a form"
    )
    api_max_bodies_bytes: int = Field(
        default=256 * 1024 * 1024, ge=1024, description="JSON bodies that all requests hold together; above it 503"
    )
    api_body_s: float = Field(default=120.0, gt=0, description="Time in which a request's body has to arrive")
    api_max_wait_s: float = Field(
        default=50.0,
        ge=0,
        le=50.0,
        description="Longest `wait` that a request may ask for; proxies give up a silent answer after 60 s",
    )
    api_trusted_proxies: str = Field(
        default="127.0.0.1,::1",
        description="Proxies whose `X-Forwarded-Proto`, `-Host` and `-Prefix` are believed: addresses or networks,"
        " comma-separated; `*`: whoever connects; empty: none",
    )
    api_keep_alive_s: int = Field(
        default=75,
        ge=1,
        description="Time that an idle connection is kept; longer than a proxy keeps it, or it loses requests",
    )
    api_keep_abandoned_s: float = Field(
        default=15.0,
        ge=0,
        le=600,
        description="Time that a completion whose client left is kept for the same request again; 0: cancelled at once",
    )
    api_heartbeat_s: float = Field(default=15.0, gt=0, description="Silence after which an event stream says it lives")
    api_cors_origins: str = Field(default="", description="Origins whose pages may call, comma-separated; empty: none")
    api_stop_s: float = Field(default=10.0, gt=0, description="Time that open requests get when the gateway stops")
    api_models: str = Field(
        default="",
        description="Model names that are known although no worker serves them or did in the last day,"
        " comma-separated; needed where workers scale to zero",
    )
    api_no_worker_s: float = Field(
        default=30.0,
        gt=0,
        description="Time in which a worker has to appear for a completion whose model nobody serves; then 503",
    )
    api_batch_in_flight: int = Field(
        default=128, ge=1, le=10_000, description="Jobs of one batch that are submitted and not answered"
    )
    api_media_hosts: str = Field(
        default="",
        description="Hosts that chat completions fetch media from, comma-separated: `host`, `*.host` (all below it),"
        " `host:port`; https, plain http only for `http://host`; empty: none",
    )
    api_media_networks: str = Field(
        default="", description="Networks that media are fetched from although they are not public, e.g. `10.1.0.0/16`"
    )
    api_media_s: float = Field(
        default=20.0, gt=0, le=600, description="Time in which all http(s) media of a request have to arrive"
    )
    webhook_secret: SecretStr = Field(
        default=SecretStr(""),
        description="Signs webhooks of keys without a secret of their own: `whsec_…`; two while one is changed",
    )
    webhook_allow_http: bool = Field(default=False, description="Send webhooks to http:// addresses, too")
    webhook_ports: str = Field(default="443,8443", description="Ports that webhooks may go to; `*`: all")
    webhook_allow_networks: str = Field(
        default="", description="Networks that webhooks may go to although they are not public, e.g. `10.1.0.0/16`"
    )
    webhook_timeout_s: float = Field(default=15.0, gt=0, le=120, description="Time for one try of a webhook")
    webhook_delays_s: str = Field(
        default="5,300,1800,7200,18000,36000,50400,72000,86400",
        description="Pauses between the tries of a webhook; after the last try it is given up",
    )

    @property
    def cors_origins(self) -> tuple[str, ...]:
        """The origins as a list."""
        return tuple(origin.strip().rstrip("/") for origin in self.api_cors_origins.split(",") if origin.strip())

    @field_validator("api_models")
    @classmethod
    def _are_model_names(cls, value: str) -> str:
        for name in value.split(","):
            if name.strip() and not is_model_name(name.strip()):
                raise ValueError(f"not a model name: {name.strip()!r}")
        return value

    @property
    def known_models(self) -> tuple[str, ...]:
        """The models that exist without a worker."""
        return tuple(name.strip() for name in self.api_models.split(",") if name.strip())


def parsed(field: str, text: str, parse: Callable[[str], T]) -> T:
    """Read the text of a field of GatewaySettings. Raises InvalidSettings that names the variable."""
    try:
        return parse(text)
    except ValueError as error:
        raise InvalidSettings(f"{variable_of(GatewaySettings, field)}: {error}") from error
