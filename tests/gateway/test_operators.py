"""Pause, resume, purge, cancel many, delete: through Redis and through a gateway, by Python, command line and HTTP."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import redis
from click.testing import Result
from typer.testing import CliRunner

from api_stub.cli.main import app
from api_stub.client.client import AsyncClient, Client
from api_stub.client.handle import JobHandle
from api_stub.contract import names
from api_stub.contract.status import JobStatus
from api_stub.errors import AccessRefused, InvalidRequest, JobFailed, UnknownJob
from api_stub.gateway.keys import digest_of, new_key
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import CancelledJobs, QueueChange, Refusal
from tests.gateway.service import WAIT_S, Service, serving
from tests.gateway.test_jobs import QUESTION
from tests.servers import RedisServer, eventually
from tests.unit.api_stub.workers import ScriptedWorker

KEYS = {name: new_key() for name in ("alice", "bob", "boss")}
ENTRIES = "; ".join(f"{name}:{digest_of(key)}" for name, key in KEYS.items()) + " role=operator"
CHAT = {"model": "default", "messages": [{"role": "user", "content": "Hello?"}]}
Run = Callable[..., Result]


@pytest.fixture
def run(url: str) -> Run:
    """Run `visionq` with these arguments, there."""
    return lambda *arguments: CliRunner().invoke(app, [*arguments, "--url", url])


@pytest.fixture(scope="module")
def closed_gateway(redis_server: RedisServer) -> Iterator[Service]:
    with serving(redis_server.url, api_keys=ENTRIES) as running:
        yield running


@pytest.fixture
def guarded(closed_gateway: Service, redis_url: str) -> Service:
    """A gateway with keys."""
    return closed_gateway


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def finished(client: Client, worker: ScriptedWorker, **options: object) -> JobHandle:
    job = client.vqa(question="Why?", **options)  # type: ignore[arg-type]
    worker.take(job.id)
    worker.say("red")
    worker.finish()
    return job


# pause, resume, purge


def test_a_queue_is_paused_and_goes_on(client: Client, ledger: Ledger, worker: ScriptedWorker) -> None:
    first = client.vqa(question="Why?")
    assert client.pause("default") == QueueChange(True, 1, 0)
    assert client.pause("default") == QueueChange(False, 1, 0)
    late = client.vqa(question="Why not?")
    for job in (first, late):
        assert isinstance(ledger.claim(job.id, "worker-1"), Refusal)
        assert any("the queue of the model 'default' is paused" in warning for warning in job.status().warnings or ())
    assert client.resume("default") == QueueChange(True, 2, 0)
    assert not any("paused" in warning for warning in late.status().warnings or ())
    worker.take(first.id)


def test_a_queue_is_purged(client: Client, worker: ScriptedWorker) -> None:
    running = client.vqa(question="Why?")
    worker.take(running.id)
    queued = [client.vqa(question="Why?", tenant=tenant) for tenant in ("", "zoo", "zoo")]
    other = client.vqa(question="Why?", model="other")
    assert client.purge("default") == 3
    for job in queued:
        with pytest.raises(JobFailed, match="purged") as caught:
            job.result(timeout=5)
        assert caught.value.code == "cancelled"
    worker.finish()
    assert other.status().status is JobStatus.QUEUED


def test_a_name_that_is_none_is_refused(client: Client) -> None:
    for call in (client.pause, client.resume, client.purge):
        with pytest.raises(InvalidRequest, match="model"):
            call("No Model")


def test_asyncio_does_the_same(url: str, worker: ScriptedWorker) -> None:
    async def use() -> tuple[object, ...]:
        async with AsyncClient(url) as client:
            job = await client.vqa(question="Why?", metadata={"run": 1})
            changes = (await client.pause("default"), await client.resume("default"))
            cancelled = await client.cancel_jobs(metadata={"run": 1})
            await job.delete()
            await client.vqa(question="Why?")
            return (*changes, cancelled, await client.purge("default"))

    expected = (QueueChange(True, 1, 0), QueueChange(True, 1, 0), CancelledJobs(1, 0), 1)
    assert asyncio.run(use()) == expected


def test_only_operators_run_queues(guarded: Service, redis_client: redis.Redis) -> None:
    for what in ("pause", "resume", "purge"):
        answer = guarded.http.post(f"/v1/queues/default/{what}", headers=as_("alice"))
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        assert "role=operator" in answer.json()["detail"]
        assert guarded.http.post(f"/v1/queues/default/{what}").status_code == 401
        with Client(guarded.url, api_key=KEYS["alice"]) as client, pytest.raises(AccessRefused, match="operators"):
            getattr(client, what)("default")
    assert not redis_client.exists(names.PAUSED_KEY)
    guarded.http.post("/v1/jobs", json=QUESTION, headers=as_("alice"))
    paused = guarded.http.post("/v1/queues/default/pause", headers=as_("boss"))
    assert paused.json() == {"model": "default", "paused": True, "changed": True, "depth": 1, "num_workers": 0}
    purged = guarded.http.post("/v1/queues/default/purge", headers=as_("boss"))
    assert purged.json() == {"model": "default", "cancelled": 1}


def test_the_list_of_queues_tells_which_are_paused(service: Service, client: Client) -> None:
    client.vqa(question="Why?")
    client.pause("empty")
    queues = {queue["model"]: queue for queue in service.http.get("/v1/queues").json()["queues"]}
    assert queues["empty"] == {"model": "empty", "depth": 0, "waiting": 0, "num_workers": 0, "paused": True}
    client.resume("empty")
    client.pause("default")
    eventually(
        lambda: [
            queue["model"] for queue in service.http.get("/v1/queues").json()["queues"] if queue.get("paused")
        ] == ["default"],
        what="the queue is listed as paused",
    )  # fmt: skip


# completions


def test_completions_of_a_paused_queue_are_refused_at_once(service: Service, worker: ScriptedWorker) -> None:
    """Those that were asked before wait on; under their Idempotency-Key they can be asked for again."""
    worker.ledger.beat("scripted@test:1", "default", [])
    key = {"Idempotency-Key": str(uuid.uuid4())}

    def ask(**headers: str) -> httpx.Response:
        return service.http.post("/v1/chat/completions", json=CHAT, headers=headers)

    with ThreadPoolExecutor() as clients:
        first = clients.submit(ask, **key)
        eventually(lambda: service.http.get("/v1/jobs?status=queued").json()["jobs"], what="the job waits")
        worker.ledger.pause("default")
        for stream in (False, True):
            refused = service.http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "queue_paused"
            assert int(refused.headers["Retry-After"]) >= 1
        again = clients.submit(ask, **key)
        worker.ledger.resume("default")
        worker.take(service.http.get("/v1/jobs?status=queued").json()["jobs"][0]["job_id"])
        worker.say("red")
        worker.finish()
        for answer in (first.result(WAIT_S), again.result(WAIT_S)):
            assert answer.json()["choices"][0]["message"]["content"] == "red"


# many at once


def test_jobs_are_cancelled_by_what_they_have_in_common(client: Client, worker: ScriptedWorker) -> None:
    jobs = [client.vqa(question="Why?", metadata={"run": number % 2, "who": "ann"}) for number in range(4)]
    other = client.vqa(question="Why?", model="other", metadata={"run": 1})
    worker.take(jobs[1].id)
    assert client.cancel_jobs(model="default", metadata={"run": 1}) == CancelledJobs(1, 1)
    assert [job.status().status for job in (jobs[0], jobs[3], other)] == [
        JobStatus.QUEUED, JobStatus.CANCELLED, JobStatus.QUEUED
    ]  # fmt: skip
    assert jobs[1].status().cancelling
    assert client.cancel_jobs(status="queued") == CancelledJobs(3, 0)
    for nothing in ({}, {"metadata": {}}, {"status": "completed"}, {"metadata": {"run": [1]}}, {"model": "No Model"}):
        with pytest.raises(InvalidRequest, match=r"status|metadata|model"):
            client.cancel_jobs(**nothing)  # type: ignore[arg-type]


def test_a_key_cancels_its_own_jobs_only(guarded: Service) -> None:
    ids = {name: guarded.http.post("/v1/jobs", json=QUESTION, headers=as_(name)).json()["job_id"] for name in KEYS}
    wanted = {"status": "queued", "tenant": "bob"}
    answer = guarded.http.post("/v1/jobs/cancel", json=wanted, headers=as_("alice"))
    assert answer.json() == {"cancelled": 1, "cancelling": 0}
    statuses = {name: guarded.http.get(f"/v1/jobs/{ids[name]}", headers=as_(name)).json()["status"] for name in KEYS}
    assert statuses == {"alice": "cancelled", "bob": "queued", "boss": "queued"}


def test_a_selection_that_is_none_is_refused_with_its_field(service: Service) -> None:
    for wanted, field in (({}, ""), ({"status": "failed"}, "status"), ({"metadata": {"a": {"b": 1}}}, "metadata")):
        answer = service.http.post("/v1/jobs/cancel", json=wanted)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert answer.json()["errors"][0]["field"].startswith(field), answer.json()
    surrogate = service.http.post("/v1/jobs/cancel", content=b'{"metadata": {"a": "\\ud800"}}', headers=JSON)
    assert surrogate.status_code == 422


JSON = {"Content-Type": "application/json"}


# delete


def test_a_deleted_job_is_unknown_to_everybody(
    service: Service, client: Client, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    waiting = client.vqa(question="Why?")
    with pytest.raises(InvalidRequest, match="has not ended"):
        waiting.delete()
    worker.take(waiting.id)
    with pytest.raises(InvalidRequest, match="has not ended"):
        waiting.delete()
    worker.say("red")
    worker.finish()
    waiting.delete()
    for call in (waiting.status, waiting.result, waiting.cancel, waiting.delete, lambda: list(waiting.events())):
        with pytest.raises(UnknownJob):
            call()
    path = f"/v1/jobs/{waiting.id}"
    for method, route in (
        ("GET", path), ("GET", f"{path}?wait=1"), ("GET", f"{path}/events"), ("POST", f"{path}/cancel"),
        ("POST", f"{path}/retry"), ("DELETE", path),
    ):  # fmt: skip
        assert service.http.request(method, route).status_code == 404, (method, route)
    assert service.http.get("/v1/jobs").json()["jobs"] == []
    assert not redis_client.exists(names.result_key(waiting.id))


def test_deleting_answers_as_http_does(service: Service, worker: ScriptedWorker) -> None:
    job_id = service.http.post("/v1/jobs", json=QUESTION).json()["job_id"]
    refused = service.http.delete(f"/v1/jobs/{job_id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "unfinished")
    service.http.post(f"/v1/jobs/{job_id}/cancel")
    gone = service.http.delete(f"/v1/jobs/{job_id}")
    assert (gone.status_code, gone.content) == (204, b"")


def test_a_key_deletes_its_own_jobs_only(guarded: Service) -> None:
    job_id = guarded.http.post("/v1/jobs", json=QUESTION, headers=as_("bob")).json()["job_id"]
    guarded.http.post(f"/v1/jobs/{job_id}/cancel", headers=as_("bob"))
    for other in ("alice", "boss"):
        assert guarded.http.delete(f"/v1/jobs/{job_id}", headers=as_(other)).status_code == 404
    assert guarded.http.delete(f"/v1/jobs/{job_id}", headers=as_("bob")).status_code == 204


def test_the_key_of_a_deleted_job_makes_a_new_one(service: Service, worker: ScriptedWorker) -> None:
    """As after the job's record has expired: the same id, nothing of the former one."""
    key = {"Idempotency-Key": "monday"}
    first = service.http.post("/v1/jobs", json=QUESTION, headers=key).json()["job_id"]
    worker.take(first)
    worker.say("red")
    worker.finish()
    service.http.delete(f"/v1/jobs/{first}")
    other = QUESTION | {"question": "Another one?"}
    again = service.http.post("/v1/jobs", json=other, headers=key)
    assert (again.status_code, again.json()["job_id"]) == (202, first)
    assert (again.json()["status"], again.json()["attempt"]) == ("queued", 0)


