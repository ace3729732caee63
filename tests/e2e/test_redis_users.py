"""Every role of the example's Redis users does its work, end to end, and is refused outside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner

from api_stub.cli.main import app
from api_stub.client.client import Client
from api_stub.contract.event import JobCompleted
from api_stub.contract.job import TaskName
from api_stub.contract.status import JobStatus
from api_stub.errors import JobFailed, StoreUnavailable
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.lua import Transition, script
from api_stub.ledger.rows import Claim
from api_stub.ledger.settings import LedgerConfig
from tests.gateway.conftest import CREDENTIALS
from tests.gateway.service import serving
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server, eventually
from tests.unit.api_stub.ledger_kit import answer, lease_ends, started

USERS = Path(__file__).parents[2] / "api_stub" / "deploy" / "redis-users.conf"
ROLES = ("producer", "gateway", "worker", "reader")


class GuardedRedis(RedisServer):
    """A Redis with the example's users, and one for the test itself."""

    def __init__(self, directory: Path) -> None:
        test_user = directory / "test-user.conf"
        test_user.write_text("user test on >test ~* &* +@all\n", encoding="utf-8")
        super().__init__(directory, "--include", str(USERS), "--include", str(test_user))

    @property
    def url(self) -> str:
        return f"redis://test:test@127.0.0.1:{self.port}/0"

    def url_of(self, role: str) -> str:
        return f"redis://visionq-{role}:change-me-{role}@127.0.0.1:{self.port}/0"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedRedis]:
    server = GuardedRedis(tmp_path_factory.mktemp("guarded"))
    yield server
    server.stop()


@pytest.fixture
def log(guarded: GuardedRedis) -> Iterator[Callable[[], list[str]]]:
    """What Redis refused to visionq's users since the test began."""
    with guarded.client() as client:
        client.flushall()
        client.acl_log_reset()

        def refused() -> list[str]:
            return [f"{entry['username']}: {entry['reason']} {entry['object']}" for entry in client.acl_log()]

        yield refused


def test_a_job_goes_through_producer_worker_and_reader(
    guarded: GuardedRedis, log: Callable[[], list[str]], tmp_path: Path
) -> None:
    worker = WorkerProcess(
        tmp_path, guarded.url_of("worker"), "http://127.0.0.1:1", model="demo", lease_s=6, beat_s=1, sweep_s=0.2
    )
    try:
        with Client(guarded.url_of("producer")) as producer, Client(guarded.url_of("reader")) as reader:
            jobs = [producer.vqa(question="hello", tenant="zoo", max_new_tokens=4) for _ in range(12)]
            jobs[-1].cancel()
            with pytest.raises(JobFailed):
                jobs[-1].result(timeout=10)
            again = producer.retry(jobs[-1].id)
            worker.wait_ready()
            for job in (*jobs[:-1], again):
                assert isinstance(list(reader.job(job.id).events(timeout=60))[-1], JobCompleted)
            assert reader.job(again.id).status().num_workers == 1
        assert worker.terminate() == 0
    finally:
        worker.kill()
    assert log() == []


def test_the_gateways_user_submits_follows_and_sweeps(guarded: GuardedRedis, log: Callable[[], list[str]]) -> None:
    with (
        Client(guarded.url_of("gateway")) as client,
        closing(Ledger.connect(guarded.url_of("gateway"), LedgerConfig())) as ledger,
        closing(Ledger.connect(guarded.url, LedgerConfig())) as worker,
        guarded.client() as admin,
    ):
        started(worker, "lost")
        lease_ends(admin, "lost")
        bells = ledger.reap()
        assert [bell.job_id for bell in bells] == ["lost"]
        job = client.vqa(question="hello")
        claim = worker.claim(job.id, "worker-1")
        worker.finish(job.id, claim.fence, answer(claim))  # type: ignore[union-attr, arg-type]
        assert job.result(timeout=10).text == "red"
        assert [view.job_id for view in ledger.list_jobs().jobs] == [job.id, "lost"]
    assert log() == []


PRODUCERS = (Transition.SUBMIT, Transition.CANCEL, Transition.RETRY, Transition.REPLAY, Transition.VIEW)
CALLS = {
    "producer": PRODUCERS,
    "gateway": (
        *PRODUCERS,
        Transition.LIST_JOBS,
        Transition.REAP,
        Transition.TAKE_DELIVERIES,
        Transition.SETTLE_DELIVERY,
    ),
    "worker": (
        *(Transition.SUBMIT, Transition.CLAIM, Transition.BEAT, Transition.LEAVE, Transition.PUBLISH),
        *(Transition.FINISH, Transition.GIVE_BACK, Transition.RING_AGAIN, Transition.REAP),
        *(Transition.TAKE_LINKED, Transition.SETTLE_LINKED),
    ),
}


