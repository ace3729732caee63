"""Webhooks that are never sent: what a gateway with the rules that it has by itself refuses, and when."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest
import redis

from api_stub.contract.job import TaskName, parse_job
from api_stub.errors import InvalidSettings
from api_stub.gateway.app import create_app
from api_stub.gateway.keys import KeyRing
from api_stub.settings import GatewaySettings
from tests.gateway.receiver import receiving
from tests.gateway.service import Service, serving
from tests.gateway.test_jobs import QUESTION
from tests.gateway.test_webhooks import given_up
from tests.servers import eventually
from tests.unit.api_stub.workers import ScriptedWorker

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/", "https is required"),
        ("https://127.0.0.1/", "not a public one"),
        ("https://2130706433/", "not a public one"),
        ("https://0177.0.0.1/", "not a public one"),
        ("https://[::1]/", "not a public one"),
        ("https://[::ffff:10.0.0.1]/", "not a public one"),
        ("https://169.254.169.254/latest", "not a public one"),
        ("https://api.localhost/", "this machine"),
        ("https://user:hunter2@example.com/", "user name"),
        ("https://example.com:6379/", "port 6379"),
    ],
)
def test_an_address_that_nothing_is_sent_to_is_refused_at_once(guarded: Service, url: str, reason: str) -> None:
    answer = guarded.http.post("/v1/jobs", json=QUESTION | {"webhook": {"url": url}})
    problem = answer.json()
    assert (answer.status_code, problem["errors"][0]["field"]) == (422, "webhook.url")
    assert reason in problem["detail"]
    assert "hunter2" not in answer.text


@pytest.fixture(scope="module")
def guarded(redis_server: object) -> Iterator[Service]:
    """A gateway with the rules that it has by itself."""
    with serving(redis_server.url, webhook_secret=SECRET) as running:  # type: ignore[attr-defined]
        yield running


def test_an_address_that_was_not_checked_at_submit_is_refused_when_it_is_due(
    guarded: Service, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    with receiving() as receiver:
        job = parse_job({"question": "Why?", "webhook": {"url": receiver.url()}}, TaskName.VQA)
        worker.ledger.submit("past-the-gateway", job)
        worker.answer("past-the-gateway", "red")
        eventually(lambda: given_up(redis_client), what="it is given up")
        assert given_up(redis_client)[0]["reason"] == "refused: https is required"
        assert receiver.requests == []


@pytest.mark.parametrize("webhook", [{"url": "ftp://example.com/"}, {"url": "https://example.com/", "events": []},
                                     {"url": "https://example.com/", "events": ["output.delta"]}])  # fmt: skip
def test_a_webhook_that_breaks_the_contract_is_refused(guarded: Service, webhook: dict[str, object]) -> None:
    answer = guarded.http.post("/v1/jobs", json=QUESTION | {"webhook": webhook})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_without_a_secret_no_webhook_is_taken(open_gateway: Service, redis_url: str) -> None:
    answer = open_gateway.http.post("/v1/jobs", json=QUESTION | {"webhook": {"url": "https://example.com/"}})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "webhook")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("webhook_secret", "whsec_short"), ("webhook_ports", "99999"), ("webhook_allow_networks", "here"),
     ("webhook_delays_s", "5,-1"), ("api_keys", f"a:{'0' * 64} webhook_secret=nonsense")],
)  # fmt: skip
def test_a_wrong_setting_names_its_variable(setting: str, value: str) -> None:
    settings = GatewaySettings.model_validate({setting: value})
    with pytest.raises(InvalidSettings, match=f"VISIONQ_{setting.upper()}") as caught:
        create_app(settings, KeyRing.load(settings))
    assert "short" not in str(caught.value)
    assert "nonsense" not in str(caught.value)
