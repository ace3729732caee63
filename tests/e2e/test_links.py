"""`link`, `link_error` and chains of plain messages, between a real worker here and one of another Celery app."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.errors import JobFailed
from tests.e2e import foreign_app
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server, eventually

QUESTION = {"question": "hello", "sampling": {"max_new_tokens": 4}}
QUEUE = "visionq.default"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def foreign_worker(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[None]:
    """Celery's own worker of the other app, on Celery's default queue."""
    log = tmp_path_factory.mktemp("foreign") / "worker.log"
    command = [sys.executable, "-m", "celery", "-A", "tests.e2e.foreign_app", "worker", "--pool", "solo", "-l", "INFO"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"FOREIGN_REDIS_URL": redis_server.url}, stdout=output, stderr=output
        )
    try:
        eventually(lambda: " ready." in log.read_text(), 60, f"the other worker is ready: {log.read_text()}")
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(20)


@pytest.fixture
def celery(redis_server: RedisServer) -> Iterator[Celery]:
    app = Celery(broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    yield app
    consumer: Any = app.backend.result_consumer
    consumer.stop()
    consumer._pubsub = None  # results that are collected later would unsubscribe, from a server that is gone
    app.close()


class Notes:
    """What the other app's worker was sent, and signatures that have it note more."""

    def __init__(self, server: RedisServer) -> None:
        self._server, self._key = server, uuid.uuid4().hex

    def signature(self, app: Celery, name: str = "", **options: Any) -> Any:
        """A call of `foreign.note`; notes of different names are kept apart."""
        return app.signature("foreign.note", kwargs={"key": self._key + name}, **options)

    def __call__(self, name: str = "") -> list[dict[str, Any]]:
        with self._server.client() as client:
            return [json.loads(note) for note in client.lrange(foreign_app.NOTES + self._key + name, 0, -1)]

    def one(self, name: str = "") -> dict[str, Any]:
        """Wait for a note, the only one of its name."""
        eventually(lambda: self(name), 30, "the other worker is sent something")
        (said,) = self(name)
        return said


@pytest.fixture
def notes(redis_server: RedisServer) -> Notes:
    return Notes(redis_server)


def ask(app: Celery, **fields: Any) -> Any:
    return app.signature("visionq.vqa", kwargs=QUESTION | fields, queue=QUEUE, immutable=True)


def is_settled(server: RedisServer, job_id: str) -> bool:
    with server.client() as client:
        return not client.hexists(names.job_key(job_id), "links") and not client.zscore(names.LINKED_KEY, job_id)


pytestmark = pytest.mark.usefixtures("demo_worker", "foreign_worker")


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_link_gets_the_result_in_front_of_its_own_arguments(
    protocol: int, celery: Celery, notes: Notes, redis_server: RedisServer
) -> None:
    celery.conf.task_protocol = protocol
    link = notes.signature(celery, args=("mine",))
    handle = celery.send_task("visionq.vqa", kwargs=QUESTION, queue=QUEUE, link=link)
    result = handle.get(timeout=30)
    said = notes.one()
    assert said["args"] == [result, "mine"]
    assert said["parent_id"] == said["root_id"] == handle.id
    eventually(lambda: is_settled(redis_server, handle.id), 10, "nothing more is to be sent")


def test_all_of_several_links_are_sent_and_an_immutable_one_gets_its_own_arguments_only(
    celery: Celery, notes: Notes
) -> None:
    link = [
        notes.signature(celery, "a"),
        notes.signature(celery, "b", args=("mine",), immutable=True),
        group(notes.signature(celery, "c"), notes.signature(celery, "d")),
        chain(notes.signature(celery, "e"), notes.signature(celery, "f")),
    ]
    result = celery.send_task("visionq.vqa", kwargs=QUESTION, queue=QUEUE, link=link).get(timeout=30)
    assert [notes.one(name)["args"] for name in "abcdef"] == [
        [result], ["mine"], [result], [result], [result], [f"{result['text']}!"]
    ]  # fmt: skip


def test_a_failed_job_sends_its_error_links_alone_with_its_id(celery: Celery, notes: Notes) -> None:
    options = {"link": notes.signature(celery, "link"), "link_error": notes.signature(celery, "error", args=("mine",))}
    handles = [
        celery.send_task("visionq.vqa", kwargs=kwargs, queue=QUEUE, **options)
        for kwargs in ({"media": ["s3://media/no-such.png"]} | QUESTION, {"question": "hello", "colour": "red"})
    ]
    for handle in handles:
        with pytest.raises(JobFailed):
            handle.get(timeout=30)
    eventually(lambda: len(notes("error")) == len(handles), 30, "the error links are sent")
    assert sorted(note["args"] for note in notes("error")) == sorted([handle.id, "mine"] for handle in handles)
    assert notes("link") == []


def test_a_job_within_a_chain_takes_its_turn_and_passes_its_result_on(celery: Celery, notes: Notes) -> None:
    first = celery.signature("foreign.ask", args=("why?",))
    handle = chain(first, ask(celery), notes.signature(celery)).apply_async()
    assert isinstance(handle.get(timeout=60), str)
    said = notes.one()
    result = handle.parent.get(timeout=5)
    assert said["args"] == [result]
    assert (said["id"], said["parent_id"]) == (handle.id, handle.parent.id)
    assert said["root_id"] == handle.parent.parent.id


