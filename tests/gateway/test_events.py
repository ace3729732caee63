"""Event streams: whole, resumable, bounded, and gone when nobody reads."""

from __future__ import annotations

import httpx

from tests.gateway.service import Sent, Service, sent_events, text_of
from tests.gateway.test_jobs import submit
from tests.servers import eventually
from tests.unit.api_stub.workers import ScriptedWorker


def read(service: Service, job_id: str, query: str = "", **headers: str) -> list[Sent]:
    """Read a stream to its end."""
    with httpx.stream("GET", f"{service.url}/v1/jobs/{job_id}/events{query}", headers=headers, timeout=30) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        return list(sent_events(answer.iter_lines()))


def test_a_stream_begins_at_the_beginning_and_ends_with_the_job(service: Service, worker: ScriptedWorker) -> None:
    job_id = submit(service)
    with httpx.stream("GET", f"{service.url}/v1/jobs/{job_id}/events", timeout=30) as answer:
        events = sent_events(answer.iter_lines())
        assert next(events).type == "job.queued"
        worker.answer(job_id, "a ", "red ", "circle")
        rest = list(events)
    assert [event.type for event in rest] == ["job.started", *["output.delta"] * 3, "job.completed"]
    assert [event.id for event in rest] == ["2", "3", "4", "5", "6"]
    assert text_of(rest) == "a red circle"
    eventually(lambda: service.gateway.hub.num_channels == 0, what="nobody listens any more")


def test_a_finished_job_is_streamed_as_it_was(service: Service, worker: ScriptedWorker) -> None:
    job_id = submit(service)
    worker.answer(job_id, "re", "d")
    assert text_of(read(service, job_id)) == "red"
    assert [event.id for event in read(service, job_id, "?after=3")] == ["4", "5"]
    assert [event.id for event in read(service, job_id, "?after=1", **{"Last-Event-ID": "4"})] == ["5"]
    answer = httpx.get(f"{service.url}/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "5"})
    assert answer.status_code == 204