@pytest.mark.parametrize("role", CALLS)
def test_every_role_may_do_all_that_its_scripts_do(role: str) -> None:
    (line,) = (line for line in USERS.read_text().splitlines() if line.startswith(f"user visionq-{role} "))
    allowed = {word[1:] for word in line.split() if word.startswith("+")}
    for transition in CALLS[role]:
        used = {name.lower() for name in re.findall(r"redis\.call\('([A-Z]+)'", script(transition, LedgerConfig()))}
        assert used <= allowed, transition


def test_a_producer_may_cancel_a_job_with_a_webhook(guarded: GuardedRedis, log: Callable[[], list[str]]) -> None:
    with Client(guarded.url_of("producer")) as producer:
        job = producer.submit(
            {
                "task": "visionq.vqa",
                "question": "hello",
                "webhook": {"url": "https://example.org/", "events": ["job.cancelled"]},
            }
        )
        job.cancel()
        assert job.status().status is JobStatus.CANCELLED
    assert log() == []


def test_a_worker_may_adopt_a_plain_message(guarded: GuardedRedis, log: Callable[[], list[str]]) -> None:
    with closing(Ledger.connect(guarded.url_of("worker"), LedgerConfig())) as ledger:
        ledger.adopt("plain", task=TaskName.VQA, model="default", job=None, priority=6)
        assert isinstance(ledger.claim("plain", "worker-1"), Claim)
    assert log() == []


def test_the_gateways_user_keeps_files_and_batches(
    guarded: GuardedRedis, log: Callable[[], list[str]], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.client()
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with serving(guarded.url_of("gateway"), s3_server.url, api_models="default") as gateway:
        made = [gateway.http.post("/v1/files", files={"file": b"{}\n"}, data={"purpose": "batch"}) for _ in range(2)]
        file_id = made[0].json()["id"]
        order = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "1h"}
        batch_id = gateway.http.post("/v1/batches", json=order).json()["id"]

        def has_ended() -> bool:
            return bool(gateway.http.get(f"/v1/batches/{batch_id}").json()["status"] == "completed")

        eventually(has_ended, 60, "the batch ends")
        for path in (f"/v1/files?after={file_id}", "/v1/batches", "/v1/jobs", "/v1/queues", "/v1/models", "/metrics"):
            assert gateway.http.get(path).status_code == 200, path
        assert gateway.http.delete(f"/v1/files/{file_id}").status_code == 200
    assert log() == []


def test_the_reader_may_ask_the_doctor(
    guarded: GuardedRedis, log: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(guarded.url_of("producer")) as producer:
        producer.vqa(question="hello")
    monkeypatch.setenv("VISIONQ_REDIS_URL", guarded.url_of("reader"))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.stdout
    assert "does not let this user write" in done.stdout  # it tried; that alone is denied
    assert CliRunner().invoke(app, ["dead", "list"]).exit_code == 0
    assert [entry for entry in log() if "set" not in entry.lower()] == []


def test_the_reader_changes_nothing(guarded: GuardedRedis, log: Callable[[], list[str]]) -> None:
    with Client(guarded.url_of("producer")) as producer, Client(guarded.url_of("reader")) as reader:
        job = producer.vqa(question="hello")
        for change in (reader.job(job.id).cancel, lambda: reader.vqa(question="hello")):
            with pytest.raises(StoreUnavailable, match=r"NOPERM|refused"):
                change()
        assert job.status().status == "queued"
    assert any("visionq-reader: command" in entry for entry in log())


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "command",
    [
        ("GET", "other:key"),
        ("SET", "other:key", "1"),
        ("LPUSH", "celery", "x"),
        ("PUBLISH", "other:channel", "x"),
        ("SUBSCRIBE", "other:channel"),
        ("FLUSHALL",),
        ("KEYS", "*"),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("SCRIPT", "FLUSH"),
        ("DEBUG", "SLEEP", "0"),
        ("MONITOR",),
        ("EVAL", "return redis.call('GET', 'other:key')", "0"),
    ],
    ids=" ".join,
)
def test_every_role_is_refused_outside_its_work(guarded: GuardedRedis, role: str, command: tuple[str, ...]) -> None:
    with (
        redis.Redis.from_url(guarded.url_of(role), socket_timeout=5) as client,
        # Since Redis 7 nobody may DEBUG, and that is looked at before the ACL.
        pytest.raises(redis.ResponseError, match=r"permission|NOPERM|can.t access|DEBUG command not allowed"),
    ):
        client.execute_command(*command)


@pytest.mark.parametrize("role", ["producer", "gateway", "reader"])
def test_only_workers_take_messages(guarded: GuardedRedis, role: str) -> None:
    with redis.Redis.from_url(guarded.url_of(role), socket_timeout=5) as client, pytest.raises(redis.ResponseError):
        client.rpop("visionq.default")


def test_nobody_comes_in_without_a_name(guarded: GuardedRedis) -> None:
    with (
        redis.Redis.from_url(f"redis://127.0.0.1:{guarded.port}/0", socket_timeout=5) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()
