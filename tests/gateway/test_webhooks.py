"""Webhooks against a receiver: signed, tried again until they arrive, given up in the end."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
import trustme
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.contract.event import JobCompleted, parse_event
from api_stub.contract.job import TaskName, parse_job
from api_stub.doctor import examine
from api_stub.gateway.keys import digest_of
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.gateway.receiver import Received, Receiver, Reply, receiving
from tests.gateway.service import Service, serving
from tests.gateway.test_jobs import QUESTION
from tests.gateway.test_process import ApiProcess
from tests.servers import RedisServer, eventually, free_port
from tests.unit.api_stub.workers import ScriptedWorker

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"t" * 32).decode()
OPEN = {
    "webhook_secret": SECRET,
    "webhook_allow_http": True,
    "webhook_ports": "*",
    "webhook_allow_networks": "127.0.0.0/8",
    "webhook_delays_s": "0.1,0.1,0.1",
}


@pytest.fixture(scope="module")
def sending(redis_server: object) -> Iterator[Service]:
    """A gateway that may send to this machine."""
    with serving(redis_server.url, **OPEN) as running:  # type: ignore[attr-defined]
        yield running


@pytest.fixture
def service(sending: Service, redis_url: str) -> Service:
    return sending


def submit(service: Service, url: str, **fields: object) -> str:
    webhook = {"url": url} | ({"events": fields.pop("events")} if "events" in fields else {})
    answer = service.http.post("/v1/jobs", json=QUESTION | {"webhook": webhook} | fields)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job_id"])


def received(receiver: Receiver, num: int = 1) -> list[Received]:
    eventually(lambda: len(receiver.requests) >= num, what=f"{num} requests")
    return receiver.requests


def content(request: Received, secret: str = SECRET) -> dict[str, object]:
    """What a request says, if it bears a good signature."""
    verified: dict[str, object] = Webhook(secret).verify(request.body, request.headers)
    return verified


def given_up(client: redis.Redis) -> list[dict[str, object]]:
    return [json.loads(raw) for raw in client.lrange(names.GIVEN_UP_KEY, 0, -1)]


def settled(client: redis.Redis) -> None:
    eventually(lambda: client.zcard(names.DELIVERIES_KEY) == 0, what="every delivery is settled")
    assert not client.keys(names.delivery_key("*"))


def test_the_final_event_arrives_signed(service: Service, worker: ScriptedWorker, redis_client: redis.Redis) -> None:
    with receiving() as receiver:
        job_id = submit(service, receiver.url(), metadata={"type": "job.failed", "order": 7})
        result = worker.answer(job_id, "It is ", "rot ●")
        [request] = received(receiver)
        said = content(request)
        event = parse_event(json.dumps(said["data"]))
        assert isinstance(event, JobCompleted)
        assert (said["type"], event.result, event.seq) == ("job.completed", result, 5)
        sent_at = datetime.fromisoformat(str(said["timestamp"]))
        assert abs(sent_at - datetime.fromtimestamp(event.ts, UTC)) < timedelta(milliseconds=1)
        assert request.headers["content-type"] == "application/json"
        with pytest.raises(WebhookVerificationError):
            content(request, OTHER_SECRET)
        settled(redis_client)
        assert len(receiver.requests) == 1


def test_every_end_and_the_other_events_that_were_asked_for_arrive(service: Service, worker: ScriptedWorker) -> None:
    every = ["job.queued", "job.started", "job.retrying", "job.completed", "job.failed", "job.cancelled", "job.expired"]
    with receiving() as receiver:
        job_id = submit(service, receiver.url(), events=every)
        worker.take(job_id)
        worker.say("no ")
        worker.give_back()
        worker.ledger.reap()
        worker.take(job_id)
        worker.fail()
        service.http.post(f"/v1/jobs/{submit(service, receiver.url())}/cancel")
        requests = received(receiver, 6)
        kinds = sorted(str(content(request)["type"]) for request in requests)
        ours = ["job.failed", "job.queued", "job.retrying", "job.started", "job.started"]
        assert kinds == ["job.cancelled", *ours]
        assert len({request.headers["webhook-id"] for request in requests}) == 6


def test_a_failed_delivery_is_tried_again_with_the_same_id_and_body(
    service: Service, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    with receiving(Reply(500), Reply(302, {"Location": "/elsewhere"}), Reply(503, body=b"x" * 100_000)) as receiver:
        worker.answer(submit(service, receiver.url()), "red")
        requests = received(receiver, 4)
        assert {request.path for request in requests} == {"/hook"}  # no redirect was followed
        assert len({(request.headers["webhook-id"], request.body) for request in requests}) == 1
        assert [content(request)["type"] for request in requests] == ["job.completed"] * 4
        settled(redis_client)
        assert given_up(redis_client) == []


def test_a_delivery_that_never_arrives_is_given_up_and_told(
    service: Service, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    with receiving(*[Reply(500)] * 9) as receiver:
        job_id = submit(service, receiver.url())
        worker.answer(job_id, "red")
        eventually(lambda: given_up(redis_client), what="it is given up")
        [record] = given_up(redis_client)
        assert len(receiver.requests) == record["tries"] == 4
        assert (record["job_id"], record["type"], record["reason"]) == (job_id, "job.completed", "status 500")
        settled(redis_client)
    told = [f.message for f in examine(redis_client, LedgerConfig(), 1000) if f.check == "webhooks"]
    assert "1 deliveries were given up" in told
    assert f"job.completed of job {job_id}, after 4 tries: status 500" in told
    assert 'visionq_api_webhooks_total{outcome="given_up"}' in service.http.get("/metrics").text


def test_a_receiver_that_asks_for_time_gets_it(
    service: Service, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    with receiving(Reply(429, {"Retry-After": "3600"})) as receiver:
        worker.answer(submit(service, receiver.url()), "red")
        received(receiver)

        def waits_s() -> float:
            [(_, due)] = redis_client.zrange(names.DELIVERIES_KEY, 0, 0, withscores=True)
            return float(due) - redis_client.time()[0]

        eventually(lambda: waits_s() > 3000, what="it is due in an hour")
        assert waits_s() <= 3601


def test_an_address_that_is_gone_gets_nothing_more(
    service: Service, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    with receiving(Reply(410)) as receiver:
        for _ in range(2):
            num_before = len(given_up(redis_client))
            worker.answer(submit(service, receiver.url()), "red")
            eventually(lambda n=num_before: len(given_up(redis_client)) > n, what="it is given up")
        assert len(receiver.requests) == 1


def test_a_slow_receiver_stops_nobody_else(redis_url: str, worker: ScriptedWorker, redis_client: redis.Redis) -> None:
    options = OPEN | {"webhook_timeout_s": 3.0, "webhook_delays_s": ""}
    with (
        serving(redis_url, **options) as running,
        receiving() as quick,
        receiving(*[Reply(is_held=True)] * 9) as slow,
    ):
        for _ in range(6):
            worker.answer(submit(running, slow.url()), "red")
        received(slow, 4)
        worker.answer(submit(running, quick.url("localhost")), "red")
        received(quick)
        eventually(lambda: given_up(redis_client), 60, "its time is over")
        assert given_up(redis_client)[-1]["reason"] == "no answer within 3 s"


@pytest.fixture
def own_redis_url(tmp_path: Path) -> Iterator[str]:
    """A Redis whose deliveries no other test's gateway takes: it has another secret and other certificates."""
    server = RedisServer(tmp_path)
    yield server.url
    server.stop()


