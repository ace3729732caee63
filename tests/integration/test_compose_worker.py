"""The compose file's own commands and environment, run without Docker: a plain Celery producer gets its answer."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import celery
import cv2
import numpy as np
import pytest
import redis

from tests import compose
from tests.servers import S3Server, eventually, free_port, redis_binary

READY_S = 240.0


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = compose.load("docker-compose.yml", variables=compose.SECRETS)["services"]
    return found


@pytest.fixture(scope="module")
def valkey(services: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The `valkey` service's command, with our Redis under Valkey's name; yields its port."""
    binary = redis_binary()
    assert binary is not None
    directory, port = tmp_path_factory.mktemp("valkey"), free_port()
    program = directory / "valkey-server"
    program.write_text(f'#!/bin/sh\nexec "{binary}" --port {port} --bind 127.0.0.1 "$@"\n')
    program.chmod(0o755)
    command = [word.replace("/data", str(directory)) for word in services["valkey"]["command"]]
    environment = services["valkey"]["environment"] | {"PATH": f"{directory}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    eventually(lambda: answers(port), what="valkey answers")
    yield port
    process.terminate()
    process.wait(20)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def worker(
    services: dict[str, Any], valkey: int, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The `worker` service's command and environment, with the host names of the network replaced."""
    directory = tmp_path_factory.mktemp("worker")
    hosts = {
        "@valkey:6379/": f"@127.0.0.1:{valkey}/",
        "http://seaweedfs:8333": s3_server.url,
        services["worker"]["environment"]["HF_HOME"]: str(directory / "models"),
    }
    environment = {name: replaced(value, hosts) for name, value in services["worker"]["environment"].items()}
    environment |= {"VISIONQ_HTTP_HOST": "127.0.0.1", "VISIONQ_HTTP_PORT": str(free_port())}
    scripts = Path(sys.executable).parent
    command = services["worker"]["command"]
    program = shutil.which(command[0], path=str(scripts))
    assert program is not None, f"{command[0]} is not installed beside {sys.executable}"
    log = directory / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, *command[1:]],
            env=environment | {"PATH": f"{scripts}:{os.environ['PATH']}", "TMPDIR": str(directory)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    eventually(lambda: process.poll() is not None or "worker ready" in log.read_text(), READY_S, "the worker consumes")
    assert process.poll() is None, log.read_text()
    yield environment
    process.terminate()
    assert process.wait(60) == 0, log.read_text()


def replaced(value: str, hosts: dict[str, str]) -> str:
    for old, new in hosts.items():
        value = value.replace(old, new)
    return value


def test_the_broker_keeps_jobs_and_asks_for_its_password(valkey: int) -> None:
    with redis.Redis(port=valkey, password=compose.SECRETS["VALKEY_PASSWORD"], decode_responses=True) as client:
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("requirepass") == {"requirepass": compose.SECRETS["VALKEY_PASSWORD"]}


def test_the_health_check_succeeds_and_fails_with_the_worker(services: dict[str, Any], worker: dict[str, str]) -> None:
    command = [sys.executable, *services["worker"]["healthcheck"]["test"][2:]]
    for port, is_healthy in ((worker["VISIONQ_HTTP_PORT"], True), (str(free_port()), False)):
        asked = [replaced(word, {services["worker"]["environment"]["VISIONQ_HTTP_PORT"]: port}) for word in command]
        assert (subprocess.run(asked, capture_output=True, timeout=60, check=False).returncode == 0) is is_healthy


def test_a_plain_celery_job_is_answered(worker: dict[str, str]) -> None:
    bucket = worker["VISIONQ_MEDIA_BUCKET"]
    s3 = boto3.client(
        "s3",
        endpoint_url=worker["AWS_ENDPOINT_URL_S3"],
        region_name=worker["AWS_REGION"],
        aws_access_key_id=worker["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=worker["AWS_SECRET_ACCESS_KEY"],
    )
    s3.create_bucket(Bucket=bucket)
    s3.put_object(
        Bucket=bucket, Key="white.png", Body=cv2.imencode(".png", np.full((64, 64, 3), 255, np.uint8))[1].tobytes()
    )
    s3.close()
    url = worker["VISIONQ_REDIS_URL"]
    with celery.Celery("producer", broker=url, backend=url, set_as_current=False) as app:
        sent = app.send_task(
            "visionq.vqa",
            kwargs={"media": [f"s3://{bucket}/white.png"], "question": "How many shapes?"},
            queue=f"visionq.{worker['VISIONQ_MODEL_NAME']}",
        )
        answer = sent.get(timeout=60)
        app.pool.force_close_all()
    assert answer["job_id"] == sent.id
    assert answer["usage"]["images"] == 1
    assert answer["usage"]["completion_tokens"] > 0
