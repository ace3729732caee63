"""`visionq doctor` on a healthy Redis, and on one in which a thing at a time is wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from click.testing import Result
from typer.testing import CliRunner

from api_stub.cli.main import app
from api_stub.contract import names
from api_stub.ledger.census import take_census
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.servers import RedisServer, eventually, free_port
from tests.unit.api_stub.ledger_kit import answer, question, started

Run = Callable[..., Result]
WINDOW = LedgerConfig().window


@pytest.fixture
def run(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `visionq doctor` with these arguments."""
    monkeypatch.setenv("VISIONQ_REDIS_URL", redis_url)
    return lambda *arguments: CliRunner().invoke(app, ("doctor", *arguments))


@pytest.fixture
def configured(redis_client: redis.Redis) -> Iterator[Callable[[str, str], None]]:
    """Set an option of Redis for one test."""
    former: dict[str, str] = {}

    def configure(name: str, value: str) -> None:
        former.setdefault(name, str(redis_client.config_get(name)[name]))
        redis_client.config_set(name, value)

    yield configure
    for name, value in former.items():
        redis_client.config_set(name, value)


@pytest.fixture
def busy(ledger: Ledger) -> None:
    """A finished job, a running one, waiting and held ones, and a worker."""
    claim = started(ledger, "done")
    ledger.finish("done", claim.fence, answer(claim))
    started(ledger, "running")
    for i in range(WINDOW + 5):
        ledger.submit(f"job-{i}", question(tenant="zoo"))
    ledger.beat("worker-1", "default", [])


def findings(result: Result) -> dict[tuple[str, str], str]:
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return {(row["check"], row["level"]): row["message"] for row in rows}


@pytest.mark.usefixtures("busy")
def test_a_healthy_redis_has_no_problem(run: Run) -> None:
    done = run("--json")
    found = findings(done)
    assert done.exit_code == 0, done.stdout
    assert not [key for key in found if key[1] == "problem"]
    assert found["queues", "ok"].startswith(f"default: {WINDOW + 6} queued or running")
    assert found["queues", "ok"].endswith("5 held, 1 workers")
    assert found["jobs", "ok"] == f"1 completed, 1 in_progress, {WINDOW + 5} queued"


@pytest.mark.usefixtures("busy")
def test_it_changes_nothing(run: Run, redis_client: redis.Redis) -> None:
    def num_changes() -> int:
        return int(redis_client.info("persistence")["rdb_changes_since_last_save"])

    before = num_changes()
    run()
    assert num_changes() == before


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [("maxmemory-policy", "allkeys-lru", "eviction"), ("appendonly", "no", "durability")],
)
def test_a_redis_that_forgets_jobs_is_a_problem(
    run: Run, configured: Callable[[str, str], None], name: str, value: str, check: str
) -> None:
    configured(name, value)
    done = run("--json")
    assert done.exit_code == 1
    assert (check, "problem") in findings(done)


