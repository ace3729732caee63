"""What an operator sees of a worker: probes, metrics, logs without secrets; and that a stuck one is replaced."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
import redis
from celery import Celery

from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.errors import JobFailed
from tests.e2e.probes import get, probe, samples
from tests.processes import READY_S, WorkerProcess
from tests.servers import RedisServer, S3Server, eventually, free_port
from worker.observability.metrics import READINGS, Metrics

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PICTURE = cv2.imencode(".png", np.full((64, 64, 3), 255, np.uint8))[1].tobytes()
PASSWORD = "pa/ss%word-hunter2"
HUB_TOKEN = "hf_hunter3hunter3"
SIGNATURE = "fe5f80f77d5fa3beca038a248ff027d0"
SECRETS = ("hunter2", HUB_TOKEN, "test-secret", "test-key", SIGNATURE)


class LockedRedis(RedisServer):
    """A Redis with a password."""

    @property
    def url(self) -> str:
        return f"redis://:pa%2Fss%25word-hunter2@127.0.0.1:{self.port}/0"


class BrokenWorker(WorkerProcess):
    """A supervised worker that breaks, see broken_worker.py."""

    program = ("-m", "tests.e2e.broken_supervisor")

    def facts(self, message: str) -> list[dict[str, object]]:
        """The log lines with this message."""
        lines = (json.loads(line) for line in self.text().splitlines() if f'"{message}"' in line)
        return [line for line in lines if line["message"] == message]


@pytest.fixture
def locked_redis(tmp_path: Path) -> Iterator[LockedRedis]:
    server = LockedRedis(tmp_path, "--requirepass", PASSWORD)
    yield server
    server.stop()


def test_a_worker_tells_how_it_is_and_never_a_secret(
    locked_redis: LockedRedis,
    s3_server: S3Server,
    s3_client: S3Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    port = free_port()
    worker = WorkerProcess(
        tmp_path, locked_redis.url, s3_server.url, model="demo", http_port=port, log_level="DEBUG",
        lease_s=6, beat_s=0.5, grace_s=1, sweep_s=0.2, storage_retries=1, drain_s=240,
    )  # fmt: skip
    shown = ""
    try:
        eventually(lambda: get(port, "/healthz")[0] or worker.process.poll() is not None, READY_S, "it answers")
        status, report = probe(port, "/healthz")
        if report["phase"] == "loading":  # nearly always: the model takes seconds
            assert status == 200
            status, report = probe(port, "/readyz")
            assert status == 503 or report["phase"] != "loading"
        assert get(port, "/metrics")[0] == 200
        assert get(port, "/")[0] == 404
        worker.wait_ready()
        eventually(lambda: probe(port, "/readyz")[0] == 200, 20, "ready")

        with Client(locked_redis.url) as client:
            answer = client.vqa(question="hello", max_new_tokens=5).result(timeout=60)
            before = samples_after(port, num_completed=1)
            assert_numbers_of_one_job(before, answer.usage.completion_tokens, answer.usage.prompt_tokens)
            every_layer_fails(locked_redis, client, s3_client)
            after = samples_after(port, num_completed=3)
        assert after["visionq_request_failure_total{code=media_not_found}"] == 1
        assert after["visionq_request_failure_total{code=media_forbidden}"] == 1
        assert after["visionq_request_failure_total{code=invalid_request}"] >= 2
        assert after["visionq_media_fetch_bytes_total"] == len(PICTURE)
        assert after["visionq_media_decode_seconds_count"] == 1
        assert after["visionq_mm_cache_hits_total"] == 1
        assert after["visionq_claims_refused_total{reason=unknown}"] == 1
        assert after["visionq_messages_dropped_total{reason=unreadable}"] == 1

        locked_redis.kill()
        eventually(lambda: "redis" in str(probe(port, "/readyz")[1]["problems"]), 30, "redis is missed")
        assert probe(port, "/healthz")[0] == 200, "a restart would not bring Redis back"
        locked_redis.start()
        eventually(lambda: probe(port, "/readyz")[0] == 200, 30, "ready again")
        assert samples(port)["visionq_log_events_total{action=beat,event=heartbeat not written,level=WARNING}"] >= 1

        with Client(locked_redis.url) as client:
            long = client.vqa(question="hello", min_new_tokens=800, max_new_tokens=800)
            next(long.stream(timeout=60))
            worker.process.send_signal(signal.SIGTERM)
            eventually(lambda: probe(port, "/readyz")[1].get("phase") == "draining", 20, "draining")
            assert probe(port, "/readyz")[0] == 503
            assert probe(port, "/healthz")[0] == 200
            shown += get(port, "/readyz")[1] + get(port, "/healthz")[1] + get(port, "/metrics")[1]
            assert long.result(timeout=120).usage.completion_tokens == 800
        assert worker.process.wait(60) == 0
        shown += worker.text() + everything_told(locked_redis)
        assert [secret for secret in SECRETS if secret in shown] == []
        assert all(json.loads(line) for line in worker.text().splitlines() if line.startswith("{"))
    finally:
        worker.kill()


def samples_after(port: int, num_completed: int) -> dict[str, float]:
    """Return the samples once so many jobs are counted: a job's result is there a moment before its count."""
    name = "visionq_attempts_total{outcome=completed}"
    eventually(lambda: samples(port).get(name) == num_completed, 30, f"{num_completed} jobs are counted")
    return samples(port)


