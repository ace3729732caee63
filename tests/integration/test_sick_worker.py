"""Decoders that cannot be started and a device that is too small for every prompt: the worker steps back, jobs wait."""

from __future__ import annotations

import errno
import io
import json
import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from celery.exceptions import Ignore, Reject
from PIL import Image
from torch import nn

from api_stub.contract import names
from api_stub.contract.job import TaskName, VqaJob
from api_stub.contract.sampling import SamplingParams
from api_stub.contract.view import JobView
from tests.servers import S3Server, eventually
from worker.bootstrap import build
from worker.broker.tasks import _JobTask
from worker.jobs.entry import Entry
from worker.lifecycle.process import WorkerProcess
from worker.media import decoders
from worker.models.loader import load
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NUM_JOBS = 12


class Device:
    """A pre-hook of the first decoder layer: steps of more tokens than `max_tokens` do not fit."""

    max_tokens = 1_000_000

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        if states.shape[1] > self.max_tokens:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")


class Worker:
    """A whole worker in this process; instead of Celery a thread takes messages off the lists."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self._task = _JobTask(TaskName.VQA, process, lambda: None)
        self._threads = ThreadPoolExecutor(process.settings.concurrency)
        self._is_over = threading.Event()
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        process.start()
        process.on_ready()
        self._receiver.start()

    def ask(self, number: int, question: str = "hello") -> str:
        """Submit a job about a picture and return its id."""
        job_id = str(uuid.uuid4())
        media = (f"s3://media/sick/{number}.png",)
        job = VqaJob(media=media, question=question, sampling=SamplingParams(max_new_tokens=2))
        self.process.ledger.submit(job_id, job.resolved(job_id))
        return job_id

    def view(self, job_id: str) -> JobView:
        view = self.process.ledger.view(job_id)
        assert view is not None
        return view

    def statuses(self, job_ids: list[str]) -> set[str]:
        return {self.view(job_id).status.value for job_id in job_ids}

    def stop(self) -> None:
        self._is_over.set()
        self._receiver.join(20)
        self.process.stop()
        self._threads.shutdown(cancel_futures=True)

    def _receive(self) -> None:
        lists = [names.queue_list("default", step) for step in names.PRIORITY_STEPS]
        while not self._is_over.is_set():
            if not self.process.circuit.may_consume:
                self._is_over.wait(0.1)
            elif (found := self.process.ledger.client.brpop(lists, timeout=0.2)) is not None:
                self._threads.submit(self._handle, *found)

    def _handle(self, place: str, message: str) -> None:
        job_id = str(json.loads(message)["headers"]["id"])
        try:
            self._task.run(Entry(job_id, TaskName.VQA.value, 6, is_doorbell=True).to_json())
        except Ignore:
            pass
        except Reject:
            self.process.ledger.client.rpush(place, message)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def worker(
    redis_url: str, s3_server: S3Server, s3_client: S3Client, device: Device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Worker]:
    for number in range(NUM_JOBS + 1):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (number, 0, 0)).save(file, "PNG")
        s3_client.put_object(Bucket="media", Key=f"sick/{number}.png", Body=file.getvalue())

    def load_onto_device(settings: WorkerSettings) -> object:
        loaded = load(settings)
        loaded.model.model.text_model.layers[0].register_forward_pre_hook(device, with_kwargs=True)
        return loaded

    monkeypatch.setattr("worker.bootstrap.load", load_onto_device)
    settings = WorkerSettings(
        redis_url=redis_url, s3_endpoint_url=s3_server.url, sweep_s=0.1, torch_threads=1, max_num_seqs=4,
        media_cache_bytes=0, decode_processes=1,
    )  # fmt: skip
    worker = Worker(build(settings))
    yield worker
    worker.stop()


def assert_it_steps_back(worker: Worker, part: str) -> list[str]:
    """Jobs are handed in, the worker falls sick, and all wait; return them."""
    job_ids = [worker.ask(number) for number in range(NUM_JOBS)]
    eventually(lambda: worker.process.circuit.reason, 90, "the worker is sick")
    assert worker.process.circuit.reason.startswith(f"{part}: ")
    report = worker.process.health.readiness()
    assert [problem for problem in report.problems if problem.startswith(f"sick of {part}")]
    assert worker.process.health.liveness().is_good
    assert worker.statuses(job_ids) <= {"queued", "in_progress"}
    return job_ids


def assert_it_is_well_again(worker: Worker, job_ids: list[str]) -> None:
    eventually(lambda: worker.statuses(job_ids) == {"completed"}, 120, "all jobs complete")
    assert worker.process.circuit.reason == ""
    assert worker.process.exit_status == 0


def test_a_worker_that_cannot_start_decoders_steps_back(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*_: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with monkeypatch.context() as patched:
        patched.setattr(decoders, "DecoderProcess", no_process)
        for pid in worker.process.decoders.pids:
            os.kill(pid, 9)
        job_ids = assert_it_steps_back(worker, "decoders")
    assert_it_is_well_again(worker, job_ids)


def test_a_worker_whose_device_holds_no_prompt_steps_back(worker: Worker, device: Device) -> None:
    device.max_tokens = 0
    job_ids = assert_it_steps_back(worker, "engine")
    device.max_tokens = Device.max_tokens
    assert_it_is_well_again(worker, job_ids)


def test_jobs_that_do_not_fit_say_nothing_about_a_worker_that_answers_others(
    worker: Worker, device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    device.max_tokens = 300
    monkeypatch.setattr("worker.jobs.outcome.OOM_PAUSE_S", 0.05)
    job_ids = [worker.ask(number, question="Is this long? " * 100) for number in range(NUM_JOBS)]
    eventually(lambda: worker.statuses(job_ids) == {"failed"}, 120, "each ends by its own fault")
    assert {worker.view(job_id).error.code.value for job_id in job_ids} == {"out_of_memory"}  # type: ignore[union-attr]
    assert worker.process.circuit.reason == ""
    assert "worker tries a suspect component" in caplog.messages, "it was asked what it can do without a job"
    device.max_tokens = Device.max_tokens
    assert_it_is_well_again(worker, [worker.ask(0)])