def test_leases_that_differ_are_a_problem(run: Run, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Ledger.connect(redis_url, LedgerConfig(lease_s=30))
    other.beat("worker-1", "default", [])
    other.close()
    done = run("--json")
    assert done.exit_code == 1
    assert "15 and 30 s" in findings(done)["settings", "problem"]
    monkeypatch.setenv("VISIONQ_LEASE_S", "30")
    assert run().exit_code == 0


def test_settings_that_differ_between_processes_are_warnings(run: Run, redis_url: str) -> None:
    for config in (LedgerConfig(), LedgerConfig(), LedgerConfig(max_attempts=10, ageing_s=0.5)):
        other = Ledger.connect(redis_url, config)
        other.reap()
        other.close()
    done = run("--json")
    assert done.exit_code == 0
    rows = [json.loads(row) for row in done.stdout.splitlines()]
    assert [
        row["message"].partition(";")[0] for row in rows if (row["check"], row["level"]) == ("settings", "warning")
    ] == [
        "VISIONQ_MAX_ATTEMPTS is 3 and 10",
        "VISIONQ_AGEING_S is 0.5 and 60",
    ]


def test_processes_that_agree_or_are_gone_are_no_warning(run: Run, redis_url: str) -> None:
    for config in (LedgerConfig(max_attempts=9, lease_s=0.001), LedgerConfig(max_attempts=5)):
        other = Ledger.connect(redis_url, config)
        other.reap()
        other.close()
    eventually(lambda: ("settings", "warning") not in findings(run("--json")), what="who is silent is forgotten")


def test_results_that_expire_before_a_message_comes_back_are_a_problem(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISIONQ_RESULT_TTL_S", "60")
    monkeypatch.setenv("VISIONQ_EVENTS_TTL_S", "60")
    assert "VISIONQ_RESULT_TTL_S is 60" in findings(run("--json"))["settings", "problem"]


def leak_row(client: redis.Redis) -> None:
    client.persist(names.job_key("done"))


def leak_stream(client: redis.Redis) -> None:
    client.xadd(names.events_key("nobody"), {"event": "{}"})


def leak_entry(client: redis.Redis) -> None:
    client.zadd(names.waiting_key("default:6"), {"nobody": 1})


def leak_job(client: redis.Redis) -> None:
    client.zrem(names.waiting_key("default:6"), "job-0")


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize(
    ("leak", "words"),
    [
        (leak_row, "1 finished jobs that never expire: visionq:job:done"),
        (leak_stream, "1 event streams without a job that never expire: visionq:events:nobody"),
        (leak_entry, "1 queue entries without an open job: visionq:waiting:default:6 nobody"),
        (leak_job, "1 open jobs that nobody looks after: visionq:job:job-0"),
    ],
)
def test_every_leak_is_found_and_named(
    run: Run, redis_client: redis.Redis, leak: Callable[[redis.Redis], None], words: str
) -> None:
    leak(redis_client)
    done = run("--json")
    assert done.exit_code == 1
    assert findings(done)["leaks", "problem"] == words


@pytest.mark.usefixtures("busy")
def test_a_depth_that_drifted_is_a_problem(run: Run, redis_client: redis.Redis) -> None:
    redis_client.incrby(names.depth_key("default"), 100)
    assert "its open jobs are" in findings(run("--json"))["queues", "problem"]


def test_jobs_that_nobody_serves_and_old_messages_are_warnings(
    run: Run, ledger: Ledger, redis_client: redis.Redis
) -> None:
    ledger.submit("a", question(model="lonely"))
    redis_client.zadd("unacked_index", {"tag": 1})
    redis_client.hset("unacked", "tag", "[]")
    done = run("--json")
    assert done.exit_code == 0
    found = findings(done)
    assert found["queues", "warning"].startswith("lonely: 1 queued")
    assert "1 of them" in found["messages", "warning"]


@pytest.mark.usefixtures("busy")
def test_the_look_is_bounded(run: Run, redis_client: redis.Redis) -> None:
    assert not take_census(redis_client, 3).is_complete
    done = run("--max-keys", "3")
    assert done.exit_code == 0
    assert "and more" in done.stdout


def test_no_redis_is_told_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONQ_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    done = run()
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr.startswith("store_unavailable")


@pytest.mark.parametrize(("name", "version"), [("oldest", "Redis 6.2"), ("newest", "Valkey 9.")])
def test_the_server_is_named_as_what_it_is(
    name: str, version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = RedisServer(tmp_path, name=name)
    monkeypatch.setenv("VISIONQ_REDIS_URL", server.url)
    found = findings(CliRunner().invoke(app, ("doctor", "--json")))
    server.stop()
    assert found["version", "ok"].startswith(version)


def test_a_server_that_is_busy_is_not_taken_for_one_that_refuses_info(redis_url: str, run: Run) -> None:
    def loop() -> None:
        with redis.Redis.from_url(redis_url) as client, suppress(redis.ResponseError):
            client.eval("while true do end", 0)

    with redis.Redis.from_url(redis_url) as client:
        client.config_set("lua-time-limit", 50)
        thread = threading.Thread(target=loop)
        thread.start()
        try:
            eventually(lambda: "BUSY" in run().output)
        finally:
            client.script_kill()
            thread.join()
            client.config_set("lua-time-limit", 5000)
    assert "INFO is refused" not in run().output