def test_two_secrets_sign_side_by_side_and_a_key_has_its_own(own_redis_url: str) -> None:
    keys = f"team:{digest_of('k')} webhook_secret={SECRET},{OTHER_SECRET}"
    with (
        serving(own_redis_url, **OPEN | {"api_keys": keys, "webhook_secret": ""}) as running,
        closing(Ledger.connect(own_redis_url, LedgerConfig())) as ledger,
        receiving() as receiver,
    ):
        running.http.headers["Authorization"] = "Bearer k"
        ScriptedWorker(ledger).answer(submit(running, receiver.url()), "red")
        [request] = received(receiver)
        assert content(request, SECRET) == content(request, OTHER_SECRET)
        assert len(request.headers["webhook-signature"].split()) == 2


def test_a_plain_celery_job_has_its_webhook(service: Service, worker: ScriptedWorker) -> None:
    with receiving() as receiver:
        job = parse_job({"question": "Why?", "webhook": {"url": receiver.url()}}, TaskName.VQA)
        worker.ledger.adopt("celery\njob", task=TaskName.VQA, model="default", job=job, priority=6)
        worker.answer("celery\njob", "red")
        assert content(received(receiver)[0])["type"] == "job.completed"


def test_a_job_that_is_tried_again_keeps_its_webhook(service: Service, worker: ScriptedWorker) -> None:
    with receiving() as receiver:
        worker.answer(submit(service, receiver.url()), "red")
        first = content(received(receiver)[0])["data"]
        new_id = service.http.post(f"/v1/jobs/{first['job_id']}/retry").json()["job_id"]  # type: ignore[index]
        worker.answer(new_id, "green")
        data = content(received(receiver, 2)[1])["data"]
        assert data["job_id"] == new_id  # type: ignore[index]


