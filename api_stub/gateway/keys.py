"""API keys: who may call, as whom, and how much. Only hashes are kept; a key's name is its tenant.

An entry is `NAME:SHA256`, then options: `rate=` (requests per minute), `in_flight=` (unfinished jobs), `models=` and
`buckets=` (comma-separated; what the key may use), `train=1` (may hand in fine-tuning), `role=operator` (may run the
queues and sees those of all tenants), `webhook_secret=` (`whsec_…`, two while one is changed). Keys are long random
strings, so a plain hash is enough.
`Limits` counts requests per minute and unfinished jobs in Redis, for all replicas.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets as random_secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Final

import redis.asyncio

from api_stub.contract import names
from api_stub.contract.names import is_requested_model, queue_model
from api_stub.contract.status import JobStatus
from api_stub.errors import InvalidSettings
from api_stub.gateway.problems import too_many
from api_stub.gateway.signature import Secret, parse_secrets
from api_stub.settings import GatewaySettings

PREFIX: Final = "vq_"
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_ENTRY: Final = re.compile(rf"(?P<name>{_NAME}):(?P<digest>[0-9a-fA-F]{{64}})")
_OPTIONS: Final = frozenset({"rate", "in_flight", "models", "buckets", "role", "train", "webhook_secret"})
OPERATOR: Final = "operator"

#: When a caller with too many unfinished jobs should ask again.
IN_FLIGHT_RETRY_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. Without keys there is one caller, without a name, who may do everything on this machine.

    `rate_per_minute` and `max_in_flight`: 0 means no limit. `models`, `buckets`: None means all. `role`: empty or
    OPERATOR. `has_training`: the key's entry says `train=1`.
    """

    tenant: str = ""
    is_anonymous: bool = True
    rate_per_minute: int = 0
    max_in_flight: int = 0
    models: frozenset[str] | None = None
    buckets: frozenset[str] | None = None
    role: str = ""
    has_training: bool = False

    @property
    def may_train(self) -> bool:
        """True for a key with `train=1`, and for everybody where there are no keys."""
        return self.is_anonymous or self.has_training

    @property
    def is_operator(self) -> bool:
        """True for a key with `role=operator`, and for everybody where there are no keys."""
        return self.is_anonymous or self.role == OPERATOR

    def may_use(self, model: str) -> bool:
        """Tell whether the key's list of models, if it has one, names this one: `NAME` stands for its adapters, too."""
        return self.models is None or bool({model, queue_model(model)} & self.models)

    def may_see(self, model: str) -> bool:
        """Tell whether the key may use the model or one of its adapters."""
        return self.models is None or model in map(queue_model, self.models)

    def sees(self, tenant: str) -> bool:
        """Tell whether a job of `tenant` exists for this caller."""
        return self.is_anonymous or tenant == self.tenant


ANYBODY: Final = Caller()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One entry."""

    digest: str = field(repr=False)
    caller: Caller
    webhook_secrets: tuple[Secret, ...] = ()


class KeyRing:
    """All keys. Empty: everybody on this machine may call."""

    def __init__(self, keys: Iterable[ApiKey] = (), webhook_secrets: tuple[Secret, ...] = ()) -> None:
        self._keys = tuple(keys)
        self._webhook_secrets = webhook_secrets

    def __len__(self) -> int:
        return len(self._keys)

    def caller(self, key: str) -> Caller | None:
        """Return whose key this is. Every entry is compared, each in constant time."""
        digest = digest_of(key)
        found = None
        for entry in self._keys:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.caller
        return found

    def webhook_secrets(self, tenant: str) -> tuple[Secret, ...]:
        """Return what signs a tenant's webhooks: its keys' own secrets, else the gateway's."""
        own = (secret for key in self._keys if key.caller.tenant == tenant for secret in key.webhook_secrets)
        return tuple(dict.fromkeys(own)) or self._webhook_secrets

    @property
    def can_sign(self) -> bool:
        """True when there is any secret for webhooks."""
        return bool(self._webhook_secrets) or any(key.webhook_secrets for key in self._keys)

    @classmethod
    def load(cls, settings: GatewaySettings) -> KeyRing:
        """Read the keys of the environment and of the file. Raises InvalidSettings that repeats no hash."""
        entries = _parse("VISIONQ_API_KEYS", settings.api_keys.get_secret_value(), settings)
        if settings.api_keys_file is not None:
            try:
                text = settings.api_keys_file.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidSettings(f"VISIONQ_API_KEYS_FILE: cannot be read: {type(error).__name__}") from error
            entries += _parse("VISIONQ_API_KEYS_FILE", text, settings)
        names = {entry.digest: entry.caller.tenant for entry in entries}
        for entry in entries:
            if names[entry.digest] != entry.caller.tenant:
                raise InvalidSettings(
                    f"VISIONQ_API_KEYS: one key has two names, {entry.caller.tenant!r} and {names[entry.digest]!r}"
                )
        try:
            secrets = parse_secrets(settings.webhook_secret.get_secret_value())
        except ValueError as error:
            raise InvalidSettings(f"VISIONQ_WEBHOOK_SECRET: {error}") from error
        return cls(entries, secrets)


def new_key() -> str:
    """Return a key that nobody else has."""
    return PREFIX + random_secrets.token_urlsafe(32)


def is_key_name(name: str) -> bool:
    """Tell whether a key, and with it a tenant, may have this name."""
    return re.fullmatch(_NAME, name) is not None


