"""Keys and tenants: who may call, what it sees, how much it may take."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from api_stub.client.client import Client
from api_stub.errors import InvalidSettings
from api_stub.gateway.keys import ANYBODY, KeyRing, check_host, digest_of, new_key
from api_stub.settings import GatewaySettings
from tests.gateway.service import Service, serving
from tests.gateway.test_jobs import QUESTION, submit
from tests.servers import RedisServer
from tests.unit.api_stub.workers import ScriptedWorker

KEYS = {name: new_key() for name in ("alice", "bob", "slow", "small", "narrow")}
OPTIONS = {"slow": "rate=3", "small": "in_flight=2", "narrow": "models=default,other buckets=media"}
ENTRIES = "; ".join(f"{name}:{digest_of(key)} {OPTIONS.get(name, '')}" for name, key in KEYS.items())


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


def ask(service: Service, name: str, **fields: object) -> httpx.Response:
    return service.http.post("/v1/jobs", json=QUESTION | fields, headers=as_(name))


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer vq_wrong"}, {"Authorization": "Basic YTpi"}])
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/queues", "/v1/jobs/x", "/v1/jobs/x/events"])
def test_without_a_key_nobody_gets_in(guarded: Service, path: str, headers: dict[str, str]) -> None:
    answer = guarded.http.get(path, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "vq_wrong" not in answer.text


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/uploads", "/v1/uploads/inline", "/v1/files", "/v1/batches"])
@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x"])
def test_a_strangers_body_is_not_waited_for(guarded: Service, path: str, content_type: str) -> None:
    address = urlsplit(guarded.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\nContent-Length: 1000\r\n\r\n"
        )
        connection.sendall(head.encode() + b"--x")
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_health_and_metrics_need_no_key(guarded: Service, path: str) -> None:
    assert guarded.http.get(path).status_code == 200


def test_a_keys_name_is_its_tenant_and_tenants_do_not_see_each_other(guarded: Service, worker: ScriptedWorker) -> None:
    job_id = ask(guarded, "alice").json()["job_id"]
    assert guarded.http.get(f"/v1/jobs/{job_id}", headers=as_("alice")).json()["tenant"] == "alice"
    for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("POST", "/retry")):
        answer = guarded.http.request(method, f"/v1/jobs/{job_id}{path}", headers=as_("bob"))
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_job")
    assert guarded.http.get("/v1/jobs?tenant=alice", headers=as_("bob")).json() == {"jobs": []}
    assert len(guarded.http.get("/v1/jobs", headers=as_("alice")).json()["jobs"]) == 1


def test_a_job_from_elsewhere_belongs_to_the_tenant_that_it_names(guarded: Service, redis_url: str) -> None:
    with Client(redis_url) as client:
        hers, nobodys = client.vqa(question="What?", tenant="alice").id, client.vqa(question="What?").id
    assert guarded.http.get(f"/v1/jobs/{hers}", headers=as_("alice")).status_code == 200
    assert guarded.http.get(f"/v1/jobs/{hers}", headers=as_("bob")).status_code == 404
    assert guarded.http.get(f"/v1/jobs/{nobodys}", headers=as_("alice")).status_code == 404


def test_nobody_submits_for_another_tenant(guarded: Service) -> None:
    answer = ask(guarded, "alice", tenant="bob")
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (403, "tenant")
    assert ask(guarded, "alice", tenant="alice").status_code == 202


def test_the_same_idempotency_key_of_two_tenants_is_two_jobs(guarded: Service) -> None:
    answers = [
        guarded.http.post("/v1/jobs", json=QUESTION, headers=as_(name) | {"Idempotency-Key": "one"})
        for name in ("alice", "bob", "alice")
    ]
    hers, his, hers_again = [answer.json()["job_id"] for answer in answers]
    assert hers == hers_again != his


def test_a_rate_is_kept_and_says_when_to_come_back(guarded: Service) -> None:
    answers = [guarded.http.get("/v1/jobs", headers=as_("slow")) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[-1].json()["code"] == "rate_limited"
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 21
    assert guarded.http.get("/v1/jobs", headers=as_("alice")).status_code == 200


def test_replicas_count_together(guarded: Service, redis_url: str) -> None:
    with serving(redis_url, api_keys=ENTRIES) as replica:
        statuses = [s.http.get("/v1/jobs", headers=as_("slow")).status_code for s in (guarded, replica) * 2]
    assert statuses == [200, 200, 200, 429]


def test_unfinished_jobs_are_capped_and_finished_ones_make_room(guarded: Service, worker: ScriptedWorker) -> None:
    answers = [ask(guarded, "small") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert answers[-1].json()["code"] == "too_many_jobs"
    assert "Retry-After" in answers[-1].headers
    worker.answer(answers[0].json()["job_id"], "red")
    # A retry counts as well: one fits, the other does not.
    again = guarded.http.post(answers[0].json()["urls"]["retry"], headers=as_("small"))
    assert again.status_code == 202
    assert ask(guarded, "small").status_code == 429


def test_a_refused_job_takes_no_room(redis_url: str) -> None:
    with serving(redis_url, api_keys=ENTRIES, max_queued=1, api_models="default,other,third") as full:
        assert ask(full, "alice").status_code == 202
        answer = ask(full, "small")
        assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
        assert "Retry-After" in answer.headers
        assert ask(full, "small", model="other").status_code == 202
        assert ask(full, "small", model="third").status_code == 202


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"model": "third"}, "model"), ({"media": ["s3://media/a.png", "s3://private/b.png"]}, "media.1")],
)
def test_a_key_may_be_kept_to_models_and_buckets(guarded: Service, fields: dict[str, object], field: str) -> None:
    answer = ask(guarded, "narrow", **fields)
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert answer.json()["errors"][0]["field"] == field
    assert ask(guarded, "narrow", model="other", media=["s3://media/a.png"]).status_code == 202


@pytest.mark.parametrize("fields", [{"model": "third"}, {"model": "other", "media": ["s3://private/b.png"]}])
def test_a_retry_asks_again_what_a_key_may_use(
    guarded: Service, worker: ScriptedWorker, redis_url: str, fields: dict[str, Any]
) -> None:
    options = {name: value for name, value in fields.items() if name != "media"}
    with Client(redis_url) as client:
        job_id = client.vqa(*fields.get("media", ()), question="What?", tenant="narrow", **options).id
    worker.answer(job_id, "red")
    answer = guarded.http.post(f"/v1/jobs/{job_id}/retry", headers=as_("narrow"))
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    allowed = ask(guarded, "narrow", model="other").json()["job_id"]
    worker.answer(allowed, "red")
    assert guarded.http.post(f"/v1/jobs/{allowed}/retry", headers=as_("narrow")).status_code == 202


def test_no_secret_is_logged(guarded: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "api_stub"):
        ask(guarded, "alice", metadata={"secret": "in-the-body"})
        guarded.http.get("/v1/jobs?cursor=in-the-query", headers=as_("bob"))
        guarded.http.get("/v1/jobs", headers={"Authorization": "Bearer in-the-header"})
    records = [str(vars(record)) for record in caplog.records if record.name.startswith("api_stub.gateway")]
    assert any("alice" in record for record in records)
    for secret in ("in-the-body", "in-the-query", "in-the-header", KEYS["alice"], digest_of(KEYS["alice"])):
        assert not any(secret in record for record in records)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:8000"}, 200),
        ({"Origin": "http://localhost:8000", "Host": "localhost:8000"}, 200),
    ],
)
def test_without_keys_foreign_pages_do_not_get_in(service: Service, headers: dict[str, str], status: int) -> None:
    assert service.http.get("/v1/jobs", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("host", "is_open"), [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True)]
)
def test_without_keys_the_gateway_refuses_to_be_open(host: str, is_open: bool) -> None:
    settings = GatewaySettings(api_host=host)
    if not is_open:
        check_host(settings, KeyRing())
        return
    with pytest.raises(InvalidSettings, match=r"VISIONQ_API_HOST.*VISIONQ_API_KEYS"):
        check_host(settings, KeyRing())
    check_host(settings, KeyRing.load(GatewaySettings.model_validate({"api_keys": ENTRIES})))


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ("alice", "entry 1 is not NAME:SHA256"),
        (f"alice:{'0' * 63}", "entry 1 is not NAME:SHA256"),
        (f"alice:{'0' * 64} rate=fast", "key 'alice': rate is not a number"),
        (f"alice:{'0' * 64} colour=red", "'colour' is none of"),
        (f"alice:{'0' * 64} models=A!", "not a model name"),
        (f"alice:{'0' * 64} role=king", "key 'alice': role=king is unknown, the only role is operator"),
        (f"alice:{'0' * 64}; bob:{'0' * 64}", "two names"),
    ],
)
def test_a_wrong_entry_is_refused_by_its_place(entries: str, reason: str) -> None:
    with pytest.raises(InvalidSettings, match=f"VISIONQ_API_KEYS: .*{reason}") as refused:
        KeyRing.load(GatewaySettings.model_validate({"api_keys": entries}))
    assert "000000" not in str(refused.value)


def test_keys_may_lie_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nalice:{digest_of('a')} rate=5\n\nbob:{digest_of('b')}  # theirs\n")
    ring = KeyRing.load(GatewaySettings(api_keys_file=file, api_max_in_flight=9))
    alice, bob = ring.caller("a"), ring.caller("b")
    assert alice is not None
    assert bob is not None
    assert (alice.tenant, alice.rate_per_minute, alice.max_in_flight) == ("alice", 5, 9)
    assert bob.sees("bob")
    assert not bob.sees("alice")
    assert ring.caller("c") is None


def test_an_operator_is_a_key_with_the_role_and_everybody_without_keys() -> None:
    entries = f"alice:{digest_of('a')} role=operator rate=5; bob:{digest_of('b')}"
    ring = KeyRing.load(GatewaySettings.model_validate({"api_keys": entries}))
    alice, bob = ring.caller("a"), ring.caller("b")
    assert alice is not None
    assert bob is not None
    assert (alice.is_operator, bob.is_operator, ANYBODY.is_operator) == (True, False, True)
    assert not alice.sees("bob")


def test_cross_origin_calls_are_for_listed_origins_only(service: Service, redis_url: str) -> None:
    preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    assert "Access-Control-Allow-Origin" not in service.http.options("/v1/jobs", headers=preflight).headers
    with serving(redis_url, api_cors_origins="https://app.example") as running:
        allowed = running.http.options("/v1/jobs", headers=preflight)
        assert allowed.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert running.http.get("/v1/jobs", headers={"Origin": "https://app.example"}).status_code == 200
        foreign = running.http.options("/v1/jobs", headers=preflight | {"Origin": "https://evil.example"})
        assert "Access-Control-Allow-Origin" not in foreign.headers


def test_a_listed_origin_may_call_every_route_and_read_every_answer(redis_url: str) -> None:
    origin = {"Origin": "https://app.example"}
    sent = "authorization, content-type, idempotency-key, last-event-id, prefer, x-stainless-lang"
    with serving(redis_url, api_cors_origins="https://app.example", api_max_body_bytes=1024) as running:
        for path, operations in running.http.get("/openapi.json").json()["paths"].items():
            for method in operations:
                asked = {"Access-Control-Request-Method": method.upper(), "Access-Control-Request-Headers": sent}
                answer = running.http.options(path.replace("{", "").replace("}", ""), headers=origin | asked)
                assert (answer.status_code, method, path) == (200, method, path)
                assert answer.headers["Access-Control-Allow-Headers"] == sent
        submitted = running.http.post("/v1/jobs", json=QUESTION, headers=origin)
        exposed = submitted.headers["Access-Control-Expose-Headers"].split(", ")
        assert {"Location", "Retry-After", "Preference-Applied", "X-Should-Retry"} <= set(exposed)
        json_type = {"Content-Type": "application/json"}
        refused = httpx.post(f"{running.url}/v1/jobs", content=b" " * 2000, headers=origin | json_type)
        assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (413, "https://app.example")
        assert refused.headers["X-Frame-Options"] == "DENY"


def test_answers_carry_security_headers(service: Service) -> None:
    for path in ("/v1/jobs", "/nowhere", "/healthz"):
        headers = service.http.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert "server" not in headers
    submit(service)
