"""Dead jobs and second tries: the ledger's steps, the client's methods and `visionq dead`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import closing

import pytest
import redis
from click.testing import Result
from typer.testing import CliRunner

from api_stub.cli.main import app
from api_stub.client.client import AsyncClient, Client
from api_stub.contract import names
from api_stub.contract.job import TaskName, parse_job
from api_stub.contract.status import JobStatus
from api_stub.errors import InvalidRequest, QueueFull, UnknownJob
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import CannotRetry, LedgerFull
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.broker_kit import Broker
from tests.unit.api_stub.ledger_kit import answer, claimed, failure, lose, question, started

Run = Callable[..., Result]


@pytest.fixture
def run(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `visionq dead` with these arguments."""
    monkeypatch.setenv("VISIONQ_REDIS_URL", redis_url)
    return lambda *arguments: CliRunner().invoke(app, ("dead", *arguments))


@pytest.fixture
def dead(ledger: Ledger, redis_client: redis.Redis) -> list[str]:
    """Ids of two dead jobs, the newest first."""
    for job_id in ("a", "b"):
        ledger.submit(job_id, question(f"What about {job_id}?", priority=3, tenant="zoo", deadline_s=3600.0))
        for _ in range(LedgerConfig().max_attempts):
            claimed(ledger, job_id)
            lose(ledger, redis_client, job_id)
    return ["b", "a"]


# the ledger


def test_second_try_is_a_new_job_with_the_same_body(ledger: Ledger, redis_client: redis.Redis) -> None:
    body = started(ledger, "a", priority=3, tenant="zoo", deadline_s=3600.0)
    ledger.finish("a", body.fence, failure())
    new_id = ledger.retry("a")
    assert new_id not in (None, "a")
    assert ledger.retry("a") == new_id
    assert redis_client.get(names.depth_key("default")) == "1"
    claim = Broker(ledger).claim_next()
    assert claim is not None
    assert (claim.job_id, claim.attempt, claim.body) == (new_id, 1, body.body)
    assert claim.deadline_left_s == pytest.approx(3600, abs=60)
    view = ledger.view(new_id or "")
    assert view is not None
    assert (view.priority, view.tenant, view.model) == (3, "zoo", "default")
    assert [job.job_id for job in ledger.list_jobs("zoo").jobs] == [new_id, "a"]
    assert ledger.submit(new_id or "", parse_job(body.body)).value == "same"


def test_any_finished_job_can_be_tried_again_and_no_other(ledger: Ledger) -> None:
    claim = started(ledger, "a")
    with pytest.raises(CannotRetry, match="in_progress"):
        ledger.retry("a")
    ledger.finish("a", claim.fence, answer(claim))
    assert ledger.retry("a") is not None
    assert ledger.retry("nobody") is None
    ledger.adopt("invalid", task=TaskName.VQA, model="default", job=None, priority=6)
    ledger.finish("invalid", claimed(ledger, "invalid").fence, failure())
    with pytest.raises(CannotRetry, match="valid body"):
        ledger.retry("invalid")


def test_second_tries_obey_the_admission_limit(redis_url: str) -> None:
    with closing(Ledger.connect(redis_url, LedgerConfig(max_queued=1))) as ledger:
        claim = started(ledger, "a")
        ledger.finish("a", claim.fence, failure())
        ledger.submit("b", question())
        with pytest.raises(LedgerFull):
            ledger.retry("a")


# the client


def test_client_lists_retries_and_drops(client: Client, dead: list[str]) -> None:
    assert [view.job_id for view in client.dead()] == dead
    handle = client.retry("a")
    assert handle.status().status is JobStatus.QUEUED
    assert client.retry("a").id == handle.id
    assert [view.job_id for view in client.dead()] == ["b"]
    assert client.drop("b")
    assert not client.drop("b")
    assert client.dead() == ()
    with pytest.raises(UnknownJob):
        client.retry("nobody")
    with pytest.raises(InvalidRequest, match="queued"):
        client.retry(handle.id)


def test_client_tells_that_the_queue_is_full(redis_url: str, dead: list[str], client: Client) -> None:
    full = client.settings.model_copy(update={"max_queued": 1})
    with Client(settings=full) as bounded:
        bounded.retry("a")
        with pytest.raises(QueueFull):
            bounded.retry("b")


def test_asyncio_client_does_the_same(redis_url: str, dead: list[str]) -> None:
    async def use() -> tuple[list[str], str, bool]:
        async with AsyncClient(redis_url) as client:
            listed = [view.job_id for view in await client.dead()]
            return listed, (await client.retry("a")).id, await client.drop("b")

    listed, new_id, is_dropped = asyncio.run(use())
    assert (listed, is_dropped) == (dead, True)
    assert new_id


# the command


def test_list_and_show_tell_why(run: Run, dead: list[str]) -> None:
    listed = run("list")
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == dead
    assert "3 workers were lost" in listed.stdout
    rows = [json.loads(line) for line in run("list", "--json", "--limit", "1").stdout.splitlines()]
    assert [row["job_id"] for row in rows] == ["b"]
    assert json.loads(run("show", "a", "--json").stdout)["error"]["code"] == "poison_job"
    assert run("show", "nobody").exit_code == 2


def test_retry_prints_the_same_new_id_twice(run: Run, dead: list[str]) -> None:
    first, second = run("retry", "a"), run("retry", "a", "--json")
    assert json.loads(second.stdout) == {"job_id": "a", "retried_as": first.stdout.strip()}
    assert run("retry", "nobody").exit_code == 2


def test_all_of_them_at_once(run: Run, dead: list[str]) -> None:
    assert len(run("retry", "--all").stdout.splitlines()) == 2
    assert run("list").stdout == ""


def test_drop_forgets_and_says_so(run: Run, dead: list[str]) -> None:
    assert run("drop", "a").stdout == "a dropped\n"
    assert json.loads(run("drop", "a", "--json").stdout) == {"job_id": "a", "dropped": False}
    assert [line.split()[0] for line in run("list").stdout.splitlines()] == ["b"]


@pytest.mark.parametrize("arguments", [("retry",), ("drop",), ("drop", "a", "--all")])
def test_neither_ids_nor_all_is_wrong_usage(run: Run, redis_url: str, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
