"""Fine-tuning is handed in through Redis and through a gateway; and who may do that over HTTP, and with what."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from api_stub.cli.errors import ExitStatus
from api_stub.cli.main import app
from api_stub.cli.training_bar import TrainingBar, figures_of
from api_stub.client.client import AsyncClient, Client
from api_stub.contract.event import JobProgress, Stage
from api_stub.contract.job import TaskName
from api_stub.contract.names import TRAINING_MODEL_NAME
from api_stub.contract.status import JobStatus
from api_stub.errors import InvalidRequest, InvalidSettings
from api_stub.gateway.keys import KeyRing, digest_of, new_key
from api_stub.ledger.ledger import Ledger
from api_stub.settings import GatewaySettings
from tests.gateway.service import Service, serving
from tests.servers import RedisServer
from tests.unit.api_stub.ledger_kit import answer, claimed

KEYS = {name: new_key() for name in ("alice", "bob", "carol")}
OPTIONS = {"alice": "train=1", "bob": "", "carol": "train=1 models=other buckets=public"}
ENTRIES = "; ".join(f"{name}:{digest_of(key)} {OPTIONS[name]}" for name, key in KEYS.items())
ROOT = "s3://media/training/"
BODY: dict[str, Any] = {
    "task": "visionq.finetune", "base": "default", "dataset": "s3://public/colours/", "output": f"{ROOT}alice/run/",
    "options": {"max_steps": 5},
}  # fmt: skip


@pytest.fixture(scope="module")
def closed_gateway(redis_server: RedisServer) -> Iterator[Service]:
    with serving(redis_server.url, api_keys=ENTRIES, api_models="default,training") as running:
        yield running


@pytest.fixture
def guarded(closed_gateway: Service, redis_url: str) -> Service:
    """A gateway with keys that knows the queue of fine-tuning."""
    return closed_gateway


def asked(service: Service, name: str, **changes: object) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEYS[name]}"}
    return httpx.post(f"{service.url}/v1/jobs", json=BODY | changes, headers=headers, timeout=20)


def test_a_key_that_may_train_writes_below_its_own_name(guarded: Service, ledger: Ledger) -> None:
    reply = asked(guarded, "alice")
    assert reply.status_code == 202, reply.text
    view = ledger.view(reply.json()["job_id"])
    assert view is not None
    assert (view.task, view.model, view.tenant) == (TaskName.FINETUNE, TRAINING_MODEL_NAME, "alice")
    below = {"base": f"{ROOT}alice/run/checkpoint-5/", "options": {"resume": f"{ROOT}alice/run/checkpoint-5"}}
    assert asked(guarded, "alice", **below).status_code == 202


REFUSED: dict[str, tuple[str, dict[str, object]]] = {
    "task: this key may not fine-tune": ("bob", {"output": f"{ROOT}bob/run/"}),
    f"output: must lie below {ROOT}alice/": ("alice", {"output": f"{ROOT}bob/run/"}),
    f"output: must lie below {ROOT}alice/ ": ("alice", {"output": f"{ROOT}alicia/run/"}),
    f"output: must lie below {ROOT}alice/  ": ("alice", {"output": "s3://media/elsewhere/"}),
    f"base: must lie below {ROOT}alice/": ("alice", {"base": f"{ROOT}bob/run/"}),
    f"options.resume: must lie below {ROOT}alice/": ("alice", {"options": {"resume": f"{ROOT}bob/run/"}}),
    "base: this key may not use the model 'default'": ("carol", {"output": f"{ROOT}carol/run/"}),
    "dataset: this key may not read from the bucket 'media'": (
        "carol", {"output": f"{ROOT}carol/run/", "base": "other", "dataset": "s3://media/colours/"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_key_may_not_do_is_forbidden(guarded: Service, words: str) -> None:
    name, changes = REFUSED[words]
    reply = asked(guarded, name, **changes)
    assert reply.status_code == 403, reply.text
    assert reply.json()["code"] == "forbidden"
    assert words.strip() in reply.json()["detail"]


def test_a_climbing_output_is_refused(guarded: Service) -> None:
    assert asked(guarded, "alice", output=f"{ROOT}alice/../bob/").status_code == 422


def test_the_queue_of_fine_tuning_is_no_model(guarded: Service) -> None:
    headers = {"Authorization": f"Bearer {KEYS['alice']}"}
    models = httpx.get(f"{guarded.url}/v1/models", headers=headers, timeout=20).json()["data"]
    assert [model["id"] for model in models] == ["default"]
    chat = {"model": "training", "messages": [{"role": "user", "content": "Hello?"}]}
    reply = httpx.post(f"{guarded.url}/v1/chat/completions", json=chat, headers=headers, timeout=20)
    assert reply.status_code == 404


def test_nobody_trains_where_no_trainer_has_been(service: Service) -> None:
    reply = httpx.post(f"{service.url}/v1/jobs", json=BODY, timeout=20)
    assert reply.status_code == 404
    assert "visionq-worker start --training" in reply.json()["detail"]


def test_a_keys_right_to_train_is_1_or_absent() -> None:
    entry = f"alice:{digest_of(KEYS['alice'])} train=yes"
    with pytest.raises(InvalidSettings, match="train=yes is unknown, the only value is 1"):
        KeyRing.load(GatewaySettings(api_keys=entry))  # type: ignore[arg-type]


def test_clients_hand_in_the_same_job_wherever_they_go(client: Client, url: str, ledger: Ledger) -> None:
    ledger.loading(TRAINING_MODEL_NAME)  # a trainer has been there
    job = client.finetune("default", dataset="s3://media/data", output=f"{ROOT}run", method="lora", lora_rank=8)
    with pytest.raises(InvalidRequest, match=r"options.lora_rank: not with method full"):
        client.finetune("default", dataset="s3://media/data", output=f"{ROOT}run", lora_rank=8)

    async def again() -> str:
        async with AsyncClient(url) as other:
            handle = await other.finetune(
                "default", dataset="s3://media/data/", output=f"{ROOT}run/", method="lora", lora_rank=8, job_id=job.id
            )
        return handle.id

    assert asyncio.run(again()) == job.id  # the same id and body is the same job
    claim = claimed(ledger, job.id)
    body = answer(claim, "")
    more = {"output_uri": f"{ROOT}run/", "checkpoint": "ab", "metrics": {"wer": 0.5}, "steps": 5}
    ledger.finish(job.id, claim.fence, body.model_copy(update={"result": body.result.model_copy(update=more)}))
    result = job.result(timeout=20)
    assert (result.text, result.output_uri, result.metrics, result.steps) == ("", f"{ROOT}run/", {"wer": 0.5}, 5)


def test_the_command_line_hands_a_job_in(redis_url: str, ledger: Ledger) -> None:
    job_id = str(uuid.uuid4())
    arguments = ["finetune", "s3://media/data/", "--base", "demo", "--output", f"{ROOT}run/", "--max-steps", "5"]
    done = CliRunner().invoke(app, [*arguments, "--job-id", job_id, "--timeout", "0.2", "--url", redis_url])
    assert done.exit_code == ExitStatus.TIMED_OUT, done.output
    view = ledger.view(job_id)
    assert view is not None
    assert (view.task, view.status) == (TaskName.FINETUNE, JobStatus.QUEUED)
    wrong = CliRunner().invoke(app, [*arguments, "--epochs", "2", "--url", redis_url])
    assert wrong.exit_code == ExitStatus.INVALID
    assert "epochs: not beside max_steps" in wrong.output


def test_a_terminal_shows_steps_figures_and_the_time_that_is_left() -> None:
    console = Console(record=True, width=120, force_terminal=True)
    bar = TrainingBar(console)
    metrics = {"loss": 1.25, "eta_s": 3725.0}
    bar.show(
        JobProgress(job_id="a", seq=3, attempt=1, ts=1.0, stage=Stage.TRAINING, done=50, total=250, metrics=metrics)
    )
    bar.complete()
    shown = console.export_text()
    assert "250/250" in shown
    assert figures_of(metrics) == "loss 1.25, 1:02:05 left"
    assert "loss 1.25" in shown