def assert_numbers_of_one_job(found: dict[str, float], num_completion_tokens: int, num_prompt_tokens: int) -> None:
    families = {metric.name for metric in Metrics("default").registry.collect()}
    assert {name for name in families if not any(sample.startswith(name) for sample in found)} <= {
        "visionq_attempts",
        "visionq_log_events",
    }
    assert {name for name in READINGS if f"visionq_{name}" not in found} == set()
    assert found["visionq_generation_tokens_total"] == num_completion_tokens, "warming up is not counted"
    assert found["visionq_prompt_tokens_total"] == num_prompt_tokens
    assert (
        found["visionq_request_success_total{finished_reason=length}"]
        + found["visionq_request_success_total{finished_reason=stop}"]
        == 1
    )
    assert found["visionq_attempts_total{outcome=completed}"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert found[f"visionq_{name}_seconds_count"] == 1
        assert 0 < found[f"visionq_{name}_seconds_sum"] < 60
    assert found["visionq_time_to_first_token_seconds_sum"] < found["visionq_e2e_request_latency_seconds_sum"]
    assert found["visionq_inter_token_latency_seconds_count"] <= num_completion_tokens - 1
    assert found["visionq_engine_step_seconds_count"] >= num_completion_tokens
    assert found["visionq_is_ready"] == 1
    assert found["visionq_num_slots"] == 20


def every_layer_fails(server: LockedRedis, client: Client, s3: S3Client) -> None:
    """Hand in what is wrong in every way, secrets in it."""
    s3.put_object(Bucket="media", Key="broken.png", Body=b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    signed = f"https://media.s3.amazonaws.com/a.png?X-Amz-Credential=AKIA%2Ftest-key&X-Amz-Signature={SIGNATURE}"
    app = Celery(broker=server.url, backend=server.url, set_as_current=False)
    plain = [
        {"media": [signed], "question": "what?"},
        {"media": [f"s3://media/a.png?X-Amz-Signature={SIGNATURE}"], "question": "what?"},
        {"media": ["s3://media/broken.png"], "question": "what?"},
        {"question": 7, "token": PASSWORD},
    ]
    sent = [app.send_task("visionq.vqa", kwargs=kwargs, queue="visionq.default") for kwargs in plain]
    sent += [app.send_task("no.such", kwargs={"token": HUB_TOKEN}, queue="visionq.default")]
    for handle in sent[:-1]:
        with pytest.raises(JobFailed):
            handle.get(timeout=60)
    app.close()
    for uri in ("s3://media/missing.png", "s3://private/a.png"):
        with pytest.raises(JobFailed):
            client.vqa(media=[uri], question="what?").result(timeout=60)
    with server.client() as raw:
        raw.lpush(names.queue("default"), f"garbage {PASSWORD}")
        raw.lpush(names.queue("default"), doorbell_of_nothing())
    s3.put_object(Bucket="media", Key="white.png", Body=PICTURE)
    for _ in range(2):
        assert client.vqa(media=["s3://media/white.png"], question="what?").result(timeout=60).text


def doorbell_of_nothing() -> str:
    job_id = str(uuid.uuid4())
    properties = {"delivery_tag": job_id, "delivery_info": {"exchange": "", "routing_key": "visionq.default"}}
    headers = {"task": "visionq.vqa", "id": job_id, names.DOORBELL_HEADER: 1}
    return json.dumps(
        {"body": "[[], {}, {}]", "content-type": "application/json", "content-encoding": "utf-8",
         "headers": headers, "properties": properties | {"priority": 0}}
    )  # fmt: skip


def everything_told(server: LockedRedis) -> str:
    """Return all results and events."""
    with server.client() as raw:
        results = [str(raw.get(key)) for key in raw.keys("celery-task-meta-*")]
        events = [str(raw.xrange(key)) for key in raw.keys("visionq:events:*")]
    assert results
    assert events
    return "".join(results + events)


def test_a_stalled_worker_and_a_mute_one_are_replaced_and_the_job_is_answered(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks, port = tmp_path / "breaks", free_port()
    breaks.write_text("stall\nmute\n")
    monkeypatch.setenv("BREAKS", str(breaks))
    supervised = BrokenWorker(
        tmp_path, redis_url, "http://127.0.0.1:1", model="demo", http_port=port, stall_s=2, mute_s=3, drain_s=4,
        lease_s=15, beat_s=0.5, grace_s=1, sweep_s=0.2,
    )  # fmt: skip
    try:
        supervised.wait_ready()
        with Client(redis_url) as client:
            job = client.vqa(question="hello", max_new_tokens=5)
            seen: list[dict[str, object]] = []
            eventually(lambda: has_failed(port, seen), 60, "the stall shows")
            assert "stalled: no step for" in str(seen[-1]["problems"])
            answer = job.result(timeout=READY_S * 2)
        stalled, mute = supervised.facts("worker is stuck")
        assert (stalled["trouble"], mute["trouble"]) == ("stalled", "mute")
        assert any("stall" in frame for frame in stalled["stacks"][thread_of(stalled, "engine")])
        assert "1 messages in the queue, 20 free threads" in str(mute["facts"])
        deaths = supervised.facts("worker died")
        assert [death["status"] for death in deaths] == [1, 1]
        assert [death["backoff_s"] for death in deaths] == [1.0, 2.0]
        assert answer.attempt == 2, "given back once, and no lease expired"
        assert '"reason":"given_back"' in str(redis_client.xrange(names.events_key(answer.job_id)))
        assert supervised.terminate() == 0
    finally:
        supervised.kill()


def has_failed(port: int, seen: list[dict[str, object]]) -> bool:
    status, report = probe(port, "/healthz")
    seen.append(report)
    return status == 503


def thread_of(line: dict[str, object], name: str) -> str:
    stacks = line["stacks"]
    assert isinstance(stacks, dict)
    return next(thread for thread in stacks if thread.startswith(f"{name} ("))
