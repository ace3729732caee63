"""A gateway behind proxies: nginx with its defaults, below a path prefix, behind https, and with little patience."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from playwright.sync_api import expect

from api_stub import cursor
from api_stub.client.client import Client
from api_stub.errors import InvalidSettings
from api_stub.gateway.app import create_app
from api_stub.gateway.forwarded import TrustedProxies
from api_stub.gateway.keys import KeyRing
from api_stub.settings import GatewaySettings
from tests.gateway.browser import Watched, chromium
from tests.gateway.nginx import PREFIX, Nginx, nginx
from tests.gateway.openai_stack import eager_worker, in_background, openai_client
from tests.gateway.service import Service, sent_events, serving, text_of
from tests.gateway.test_jobs import QUESTION
from tests.gateway.test_openai_chat import HELLO
from tests.servers import eventually
from tests.unit.api_stub.workers import ScriptedWorker

PROBES = ("/healthz", "/readyz", "/metrics", "/")


@pytest.fixture(scope="module")
def proxy(open_gateway: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(open_gateway.url, tmp_path_factory.mktemp("nginx")) as running:
        yield running


@pytest.fixture(params=["stripped", "whole"])
def below(proxy: Nginx, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the gateway below a prefix, behind https."""
    monkeypatch.setenv("SSL_CERT_FILE", str(proxy.authority))
    return str(getattr(proxy, request.param))


def test_events_come_through_a_default_proxy_as_they_happen(
    service: Service, proxy: Nginx, worker: ScriptedWorker
) -> None:
    job_id = httpx.post(f"{proxy.plain}/v1/jobs", json=QUESTION, timeout=30).json()["job_id"]
    worker.take(job_id)
    with httpx.stream("GET", f"{proxy.plain}/v1/jobs/{job_id}/events", timeout=30) as answer:
        arriving = sent_events(answer.iter_lines())
        events = [next(arriving), next(arriving)]
        for piece in ("a ", "red ", "circle"):
            worker.say(piece)
            events.append(next(arriving))
            assert events[-1].data["text"] == piece
        worker.finish()
        events += arriving
    assert text_of(events) == "a red circle"
    assert events[-1].type == "job.completed"


def test_a_client_may_ask_to_wait_no_longer_than_proxies_do(service: Service, worker: ScriptedWorker) -> None:
    answers: list[httpx.Response] = []
    asking = {"json": QUESTION, "headers": {"Prefer": "wait=600"}, "timeout": 60}
    thread = in_background(lambda: answers.append(httpx.post(f"{service.url}/v1/jobs", **asking)))  # type: ignore[arg-type]
    eventually(lambda: service.http.get("/v1/jobs").json()["jobs"], what="the job is there")
    worker.answer(service.http.get("/v1/jobs").json()["jobs"][0]["job_id"], "red")
    thread.join(30)
    assert (answers[0].status_code, answers[0].headers["Preference-Applied"]) == (200, "wait=50")
    with pytest.raises(ValueError, match="less than or equal to 50"):
        GatewaySettings(api_max_wait_s=51)


@pytest.mark.parametrize(
    ("path", "plain"),
    [("/v1/jobs/", "/v1/jobs"), ("/v1/models/", "/v1/models"), ("/healthz/", "/healthz"), ("/v1/jobs//", None)],
)
def test_a_slash_at_the_end_is_never_redirected(service: Service, proxy: Nginx, path: str, plain: str | None) -> None:
    for url in (service.url, proxy.plain):
        answer = httpx.get(url + path, timeout=30, follow_redirects=False)
        assert answer.status_code == (200 if plain else 404)
        assert "Location" not in answer.headers
        if plain is not None:
            assert answer.json() == httpx.get(url + plain, timeout=30).json()


