"""Requests made up from the OpenAPI document: no server error, and every answer as the document says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
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
from api_stub.ledger.config import LedgerConfig
from api_stub.ledger.ledger import Ledger
from api_stub.settings import GatewaySettings
from tests.gateway.conftest import CREDENTIALS
from tests.gateway.service import Service, serving
from tests.gateway.test_jobs import submit
from tests.servers import RedisServer, S3Server
from tests.unit.api_stub.workers import ScriptedWorker

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
]
MAX_EXAMPLES = 20
#: Waits for an answer, and nobody answers here.
WAITING = {"POST /v1/chat/completions"}
#: OpenAI's clients may send what is not known here; such a form field is passed over.
LENIENT = {"POST /v1/files"}


def operations() -> dict[str, schemathesis.APIOperation]:
    """Every operation by method and path, of a gateway without keys: nothing wrong may be sent in the place of one."""
    document = create_app(GatewaySettings(), KeyRing()).openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation.pop("security", None)
    found = schemathesis.openapi.from_dict(document).get_all_operations()
    return {operation.ok().label: operation.ok() for operation in found if operation.ok().label not in WAITING}


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


@pytest.mark.filterwarnings("ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning")
@pytest.mark.parametrize("label", OPERATIONS)
def test_every_answer_is_as_documented(fuzzed_gateway: Service, job_ids: list[str], label: str) -> None:
    operation = OPERATIONS[label]
    # A waiting job's stream does not end.
    known = st.sampled_from(job_ids[:2] if label.endswith("/events") else job_ids)
    valid = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
    invalid = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

    @given(case=valid, job_id=st.none() | known)
    @bounded
    def ask(case: schemathesis.Case, job_id: str | None) -> None:
        if job_id is not None and "job_id" in case.path_parameters:
            case.path_parameters["job_id"] = job_id
        case.call_and_validate(base_url=fuzzed_gateway.url, checks=CHECKS, timeout=30)

    @given(case=invalid)
    @bounded
    def ask_wrongly(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=fuzzed_gateway.url, checks=CHECKS, timeout=30)

    ask()
    if label not in LENIENT and (operation.body or any(True for _ in operation.iter_parameters())):
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
