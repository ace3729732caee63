"""A request that does not fit into memory is tried again, then fails alone; the worker goes on."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
import torch
from torch import nn

from api_stub.contract import names
from api_stub.contract.job import TaskName, VqaJob
from api_stub.contract.sampling import SamplingParams
from api_stub.contract.view import JobView
from tests.servers import eventually
from worker.bootstrap import build
from worker.jobs import outcome
from worker.jobs.claim import JobMessage
from worker.lifecycle.process import WorkerProcess
from worker.settings import KVBackend, WorkerSettings

LONG_QUESTION = "Is this long? " * 40
LONG = 150  # tokens: the long question has more, the others have fewer


class Memory:
    """Stands for a device that is too small: a pre-hook of the first decoder layer that raises what torch raises."""

    def __init__(self) -> None:
        self.num_failures = 0
        self.is_too_large: Callable[[torch.Tensor], bool] = lambda states: False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        if self.num_failures and self.is_too_large(states):
            self.num_failures -= 1
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")


class Worker:
    """A whole worker in this process, its Celery apart: a thread takes messages off the lists, others handle them."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self._threads = ThreadPoolExecutor(16)
        self._is_over = threading.Event()
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        process.start()
        process.on_ready()
        self._receiver.start()

    def _receive(self) -> None:
        lists = [names.queue_list("default", step) for step in names.PRIORITY_STEPS]
        while not self._is_over.is_set():
            found = self.process.ledger.client.brpop(lists, timeout=0.2)
            if found is not None:
                job_id = str(json.loads(found[1])["headers"]["id"])
                self._threads.submit(self._handle, JobMessage(job_id, TaskName.VQA, 6, None))

    def ask(self, question: str) -> str:
        """Submit a job and return its id."""
        job_id = str(uuid.uuid4())
        sampling = SamplingParams(max_new_tokens=24, min_new_tokens=24)
        submission = self.process.ledger.submit(job_id, VqaJob(question=question, sampling=sampling).resolved(job_id))
        assert submission
        return job_id

    def ended(self, job_id: str) -> JobView:
        """Wait for a job's end."""
        eventually(lambda: self._view(job_id).finished_at is not None, 60, "the job ends")
        return self._view(job_id)

    def stop(self) -> None:
        self._is_over.set()
        self._receiver.join(20)
        self.process.stop()
        self._threads.shutdown(cancel_futures=True)

    def _view(self, job_id: str) -> JobView:
        view = self.process.ledger.view(job_id)
        assert view is not None
        return view

    def _handle(self, message: JobMessage) -> None:
        claimed = self.process.claimer.claim(message)
        if claimed is not None:
            self.process.pipeline.run(claimed)


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture(params=[KVBackend.SLOTS, KVBackend.PAGED])
def worker(
    request: pytest.FixtureRequest, redis_url: str, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Worker]:
    from worker.models.loader import load

    def load_into_little_memory(settings: WorkerSettings) -> object:
        loaded = load(settings)
        loaded.model.model.text_model.layers[0].register_forward_pre_hook(memory, with_kwargs=True)
        return loaded

    monkeypatch.setattr("worker.bootstrap.load", load_into_little_memory)
    monkeypatch.setattr(outcome, "OOM_PAUSE_S", 0.05)
    settings = WorkerSettings(
        redis_url=redis_url, sweep_s=0.1, torch_threads=1, max_num_seqs=8, kv_backend=request.param
    )
    worker = Worker(build(settings))
    yield worker
    worker.stop()


def retries(client: redis.Redis, job_id: str) -> list[str]:
    """Reasons of a job's retries."""
    events = [json.loads(fields["event"]) for _, fields in client.xrange(names.events_key(job_id))]
    return [event["reason"] for event in events if event["type"] == "job.retrying"]


def test_a_request_that_did_not_fit_once_is_tried_again(
    worker: Worker, memory: Memory, redis_client: redis.Redis
) -> None:
    memory.num_failures, memory.is_too_large = 1, lambda states: states.shape[1] >= LONG
    small = [worker.ask(f"hello {number}") for number in range(4)]
    large = worker.ask(LONG_QUESTION)
    view = worker.ended(large)
    # Among other prompts on paged blocks it only waits for the next step.
    attempts = {2} if worker.process.settings.kv_backend is KVBackend.SLOTS else {1, 2}
    assert view.status == "completed"
    assert view.attempt in attempts
    assert retries(redis_client, large) == ["out_of_memory"] * (view.attempt - 1)
    assert {(view.status, view.attempt) for view in map(worker.ended, small)} == {("completed", 1)}
    assert memory.num_failures == 0


def test_a_request_that_never_fits_fails_alone_and_the_worker_goes_on(
    worker: Worker, memory: Memory, redis_client: redis.Redis
) -> None:
    memory.num_failures, memory.is_too_large = 99, lambda states: states.shape[1] >= LONG
    large = worker.ask(LONG_QUESTION)
    small = [worker.ask(f"hello {number}") for number in range(4)]
    view = worker.ended(large)
    assert view.error is not None
    assert (view.status, view.attempt, view.error.code, view.error.retryable) == ("failed", 3, "out_of_memory", True)
    assert "GiB" not in view.error.message
    assert retries(redis_client, large) == ["out_of_memory"] * 2
    small.append(worker.ask("and afterwards?"))
    assert {(view.status, view.attempt) for view in map(worker.ended, small)} == {("completed", 1)}
    assert worker.process.exit_status == 0


def test_decode_steps_that_did_not_fit_cost_at_most_an_attempt_each(worker: Worker, memory: Memory) -> None:
    """Rows lose the youngest request of each, blocks let it wait."""
    memory.num_failures, memory.is_too_large = (
        3,
        lambda states: 2 < max(states.shape[:2]) <= 8 and min(states.shape[:2]) == 1,
    )
    ended = [worker.ended(job_id) for job_id in [worker.ask(f"hello {number}") for number in range(6)]]
    assert {view.status for view in ended} == {"completed"}
    num_retries = sum(view.attempt - 1 for view in ended)
    assert num_retries == (3 if worker.process.settings.kv_backend is KVBackend.SLOTS else 0)
    assert memory.num_failures == 0


def test_media_that_do_not_fit_into_memory_are_no_bug(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(worker.process.pipeline._prompts, "prepare", prepare)
        view = worker.ended(worker.ask("hello"))
    assert view.error is not None
    assert (view.attempt, view.error.code) == (3, "out_of_memory")
    assert worker.ended(worker.ask("hello")).status == "completed"
