"""The Celery tasks: whatever a message is and whatever becomes of its job, the message is answered and nothing escapes.

Celery's own tracer and request call the task and act on what it raises; the pipeline and the ledger behind it are real,
engine, media and prompts are fakes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final, cast

import pytest
import redis
from celery import Celery
from celery.app.trace import trace_task
from celery.worker.request import Request

from api_stub.contract.job import TaskName
from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobView
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.ledger_kit import claimed, doorbells_in, lose, lose_doorbells, question
from tests.unit.worker.jobs.fakes import FakeLedger, Worker
from worker.broker.tasks import register
from worker.errors import EngineDead, InvalidRequest, StorageUnavailable
from worker.jobs.circuit import CircuitState
from worker.jobs.claim import ClaimedJob, Claimer
from worker.jobs.entry import Entry
from worker.jobs.message import JobMessage
from worker.jobs.pipeline import Pipeline
from worker.lifecycle.admission import Admission
from worker.lifecycle.consumption import Consumption
from worker.lifecycle.process import WorkerProcess

PICTURE: Final = "s3://media/a.png"
QUESTION: Final[dict[str, object]] = {"question": "What colour is it?"}
#: What producers send: [args, kwargs, embed].
ASKED: Final = [[], QUESTION, {}]


class FakeProcess:
    """What the tasks use of a worker process."""

    def __init__(self, worker: Worker) -> None:
        self.consumption = Consumption(2)
        self.drain = worker.drain
        self.circuit = worker.circuit
        self.admission = Admission()
        self.metrics = worker.metrics
        self.refusals: list[str] = []
        self.claimer = Claimer(
            worker.ledger, worker="worker-1", model="default", on_refusal=lambda reason: self.refusals.append(reason)
        )
        self.pipeline: Pipeline | BrokenPipeline = worker.pipeline


class BrokenPipeline:
    """Raises `error` for every job."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def run(self, claimed: ClaimedJob) -> None:
        raise self._error


class BrokenClaimer(Claimer):
    """Finds no Redis."""

    def claim(self, message: JobMessage) -> ClaimedJob | None:
        raise redis.ConnectionError("away")


@dataclass
class Message:
    """A message as Celery has received it, and what it was answered with."""

    headers: dict[str, str]
    body: object
    answers: list[str] = field(default_factory=list)
    properties: dict[str, str] = field(default_factory=dict)
    delivery_info: dict[str, str] = field(default_factory=dict)