def test_a_chain_of_two_jobs_and_a_task_runs_in_order(celery: Celery, notes: Notes) -> None:
    handle = chain(ask(celery), ask(celery, metadata={"second": True}), notes.signature(celery)).apply_async()
    assert handle.get(timeout=60)
    said = notes.one()
    assert said["args"] == [handle.parent.get(timeout=5)]
    assert said["args"][0]["metadata"] == {"second": True}


def test_a_job_that_is_handed_the_former_task_s_result_is_refused(celery: Celery, notes: Notes) -> None:
    mutable = celery.signature("visionq.vqa", kwargs=QUESTION, queue=QUEUE)
    handle = chain(celery.signature("foreign.ask", args=("why?",)), mutable).apply_async()
    with pytest.raises(JobFailed) as failure:
        handle.get(timeout=30)
    assert failure.value.message.startswith("args: 1 positional")


def test_when_a_job_of_a_chain_fails_the_tasks_behind_it_fail_with_it(celery: Celery, notes: Notes) -> None:
    behind = chain(notes.signature(celery, "a"), group(notes.signature(celery, "b"), notes.signature(celery, "c")))
    handle = chain(ask(celery, media=["s3://media/no-such.png"]), behind).apply_async()
    for result in (handle.parent, *handle.results):
        with pytest.raises(JobFailed) as failure:
            celery.AsyncResult(result.id).get(timeout=30)
        assert failure.value.code == "media_not_found"
    assert [notes(name) for name in "abc"] == [[], [], []]


def test_a_cancelled_job_sends_nothing_as_a_revoked_task(
    celery: Celery, notes: Notes, redis_server: RedisServer
) -> None:
    fields = QUESTION | {"sampling": {"max_new_tokens": 1500, "min_new_tokens": 1500, "temperature": 2.0}}
    options = {"link": notes.signature(celery), "link_error": notes.signature(celery)}
    handle = celery.send_task("visionq.vqa", kwargs=fields, queue=QUEUE, **options)
    with Client(redis_server.url) as client, redis_server.client() as raw:
        eventually(lambda: raw.exists(names.job_key(handle.id)), 20, "the job is adopted")
        client.job(handle.id).cancel()
        eventually(lambda: handle.state == "REVOKED", 20, "the job is cancelled")
    eventually(lambda: is_settled(redis_server, handle.id), 10, "nothing more is to be sent")
    assert notes() == []


def test_a_chord_is_refused_by_name_wherever_it_stands_and_the_error_link_is_sent(celery: Celery, notes: Notes) -> None:
    after = notes.signature(celery)
    whole = chord([ask(celery)], after)
    handles = [
        whole.apply_async().parent.results[0],
        chain(ask(celery), chord([after], after)).apply_async().parent.parent,
        celery.send_task("visionq.vqa", kwargs=QUESTION, queue=QUEUE, link=chord([after], after)),
    ]
    for handle in handles:
        with pytest.raises(JobFailed) as failure:
            celery.AsyncResult(handle.id).get(timeout=30)
        assert failure.value.code == "invalid_request"
        assert failure.value.message.startswith("chord: ")
    assert notes() == []


def test_the_results_of_a_group_are_collected_as_ever(celery: Celery) -> None:
    handle = group(ask(celery), ask(celery, metadata={"number": 2})).apply_async()
    first, second = handle.get(timeout=30)
    assert (first["job_id"], second["metadata"]) == (handle.results[0].id, {"number": 2})


def test_a_link_that_nobody_could_send_costs_itself_only(celery: Celery, notes: Notes) -> None:
    broken = notes.signature(celery, compression="no-such")
    celery.send_task("visionq.vqa", kwargs=QUESTION, queue=QUEUE, link=[broken, notes.signature(celery, "after")])
    assert notes.one("after")
    assert notes() == []


def test_links_of_a_worker_that_is_killed_before_it_has_sent_them_are_sent_by_another(
    celery: Celery, demo_worker: WorkerProcess, redis_server: RedisServer, s3_server: S3Server, tmp_path: Path
) -> None:
    """The queue is no list for a while: the job ends and nobody can send."""
    doomed = WorkerProcess(tmp_path, redis_server.url, s3_server.url, model="demo", model_name="doomed")
    link = celery.signature("foreign.note", queue="blocked")
    try:
        doomed.wait_ready()
        with redis_server.client() as raw:
            raw.set("blocked", "no list")
            handle = celery.send_task("visionq.vqa", kwargs=QUESTION, queue="visionq.doomed", link=link)
            result = handle.get(timeout=30)
            eventually(lambda: '"link refused"' in doomed.text() + demo_worker.text(), 20, "one of them has tried")
            doomed.kill()
            assert raw.hexists(names.job_key(handle.id), "links")
            raw.delete("blocked")
            eventually(lambda: raw.llen("blocked"), 30, "the other worker has sent it")
            body = json.loads(base64.b64decode(json.loads(raw.lindex("blocked", 0) or "")["body"]))
    finally:
        doomed.kill()
    assert body[0] == [result]