def digest_of(key: str) -> str:
    """Return what an entry keeps of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_host(settings: GatewaySettings, keys: KeyRing) -> None:
    """Raise InvalidSettings when others than this machine could call without a key."""
    if not keys and not is_loopback(settings.api_host):
        raise InvalidSettings(
            f"VISIONQ_API_HOST: {settings.api_host!r} is open to other machines, and there are no keys; "
            "set VISIONQ_API_KEYS (`visionq api --new-key NAME` makes an entry) or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _parse(variable: str, text: str, settings: GatewaySettings) -> list[ApiKey]:
    lines = [line.partition("#")[0].strip() for line in re.split(r"[;\n]", text)]
    return [_entry(variable, number, line, settings) for number, line in enumerate(filter(None, lines), start=1)]


def _entry(variable: str, number: int, line: str, settings: GatewaySettings) -> ApiKey:
    head, *rest = line.split()
    match = _ENTRY.fullmatch(head)
    if match is None:
        raise InvalidSettings(f"{variable}: entry {number} is not NAME:SHA256 (64 hexadecimal digits)")
    name = match["name"]
    options = dict(_option(variable, name, word) for word in rest)
    models, buckets = _names(options.get("models")), _names(options.get("buckets"))
    for model in models or ():
        if not is_requested_model(model):
            raise InvalidSettings(f"{variable}: key {name!r}: not a model name: {model!r}")
    caller = Caller(
        tenant=name,
        is_anonymous=False,
        rate_per_minute=_number(variable, name, options, "rate", settings.api_rate_per_minute),
        max_in_flight=_number(variable, name, options, "in_flight", settings.api_max_in_flight),
        models=models,
        buckets=buckets,
        role=_role(variable, name, options.get("role", "")),
        has_training=_is_one(variable, name, options.get("train")),
    )
    try:
        webhook_secrets = parse_secrets(options.get("webhook_secret", ""))
    except ValueError as error:
        raise InvalidSettings(f"{variable}: key {name!r}: webhook_secret: {error}") from error
    return ApiKey(match["digest"].lower(), caller, webhook_secrets)


def _option(variable: str, name: str, word: str) -> tuple[str, str]:
    option, equals, value = word.partition("=")
    if option not in _OPTIONS or not equals or not value:
        raise InvalidSettings(f"{variable}: key {name!r}: {option!r} is none of {', '.join(sorted(_OPTIONS))}")
    return option, value


def _role(variable: str, name: str, role: str) -> str:
    if role not in ("", OPERATOR):
        raise InvalidSettings(f"{variable}: key {name!r}: role={role} is unknown, the only role is {OPERATOR}")
    return role


def _is_one(variable: str, name: str, value: str | None) -> bool:
    if value not in (None, "1"):
        raise InvalidSettings(f"{variable}: key {name!r}: train={value} is unknown, the only value is 1")
    return value == "1"


def _names(value: str | None) -> frozenset[str] | None:
    return None if value is None else frozenset(filter(None, value.split(",")))


def _number(variable: str, name: str, options: dict[str, str], option: str, default: int) -> int:
    value = options.get(option)
    if value is None:
        return default
    if not value.isdecimal():
        raise InvalidSettings(f"{variable}: key {name!r}: {option} is not a number: {value!r}")
    return int(value)


_FINAL: Final = tuple(status.value for status in JobStatus if status.is_final)


class Limits:
    """Safe to share between tasks of one loop. Raises redis.RedisError when Redis is away: nobody passes uncounted."""

    def __init__(self, commands: redis.asyncio.Redis) -> None:
        self._rate = commands.register_script(_script("rate"))
        self._in_flight = commands.register_script(_script("in_flight"))
        self._commands = commands

    async def count_request(self, caller: Caller) -> None:
        """Count one request. Raises Problem (429) above the caller's rate."""
        if caller.rate_per_minute <= 0:
            return
        wait_ms = int(await self._rate(keys=[_key("rate", caller)], args=[caller.rate_per_minute]))
        if wait_ms > 0:
            raise too_many("rate_limited", f"more than {caller.rate_per_minute} requests in a minute", wait_ms / 1000)

    async def reserve(self, caller: Caller, job_id: str) -> None:
        """Make room for a job, before it is submitted. Raises Problem (429) above the caller's cap."""
        if caller.max_in_flight <= 0:
            return
        arguments = [job_id, caller.max_in_flight, names.job_key(""), *_FINAL]
        if not await self._in_flight(keys=[_key("in_flight", caller)], args=arguments):
            detail = f"{caller.max_in_flight} unfinished jobs are the limit of this key"
            raise too_many("too_many_jobs", detail, IN_FLIGHT_RETRY_S)

    async def rename(self, caller: Caller, place: str, job_id: str) -> None:
        """Give the room made for `place` to a job whose id was not known before."""
        if caller.max_in_flight > 0:
            async with self._commands.pipeline(transaction=True) as step:
                step.zrem(_key("in_flight", caller), place)
                step.zadd(_key("in_flight", caller), {job_id: time.time()})
                await step.execute()

    async def release(self, caller: Caller, job_id: str) -> None:
        """Give the room back: the job was not taken."""
        if caller.max_in_flight > 0:
            await self._commands.zrem(_key("in_flight", caller), job_id)


def _key(what: str, caller: Caller) -> str:
    return f"{names.PREFIX}gateway:{what}:{caller.tenant}"


def _script(name: str) -> str:
    return files(__package__).joinpath("scripts", f"{name}.lua").read_text("utf-8")