class Receiver:
    """Runs messages as a thread of Celery's pool does."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.process = FakeProcess(worker)
        self.num_linked = 0
        self._app = Celery("test", broker="memory://", backend="cache+memory://", set_as_current=False)
        register(self._app, cast("WorkerProcess", self.process), self._note_linked)

    def take(self, entry: Entry, task: TaskName = TaskName.VQA) -> list[str]:
        """Run the task of an entry and return the answers to its message; nothing may escape."""
        kwargs = {"entry": entry.to_json()}
        message = Message({"id": entry.job_id or str(uuid.uuid4()), "task": task.value}, [[], kwargs, {}])
        request = Request(
            message,
            app=self._app,
            decoded=True,
            on_ack=lambda *_: message.answers.append("acknowledged"),
            on_reject=lambda _log, _errors, requeue: message.answers.append("requeued" if requeue else "dropped"),
        )
        served = self._app.tasks[task.value]
        result, info, runtime, text = trace_task(served, request.id, (), kwargs, dict(message.headers), app=self._app)
        request.on_success((1, result, runtime) if info else (0, text, runtime))
        assert self.process.consumption.num_free == 2, "the thread is free again"
        stored = self._app.backend.get(self._app.backend.get_key_for_task(request.id))
        assert stored is None, "the ledger stores results, Celery none"
        return message.answers

    def doorbell(self) -> Entry:
        """Submit a job about one picture and take its doorbell off the list."""
        job_id = str(uuid.uuid4())
        self.worker.ledger.submit(job_id, question(media=(PICTURE,)).resolved(job_id))
        lose_doorbells(self.worker.ledger.client)
        return Entry(job_id, TaskName.VQA.value, 6, is_doorbell=True)

    def view(self, entry: Entry) -> JobView:
        return self.worker.view(str(entry.job_id))

    def _note_linked(self) -> None:
        self.num_linked += 1


def plain(body: object, task: str = TaskName.VQA.value, **fields: Any) -> Entry:
    """A message with its job in it; `body` is written as JSON unless it is a text."""
    text = body if isinstance(body, str) else json.dumps(body)
    return Entry(str(uuid.uuid4()), task, 6, body=text, content_type="application/json", **fields)


@pytest.fixture
def receiver(redis_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    caplog.set_level("INFO")
    monkeypatch.setattr("worker.jobs.pipeline.FLUSH_TIMEOUT_S", 0.3)
    monkeypatch.setattr("worker.jobs.settle.FLUSH_TIMEOUT_S", 0.3)
    monkeypatch.setattr("worker.jobs.pipeline.WAIT_S", 0.05)
    monkeypatch.setattr("worker.jobs.settle.LOOK_S", 0.05)
    config = LedgerConfig()
    with closing(FakeLedger(Ledger.connect(redis_url, config).client, config)) as ledger:
        worker = Worker(ledger)
        worker.publisher.start()
        yield Receiver(worker)
        worker.publisher.stop(10)


@pytest.mark.parametrize("task", [task for task in TaskName if task is not TaskName.FINETUNE])
def test_a_plain_message_is_answered_and_acknowledged(task: TaskName, receiver: Receiver) -> None:
    media: dict[str, object] = {"media": [PICTURE]}
    entry = plain([[], media if task is TaskName.CAPTION else media | QUESTION, {}], task.value)
    assert receiver.take(entry, task) == ["acknowledged"]
    assert receiver.view(entry).status is JobStatus.COMPLETED


def test_a_doorbell_is_answered_and_acknowledged(receiver: Receiver) -> None:
    entry = receiver.doorbell()
    assert receiver.take(entry) == ["acknowledged"]
    assert receiver.view(entry).status is JobStatus.COMPLETED


TRAINING = {"base": "demo", "dataset": "s3://media/data/", "output": "s3://media/training/run/"}
CHORD = {"task": "sum", "args": [], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": False}


@pytest.mark.parametrize(
    ("entry", "code", "said"),
    [
        (plain([[], {}, {}]), "invalid_request", "question"),
        (plain([["What colour is it?"], {}, {}]), "invalid_request", "args: 1 positional arguments"),
        (plain([[], None, {}]), "invalid_request", "kwargs"),
        (plain("%&/"), "invalid_request", "no JSON"),
        (plain("[" * 50_000), "invalid_request", "nested too deep"),
        (plain("7"), "invalid_request", "job: the message's body is not [args, kwargs"),
        (plain([[], QUESTION, {"chord": CHORD}]), "invalid_request", "chord: not served here"),
        (plain(ASKED, "visionq.paint"), "invalid_request", "task: 'visionq.paint' is not served here"),
        (plain([[], {"question": "What?", "colour": "red"}, {}]), "invalid_request", "colour"),
        (plain([[], {"question": "What?", "model": "other"}, {}]), "model_mismatch", "'other'"),
        (plain([[], TRAINING, {}], "visionq.finetune"), "invalid_request", "model: Input should be 'training'"),
        (plain([[], TRAINING | {"model": "training"}, {}], "visionq.finetune"), "model_mismatch", "'training'"),
    ],
)
def test_a_message_that_is_no_job_of_this_worker_fails_its_job_and_is_acknowledged(
    entry: Entry, code: str, said: str, receiver: Receiver
) -> None:
    assert receiver.take(entry) == ["acknowledged"]
    view = receiver.view(entry)
    assert view.status is JobStatus.FAILED
    assert view.error is not None
    assert view.error.code == code
    assert said in view.error.message


def test_a_doorbell_of_an_unknown_job_is_acknowledged(receiver: Receiver) -> None:
    entry = Entry(str(uuid.uuid4()), TaskName.VQA.value, 6, is_doorbell=True)
    assert receiver.take(entry) == ["acknowledged"]
    assert receiver.process.refusals == ["unknown"]
    assert receiver.worker.ledger.view(str(entry.job_id)) is None


def test_a_second_doorbell_leaves_the_other_worker_s_claim_alone(receiver: Receiver) -> None:
    entry = receiver.doorbell()
    claim = claimed(receiver.worker.ledger, str(entry.job_id), "worker-2")
    assert receiver.take(entry) == ["acknowledged"]
    assert receiver.process.refusals == ["busy"]
    view = receiver.view(entry)
    assert (view.worker, view.attempt) == ("worker-2", claim.attempt)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Entry(None, None, 0, body="{}"), "no_id"),
        (Entry(None, None, 0, body="%&/"), "no_id"),
        (Entry("taken", "visionq.vqa", 6, body=json.dumps(ASKED)), "id_taken"),
    ],
)
def test_a_message_that_nobody_can_be_answered_for_is_dropped_and_counted(
    entry: Entry, reason: str, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.worker.ledger.submit("taken", question("Another one?").resolved("taken"))
    assert receiver.take(entry) == ["acknowledged"]
    assert [vars(record)["reason"] for record in caplog.records if record.message == "message dropped"] == [reason]
    assert receiver.worker.count("messages_dropped_total", reason=reason) == 1
    assert receiver.worker.view("taken").status is JobStatus.QUEUED


def fails(receiver: Receiver, _: Entry) -> None:
    receiver.worker.prompts.refusal = InvalidRequest("no")


def is_retried(receiver: Receiver, _: Entry) -> None:
    receiver.worker.media.error = StorageUnavailable("storage did not answer")


def is_cancelled(receiver: Receiver, entry: Entry) -> None:
    def cancel() -> None:
        receiver.worker.ledger.cancel(str(entry.job_id))
        receiver.worker.heartbeat.beat()

    receiver.worker.media.meanwhile = cancel


def is_lost(receiver: Receiver, entry: Entry) -> None:
    ledger, job_id = receiver.worker.ledger, str(entry.job_id)

    def take() -> None:
        lose(ledger, ledger.client, job_id)
        claimed(ledger, job_id, "worker-2")

    receiver.worker.media.meanwhile = take


def meets_a_dead_engine(receiver: Receiver, _: Entry) -> None:
    receiver.worker.engine.refusal = EngineDead("the engine has ended")


def cannot_be_settled(receiver: Receiver, _: Entry) -> None:
    receiver.worker.ledger.num_failures, receiver.worker.ledger.error = 1, redis.ResponseError("WRONGTYPE")


def breaks(receiver: Receiver, _: Entry) -> None:
    receiver.worker.prompts.error = ZeroDivisionError()


@pytest.mark.parametrize("is_doorbell", [True, False], ids=["doorbell", "plain"])
@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (fails, "failed"), (is_retried, "queued"), (is_cancelled, "cancelled"), (is_lost, "in_progress"),
        (meets_a_dead_engine, "queued"), (cannot_be_settled, "in_progress"), (breaks, "queued"),
    ],
)  # fmt: skip
def test_a_message_is_acknowledged_whatever_becomes_of_its_job(
    spoil: Callable[[Receiver, Entry], None], status: str, is_doorbell: bool, receiver: Receiver
) -> None:
    entry = receiver.doorbell() if is_doorbell else plain([[], QUESTION | {"media": [PICTURE]}, {}])
    spoil(receiver, entry)
    assert receiver.take(entry) == ["acknowledged"]
    assert receiver.view(entry).status == status


@pytest.mark.parametrize(
    "error",
    [SystemExit(1), KeyboardInterrupt(), GeneratorExit(), MemoryError(), RecursionError(), KeyError("a defect")],
    ids=repr,
)
@pytest.mark.parametrize("is_doorbell", [True, False], ids=["doorbell", "plain"])
def test_no_exception_escapes_and_its_message_is_acknowledged(
    is_doorbell: bool, error: BaseException, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.process.pipeline = BrokenPipeline(error)
    entry = receiver.doorbell() if is_doorbell else plain(ASKED)
    assert receiver.take(entry) == ["acknowledged"]
    (record,) = (record for record in caplog.records if record.message == "task failed")
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert receiver.view(entry).status is JobStatus.IN_PROGRESS, "a reaper finds it when its lease is over"


def test_an_exception_ends_the_turn_of_a_job_that_tries_an_open_circuit(receiver: Receiver) -> None:
    receiver.worker.open_circuit(is_due=True)
    receiver.process.pipeline = BrokenPipeline(SystemExit(1))
    receiver.take(receiver.doorbell())
    assert receiver.process.circuit.state is CircuitState.OPEN
    assert receiver.process.circuit.may_consume, "the next may try at once"


@pytest.mark.parametrize("is_doorbell", [True, False], ids=["doorbell", "plain"])
def test_without_redis_a_doorbell_is_acknowledged_and_a_plain_message_put_back(
    is_doorbell: bool, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.process.claimer = BrokenClaimer(receiver.worker.ledger, worker="worker-1", model="default")
    entry = receiver.doorbell() if is_doorbell else plain(ASKED)
    assert receiver.take(entry) == ["acknowledged" if is_doorbell else "requeued"]
    assert "message not handled" in caplog.messages


def drains(receiver: Receiver) -> None:
    receiver.process.drain.begin()


def is_sick(receiver: Receiver) -> None:
    receiver.worker.open_circuit()


@pytest.mark.parametrize("stop", [drains, is_sick])
def test_a_worker_that_takes_no_jobs_leaves_messages_to_others(
    stop: Callable[[Receiver], None], receiver: Receiver
) -> None:
    doorbell, other = receiver.doorbell(), plain(ASKED)
    stop(receiver)
    assert receiver.take(doorbell) == ["acknowledged"]
    assert doorbells_in(receiver.worker.ledger.client) == [doorbell.job_id], "rung again"
    assert receiver.take(other) == ["requeued"]
    assert receiver.worker.ledger.view(str(other.job_id)) is None, "nothing is adopted"
    assert receiver.view(doorbell).attempt == 0


def test_links_are_sent_after_their_message_and_no_other(receiver: Receiver) -> None:
    receiver.take(plain(ASKED))
    assert receiver.num_linked == 0
    receiver.take(plain([[], QUESTION, {"callbacks": [CHORD]}]))
    assert receiver.num_linked == 1
    receiver.take(plain([[], {"colour": "red"}, {"errbacks": [CHORD]}]))
    assert receiver.num_linked == 2, "also of a job that is refused"