def test_a_delivery_survives_the_gateway_that_was_killed_at_it(
    redis_url: str, worker: ScriptedWorker, tmp_path: Path
) -> None:
    options = OPEN | {"webhook_timeout_s": 1.0, "webhook_delays_s": "1,0.1"}
    settings = {f"VISIONQ_{name.upper()}": str(value) for name, value in options.items()}
    with receiving(Reply(500)) as receiver:
        first = ApiProcess(redis_url, free_port(), tmp_path / "api.log", **settings)
        try:
            first.wait_ready()
            with Client(redis_url) as client:
                job = client.vqa(question="Why?", webhook={"url": receiver.url()})
            worker.answer(job.id, "red")
            received(receiver)
        finally:
            first.process.kill()
            first.process.wait(20)
        with serving(redis_url, **options):
            # Killed before it wrote the failure down, its lease must end first.
            eventually(lambda: len(receiver.requests) == 2, 60, "the next gateway tries again")
        before, after = receiver.requests
        assert before.headers["webhook-id"] == after.headers["webhook-id"]
        assert content(after)["type"] == "job.completed"


def test_two_gateways_deliver_once(service: Service, redis_url: str, worker: ScriptedWorker) -> None:
    client = redis.Redis.from_url(redis_url, decode_responses=True)
    with serving(redis_url, **OPEN), receiving() as receiver, client:
        for _ in range(20):
            worker.answer(submit(service, receiver.url()), "red")
        received(receiver, 20)
        settled(client)
        assert len({request.headers["webhook-id"] for request in receiver.requests}) == len(receiver.requests) == 20


def test_tls_asks_for_the_name_s_certificate(
    own_redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ssl

    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    ours, theirs = (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(2))
    authority.issue_cert("localhost").configure_cert(ours)
    authority.issue_cert("elsewhere.example").configure_cert(theirs)
    with (
        serving(own_redis_url, **OPEN | {"webhook_allow_http": False}) as running,
        closing(Ledger.connect(own_redis_url, LedgerConfig())) as ledger,
        closing(redis.Redis.from_url(own_redis_url, decode_responses=True)) as client,
        receiving(context=ours) as right,
        receiving(context=theirs) as wrong,
    ):
        worker = ScriptedWorker(ledger)
        worker.answer(submit(running, right.url("localhost")), "red")
        assert content(received(right)[0])["type"] == "job.completed"
        worker.answer(submit(running, wrong.url("localhost")), "red")
        eventually(lambda: given_up(client), what="it is given up")
        assert given_up(client)[0]["reason"] == "ConnectError"
        assert wrong.requests == []


def test_deliveries_that_nobody_takes_are_forgotten_in_the_end(ledger: Ledger, redis_client: redis.Redis) -> None:
    worker = ScriptedWorker(ledger)
    job = parse_job({"question": "Why?", "webhook": {"url": "https://example.com/"}}, TaskName.VQA)
    for job_id in ("old", "new"):
        ledger.submit(job_id, job)
    worker.answer("old", "red")
    [delivery] = redis_client.zrange(names.DELIVERIES_KEY, 0, -1)
    assert redis_client.ttl(names.delivery_key(delivery)) > 6 * 86_400
    redis_client.zadd(names.DELIVERIES_KEY, {delivery: redis_client.time()[0] - 8 * 86_400})
    worker.answer("new", "red")
    assert redis_client.zcard(names.DELIVERIES_KEY) == 1
