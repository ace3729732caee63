"""Requests made up from the OpenAPI document: no server error, and every answer as the document says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.internal.cache import LRUCache
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api_stub.gateway.app import create_app
from api_stub.gateway.keys import KeyRing
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from api_stub.settings import GatewaySettings
from tests.gateway.conftest import CREDENTIALS
from tests.gateway.openai_stack import eager_worker
from tests.gateway.service import Service, serving
from tests.gateway.test_jobs import submit
from tests.servers import RedisServer, S3Server
from tests.unit.api_stub.workers import ScriptedWorker

pytestmark = pytest.mark.check

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
]
MAX_EXAMPLES = 20
CHAT = "POST /v1/chat/completions"
FILES = "POST /v1/files"
#: Its worker answers at once; the other tests' jobs are not for it.
ANSWERED = "answered"


def operations() -> dict[str, schemathesis.APIOperation]:
    """Every operation by method and path, of a gateway without keys: nothing wrong may be sent in the place of one."""
    document = create_app(GatewaySettings(), KeyRing()).openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation.pop("security", None)
    found = schemathesis.openapi.from_dict(document).get_all_operations()
    return {operation.ok().label: operation.ok() for operation in found}


OPERATIONS = operations()


@pytest.fixture(scope="module")
def fuzzed_gateway(redis_server: RedisServer, s3_server: S3Server) -> Iterator[Service]:
    s3_server.client()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        with serving(redis_server.url, s3_server.url, api_max_wait_s=0.05) as running:
            yield running


@pytest.fixture
def job_ids(fuzzed_gateway: Service, redis_url: str) -> list[str]:
    """Jobs that exist: done, failed, and waiting for ever."""
    done, failed, waiting = (submit(fuzzed_gateway) for _ in range(3))
    ledger = Ledger.connect(redis_url, LedgerConfig())
    worker = ScriptedWorker(ledger)
    worker.answer(done, "a ", "red ", "circle")
    worker.take(failed)
    worker.fail()
    ledger.close()
    return [done, failed, waiting]


@pytest.fixture
def worker_of_chats(redis_url: str) -> Iterator[None]:
    with eager_worker(redis_url, ANSWERED):
        yield


def answerable(body: dict[str, Any], is_stream: bool) -> dict[str, Any]:
    """Leave a made-up chat its options, and let it reach the worker: a model that is there, one turn, real addresses.

    A deadline may have passed by right, which is a server error. The document's own example comes in, too: copy.
    """
    turn = body["messages"][0] | {"role": "user"}
    if not isinstance(turn["content"], str):
        turn["content"] = [with_address(part) for part in turn["content"]]
    options = {name: value for name, value in body.items() if is_stream or name != "stream_options"}
    return options | {"model": ANSWERED, "messages": [turn], "deadline_s": None, "stream": is_stream}


def with_address(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    return part if kind == "text" else part | {kind: part[kind] | {"url": "s3://media/some.bin"}}


def is_refused(case: schemathesis.Case) -> bool:
    """Say whether a wrong file is wrong for us: OpenAI's clients may send form fields that are not known here."""
    return not isinstance(case.body, dict) or "file" not in case.body or case.body.get("purpose") != "batch"


@pytest.fixture(autouse=True)
def _same_requests_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the constants of our modules, which Hypothesis draws too: of those that were imported by then."""
    monkeypatch.setattr(providers, "_get_local_constants", Constants)
    monkeypatch.setattr(providers, "CONSTANTS_CACHE", LRUCache(1024))


def wrong_files() -> list[object]:
    """What the fuzz sends in the place of a file."""
    made: list[object] = []

    @given(case=OPERATIONS[FILES].as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    @bounded
    def make(case: schemathesis.Case) -> None:
        made.append(case.body)

    make()
    return made


def test_the_requests_are_the_same_whatever_else_was_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = wrong_files()
    words = [f"word-{number}" for number in range(500)]
    (tmp_path / "more_words.py").write_text(f"WORDS = {words!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "more_words", importlib.import_module("more_words"))
    assert wrong_files() == before


@pytest.mark.usefixtures("worker_of_chats")
@pytest.mark.filterwarnings("ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning")
@pytest.mark.parametrize("label", OPERATIONS)
def test_every_answer_is_as_documented(fuzzed_gateway: Service, job_ids: list[str], label: str) -> None:
    operation = OPERATIONS[label]
    # A waiting job's stream does not end.
    known = st.sampled_from(job_ids[:2] if label.endswith("/events") else job_ids)
    valid = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
    invalid = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

    if label == FILES:
        invalid = invalid.filter(is_refused)
    kinds: set[str] = set()

    @given(case=valid, job_id=st.none() | known, is_answerable=st.booleans())
    @bounded
    def ask(case: schemathesis.Case, job_id: str | None, is_answerable: bool) -> None:
        if job_id is not None and "job_id" in case.path_parameters:
            case.path_parameters["job_id"] = job_id
        bodies = [case.body]
        if label == CHAT and (is_answerable or case.body["model"] == "default"):  # nobody serves the jobs above
            bodies = [answerable(case.body, is_stream) for is_stream in (False, True)]
        for body in bodies:
            case.body = body
            answer = case.call_and_validate(base_url=fuzzed_gateway.url, checks=CHECKS, timeout=30)
            if answer.status_code == HTTPStatus.OK:
                kinds.add(answer.headers["content-type"][0].partition(";")[0])

    @given(case=invalid)
    @bounded
    def ask_wrongly(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=fuzzed_gateway.url, checks=CHECKS, timeout=30)

    ask()
    assert label != CHAT or kinds == {"application/json", "text/event-stream"}
    if operation.body or any(True for _ in operation.iter_parameters()):
        ask_wrongly()


#: The same requests every time.
bounded = settings(
    max_examples=MAX_EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