def test_a_job_goes_all_the_way_below_a_prefix(service: Service, below: str, worker: ScriptedWorker) -> None:
    answer = httpx.post(f"{below}/v1/jobs/", json=QUESTION, timeout=30)
    job = answer.json()
    path = f"{PREFIX}/v1/jobs/{job['job_id']}"
    assert (answer.status_code, answer.headers["Location"]) == (202, path)
    assert job["urls"] == {
        "self": path,
        "events": f"{path}/events",
        "cancel": f"{path}/cancel",
        "retry": f"{path}/retry",
    }
    assert httpx.get(f"{below}/v1/jobs", timeout=30).json()["jobs"][0]["urls"]["self"] == path
    worker.answer(job["job_id"], "a ", "red ", "circle")
    with httpx.stream("GET", urljoin(below, job["urls"]["events"]), timeout=30) as stream:
        assert text_of(list(sent_events(stream.iter_lines()))) == "a red circle"
    assert httpx.get(urljoin(below, answer.headers["Location"]), timeout=30).json()["status"] == "completed"
    again = httpx.post(urljoin(below, job["urls"]["retry"]), timeout=30)
    assert httpx.get(urljoin(below, again.headers["Location"]), timeout=30).json()["status"] == "queued"
    with Client(below) as client:
        assert "".join(client.job(job["job_id"]).stream(timeout=30)) == "a red circle"
    assert httpx.get(f"{below}/openapi.json", timeout=30).json()["servers"][0]["url"] == PREFIX


def test_refusals_keep_their_shape_below_a_prefix(service: Service, below: str) -> None:
    asked = {"model": "default", "messages": []}
    assert httpx.post(f"{below}/v1/chat/completions", json=asked, timeout=30).json()["error"]["param"] == "messages"
    assert httpx.get(f"{below}/v1/jobs/none", timeout=30).json()["code"] == "unknown_job"


def test_a_form_below_a_prefix_may_be_as_long_as_one_without(service: Service) -> None:
    form = {"file": ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(service.gateway.settings.api_max_body_bytes), "image/png")}
    for headers in ({}, {"X-Forwarded-Prefix": PREFIX}):
        assert service.http.post("/v1/uploads/inline", files=form, headers=headers).status_code == 201


def test_the_page_works_below_a_prefix(service: Service, proxy: Nginx, worker: ScriptedWorker) -> None:
    with chromium() as browser:
        watched = Watched(browser, ignore_https_errors=True)
        watched.page.goto(f"{proxy.stripped}/")
        watched.page.get_by_role("textbox", name="Question").fill("What colour?")
        watched.page.keyboard.press("Enter")
        eventually(lambda: service.http.get("/v1/jobs").json()["jobs"], what="the page hands a job in")
        worker.answer(service.http.get("/v1/jobs").json()["jobs"][0]["job_id"], "a red circle")
        expect(watched.page.locator(".answer[aria-busy=false]")).to_contain_text("a red circle")
        watched.context.close()
    assert watched.errors == []


@pytest.mark.parametrize("trusted", ["", "10.0.0.0/8", "::1"])
def test_others_than_the_listed_proxies_are_not_believed(redis_url: str, trusted: str) -> None:
    forged = {"X-Forwarded-Prefix": "/forged", "X-Forwarded-Host": "forged.example", "X-Forwarded-Proto": "https"}
    with serving(redis_url, api_trusted_proxies=trusted) as service:
        answer = service.http.post("/v1/jobs", json=QUESTION, headers=forged)
    assert (answer.status_code, answer.headers["Location"]) == (202, f"/v1/jobs/{answer.json()['job_id']}")


@pytest.mark.parametrize(
    "prefix", ["//evil.example", "/a//b", "a", "/a?b", "/a#b", "/a\\b", "https://evil.example", "/"]
)
def test_a_prefix_that_is_no_path_is_no_prefix(service: Service, prefix: str) -> None:
    answer = service.http.post("/v1/jobs", json=QUESTION, headers={"X-Forwarded-Prefix": prefix})
    assert answer.headers["Location"] == f"/v1/jobs/{answer.json()['job_id']}"


