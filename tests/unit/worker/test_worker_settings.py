"""Settings of the worker: what the environment says, and what it may not say."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import SecretStr, ValidationError

from api_stub.settings import ClientSettings, GatewaySettings
from worker.bootstrap import connect
from worker.errors import CannotStart
from worker.settings import WorkerSettings


def test_defaults_serve_the_shipped_model_from_the_media_bucket() -> None:
    settings = WorkerSettings()
    assert (settings.model, settings.model_name) == ("demo", "default")
    assert settings.readable_buckets == {"media"}
    assert settings.concurrency == settings.max_num_seqs + settings.prepare_ahead


def test_the_environment_is_read_with_its_prefix_and_aws_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONQ_ALLOWED_BUCKETS", "media, archive")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1234")
    settings = WorkerSettings()
    assert settings.readable_buckets == {"media", "archive"}
    assert settings.s3_endpoint_url == "http://127.0.0.1:1234"


def test_the_redis_password_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONQ_REDIS_URL", "redis://:hunter2@127.0.0.1:6379/0")
    assert "hunter2" not in repr(WorkerSettings())


@pytest.mark.parametrize(
    "url", ["redis://host/0?password=SECRET", "redis://:pa/SECRET@h", "redis://:SEC#SECRET@h", "redis://:1/SECRET@h"]
)
def test_a_redis_url_with_a_misplaced_password_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        WorkerSettings(redis_url=SecretStr(url))
    assert "SECRET" not in str(refusal.value)


def test_a_redis_that_does_not_answer_is_named_by_its_address_only() -> None:
    settings = WorkerSettings(redis_url=SecretStr("redis://user:SECRET@127.0.0.1:1/0"))
    with pytest.raises(CannotStart, match=r"no Redis answers at 127\.0\.0\.1:1: ") as refusal:
        connect(settings)
    assert "SECRET" not in str(refusal.value)


def test_a_beat_longer_than_a_third_of_the_lease_is_refused() -> None:
    with pytest.raises(ValidationError, match="third of the lease"):
        WorkerSettings(lease_s=6, beat_s=3)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VISIONQ_MAX_NUM_SEQS", "many"),
        ("VISIONQ_DTYPE", "float7"),
        ("VISIONQ_MODEL_NAME", "Not A Name"),
        ("VISIONQ_KV", "tape"),
        ("VISIONQ_MEDIA_BUCKET", "m"),
        ("AWS_ENDPOINT_URL_S3", "host:9000"),
    ],
)
def test_a_bad_value_refuses_to_start_and_names_the_variable(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    finished = subprocess.run(
        [sys.executable, "-m", "worker.cli", "start"], capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 78
    assert f"cannot start: {variable}: " in finished.stderr
    assert "Traceback" not in finished.stderr


def test_what_both_sides_read_is_declared_once() -> None:
    shared = set(GatewaySettings.model_fields) & set(WorkerSettings.model_fields)
    assert len(shared) > 10
    for settings in (WorkerSettings, ClientSettings, GatewaySettings):
        assert shared.isdisjoint(vars(settings)["__annotations__"])


def test_a_context_too_small_for_one_prompt_refuses_to_start(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONQ_REDIS_URL", redis_url)
    monkeypatch.setenv("VISIONQ_MAX_MODEL_LEN", "20")
    finished = subprocess.run(
        [sys.executable, "-m", "worker.cli", "start"], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 78
    assert "cannot start: VISIONQ_" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_model_that_is_not_there_refuses_to_start(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONQ_REDIS_URL", redis_url)
    monkeypatch.setenv("VISIONQ_MODEL", "/no/such/folder")
    finished = subprocess.run(
        [sys.executable, "-m", "worker.cli", "start"], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 78
    assert "VISIONQ_MODEL" in finished.stderr
    assert "/no/such/folder" in finished.stderr