# the command line


def test_the_command_line_runs_queues(run: Run, client: Client) -> None:
    job = client.vqa(question="Why?")
    assert run("queue", "pause", "default").stdout == "default: paused; 1 jobs queued or running, 0 workers\n"
    assert "is paused" in run("status", job.id).stdout
    assert "was paused already" in run("queue", "pause", "default").stdout
    changed = json.loads(run("queue", "resume", "default", "--json").stdout)
    assert changed == {"model": "default", "is_changed": True, "depth": 1, "num_workers": 0}
    refused = run("queue", "purge", "default")
    assert (refused.exit_code, "--yes" in refused.stderr) == (2, True)
    assert job.status().status is JobStatus.QUEUED
    assert run("queue", "purge", "default", "--yes").stdout == "default: 1 queued jobs cancelled\n"
    assert json.loads(run("queue", "purge", "default", "--yes", "--json").stdout) == {
        "model": "default",
        "cancelled": 0,
    }
    stranger = run("queue", "pause", "defualt")
    assert (stranger.exit_code, "is this the model's name?" in stranger.stderr) == (0, True)
    assert run("queue", "pause", "No Model").exit_code == 2


def test_the_command_line_cancels_many_and_deletes(run: Run, client: Client) -> None:
    marked = {"run": 7, "who": "ann", "text": "7", "on": True}
    jobs = [client.vqa(question="Why?", metadata=marked), client.vqa(question="Why?", metadata={"run": 8})]
    assert run("cancel", "--metadata", "run=6").stdout == "0 queued jobs cancelled, 0 running ones told to stop\n"
    same = ("run=7", "who=ann", 'text="7"', "on=true")
    options = [option for member in same for option in ("--metadata", member)]
    assert json.loads(run("cancel", *options, "--model", "default", "--json").stdout) == {
        "cancelled": 1, "cancelling": 0
    }  # fmt: skip
    assert jobs[1].status().status is JobStatus.QUEUED
    assert run("delete", jobs[0].id).stdout == "deleted\n"
    assert run("delete", jobs[0].id).exit_code == 2
    assert run("delete", jobs[1].id).exit_code == 2
    assert run("cancel").exit_code == run("cancel", jobs[1].id, "--status", "queued").exit_code == 2
    assert run("cancel", "--status", "failed").exit_code == 2
    assert run("cancel", "--metadata", "run").exit_code == 2
    assert run("cancel", jobs[1].id).stdout == "cancelled\n"


def test_a_person_is_asked_before_a_purge(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_stub.cli.operators._is_terminal", lambda: True)
    with Client(redis_url) as client:
        job = client.vqa(question="Why?")
        purge = ["queue", "purge", "default", "--url", redis_url]
        assert CliRunner().invoke(app, purge, input="n\n").exit_code == 1
        assert job.status().status is JobStatus.QUEUED
        assert CliRunner().invoke(app, purge, input="y\n").exit_code == 0
        assert job.status().status is JobStatus.CANCELLED