@pytest.mark.parametrize(
    ("prefix", "path"),
    [
        ("/v1", "/v1"),
        ("/outer, /inner", "/outer/inner"),
        ("/vision/", "/vision"),
        ("/static", "/static"),
    ],
)
def test_any_path_may_be_a_prefix(service: Service, prefix: str, path: str) -> None:
    headers = {"X-Forwarded-Prefix": prefix}
    answer = service.http.post("/v1/jobs", json=QUESTION, headers=headers)
    assert answer.headers["Location"] == f"{path}/v1/jobs/{answer.json()['job_id']}"
    assert service.http.get("/static/main.js", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "forwarded", "status"),
    [
        ("127.0.0.1", "localhost:8443", 200),
        ("127.0.0.1", "evil.example", 403),
        ("evil.example", "localhost", 403),
        ("evil.example", "127.0.0.1", 403),
        ("evil.example", "", 403),
    ],
)
def test_without_keys_a_forwarded_host_opens_nothing(service: Service, host: str, forwarded: str, status: int) -> None:
    headers = {"Host": host} | ({"X-Forwarded-Host": forwarded} if forwarded else {})
    assert service.http.get("/v1/jobs", headers=headers).status_code == status


def test_a_page_behind_https_calls_its_own_gateway(service: Service, below: str) -> None:
    origin = f"https://{urlsplit(below).netloc}"
    assert httpx.post(f"{below}/v1/jobs", json=QUESTION, headers={"Origin": origin}, timeout=30).status_code == 202
    foreign = {"Origin": "https://127.0.0.1:1"}
    assert httpx.post(f"{below}/v1/jobs", json=QUESTION, headers=foreign, timeout=30).status_code == 403


def test_trusted_proxies_are_addresses_networks_or_all() -> None:
    def trusts(text: str, client: tuple[str, int] | None) -> bool:
        return TrustedProxies.load(GatewaySettings(api_trusted_proxies=text)).trust(client)

    assert trusts("10.1.0.0/16, ::1", ("10.1.2.3", 5))
    assert trusts("10.1.0.0/16", ("::ffff:10.1.2.3", 5))
    assert trusts("*", None)
    assert not trusts("10.1.0.0/16", ("10.2.2.3", 5))
    assert not trusts("10.1.0.0/16", None)
    assert not trusts("0.0.0.0/0", ("a-name", 5))
    with pytest.raises(InvalidSettings, match="VISIONQ_API_TRUSTED_PROXIES: 'nginx'"):
        create_app(GatewaySettings(api_trusted_proxies="nginx"), KeyRing({}))


@pytest.mark.parametrize("path", PROBES)
def test_head_of_a_probe_is_its_status_without_a_body(service: Service, proxy: Nginx, path: str) -> None:
    for url in (service.url, proxy.plain):
        answer = httpx.head(url + path, timeout=30)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["Content-Type"] == httpx.get(url + path, timeout=30).headers["Content-Type"]


def test_whoever_waits_through_an_impatient_proxy_gets_the_one_answer(
    service: Service, proxy: Nginx, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that takes 14 s to begin. OpenAI's client repeats, ours asks to wait for less, a stream is taken up."""
    monkeypatch.setattr(cursor, "RECONNECT_S", 8.2)  # four times 2 s without an answer, and no fifth
    answers: dict[str, Any] = {}

    def complete() -> None:
        with openai_client(proxy.impatient, max_retries=3) as client:
            answers["openai"] = (
                client.chat.completions.create(model="default", messages=HELLO).choices[0].message.content
            )

    def wait() -> None:
        with Client(proxy.hasty) as client:
            answers["result"] = client.submit(saying("Hi")).result(timeout=60).text

    def stream() -> None:
        with Client(proxy.hasty) as client:
            answers["stream"] = "".join(client.submit(saying("Hey")).stream(timeout=60))

    with eager_worker(redis_url) as worker:
        worker.pause()
        threads = [in_background(wait), in_background(stream), in_background(complete)]
        time.sleep(14)  # what is waited for is a proxy's patience
        worker.go_on()
        for thread in threads:
            thread.join(60)
        assert answers == {"openai": "you said Hello?", "result": "you said Hi", "stream": "you said Hey"}
        assert list(worker.num_claims.values()) == [1, 1, 1]


def saying(text: str) -> dict[str, Any]:
    """A job of one turn."""
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    return {"task": "visionq.vqa", "messages": messages}
