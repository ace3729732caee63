"""A bad setting refuses to start, names its variable and keeps passwords to itself."""

from __future__ import annotations

import traceback

import pytest
from pydantic import SecretStr, ValidationError

from api_stub.errors import InvalidSettings
from api_stub.ledger.settings import variable_of
from api_stub.settings import ClientSettings


def test_environment_is_read_and_an_argument_wins_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONQ_REDIS_URL", "redis://one:1/0")
    monkeypatch.setenv("VISIONQ_LEASE_S", "5")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3:9000")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    settings = ClientSettings.load()
    assert settings.redis_url.get_secret_value() == "redis://one:1/0"
    assert settings.ledger.lease_s == 5.0
    assert (settings.s3_endpoint_url, settings.s3_region) == ("http://s3:9000", "eu-central-1")
    assert ClientSettings.load("redis://two:2/0").redis_url == SecretStr("redis://two:2/0")


def test_an_empty_variable_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONQ_REDIS_URL", "")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
    settings = ClientSettings.load()
    assert settings.redis_url.get_secret_value() == "redis://127.0.0.1:6379/0"
    assert settings.s3_endpoint_url is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VISIONQ_REDIS_URL", "http://host"),
        ("VISIONQ_REDIS_URL", "localhost:6379"),
        ("VISIONQ_REDIS_URL", "redis://host:port"),
        ("VISIONQ_REDIS_URL", "redis://host/0?password=secret"),
        ("VISIONQ_REDIS_URL", "redis://host?db=1"),
        ("VISIONQ_LEASE_S", "soon"),
        ("VISIONQ_LEASE_S", "0"),
        ("VISIONQ_MAX_ATTEMPTS", "0"),
        ("VISIONQ_MAX_QUEUED", "-1"),
        ("VISIONQ_MEDIA_BUCKET", "m"),
        ("AWS_ENDPOINT_URL_S3", "host:9000"),
        ("VISIONQ_S3_PUBLIC_URL", "ftp://host"),
    ],
)
def test_a_bad_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidSettings, match=rf"^{variable}: "):
        ClientSettings.load()


def test_a_bad_redis_url_shows_its_password_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONQ_REDIS_URL", "redis://user:hunter/2@host:6379/0")
    with pytest.raises(InvalidSettings) as refusal:
        ClientSettings.load()
    assert "hunter" not in "".join(traceback.format_exception(refusal.value))


def test_settings_cannot_be_changed_and_do_not_show_the_password() -> None:
    settings = ClientSettings.load("redis://user:hunter2@host:6379/0")
    with pytest.raises(ValidationError):
        settings.lease_s = 1.0  # type: ignore[misc]
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize("field", ClientSettings.model_fields)
def test_every_setting_is_described_and_its_variable_has_an_agreed_name(field: str) -> None:
    assert ClientSettings.model_fields[field].description
    assert variable_of(ClientSettings, field).startswith(("VISIONQ_", "AWS_"))
