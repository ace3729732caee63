"""The demo's job over HTTP: its events are those of the stream, and what goes wrong is told."""

from __future__ import annotations

import pytest

from api_stub.demo.tasks import GatewayFailed, HttpJob
from tests.gateway.service import Service
from tests.gateway.test_jobs import QUESTION
from tests.servers import free_port
from tests.unit.api_stub.workers import ScriptedWorker


def test_a_job_is_followed_to_its_end(service: Service, worker: ScriptedWorker) -> None:
    job = HttpJob.submit(service.url, QUESTION)
    worker.answer(job.id, "a ", "red ", "circle")
    types = [event.type for event in job.events(timeout=30)]
    assert types == ["job.queued", "job.started", *["output.delta"] * 3, "job.completed"]


def test_a_refusal_says_why(service: Service) -> None:
    with pytest.raises(GatewayFailed, match="colour"):
        HttpJob.submit(service.url, QUESTION | {"colour": "red"})
    with pytest.raises(GatewayFailed, match="404"):
        list(HttpJob(service.url, "nothing").events(timeout=30))


def test_an_absent_gateway_is_told() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(GatewayFailed, match="took no job"):
        HttpJob.submit(url, QUESTION)
    with pytest.raises(GatewayFailed, match="broke"):
        list(HttpJob(url, "any").events(timeout=30))
