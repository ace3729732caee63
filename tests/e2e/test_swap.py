"""Running workers swap their checkpoint: no job fails, each answer is right for the checkpoint its result names."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from api_stub.client.client import Client
from api_stub.contract.conversation import MediaPart, Role, TextPart, Turn
from api_stub.contract.event import JobStarted
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.e2e.scenes import Question, stored_questions
from tests.gateway.service import serving
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server, eventually
from tests.tiny.reference import Reference
from worker.demo_model import CHECKPOINT
from worker.models.digests import folder_digest
from worker.training.manifest import describe_files

NUM_TOKENS = 12
MODEL = "swapped"
WAIT_S = 180.0


@dataclass(frozen=True)
class Judged:
    """A checkpoint, and what it says to each question by transformers alone."""

    folder: Path
    answers: Mapping[str, str]

    @property
    def digest(self) -> str:
        return folder_digest(self.folder)


def ask(folder: Path, questions: Sequence[Question]) -> dict[str, str]:
    reference = Reference(folder)
    return {
        name(question): reference.answer(reference.single_turn([Image.open(question.path)], question.text), NUM_TOKENS)
        for question in questions
    }


def name(question: Question) -> str:
    return f"{question.uri} {question.text}"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> list[Question]:
    folder = tmp_path_factory.mktemp("swap-questions")
    asked = stored_questions(s3_server.client(), folder, "--count", "8", "--seed", "5")
    return [question for question in asked if question.task == "vqa" and question.path.suffix == ".png"][:20]


@pytest.fixture(scope="module")
def first(questions: list[Question]) -> Judged:
    return Judged(CHECKPOINT, ask(CHECKPOINT, questions))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, questions: list[Question]) -> Judged:
    """The shipped model after a training that changed what it says, as a checkpoint with manifest and smoke set."""
    folder = tmp_path_factory.mktemp("second") / "checkpoint"
    copy_with(CHECKPOINT, folder, scale=1.0)
    answers = ask(folder, questions)
    write_manifest(folder, [(question, answers[name(question)]) for question in questions[:3]])
    return Judged(folder, answers)


def copy_with(source: Path, folder: Path, scale: float) -> None:
    """Copy a checkpoint and add noise to its weights."""
    shutil.copytree(source, folder)
    torch.manual_seed(2)
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        noisy = {key: each + scale * each.std() * torch.randn_like(each) if "layers" in key else each
                 for key, each in weights.items()}  # fmt: skip
        save_file(noisy, file, {"format": "pt"})


def write_manifest(folder: Path, right: Sequence[tuple[Question, str]]) -> None:
    smoke = [
        {
            "turns": [
                Turn(role=Role.USER, content=(MediaPart(uri=question.uri), TextPart(text=question.text))).model_dump()
            ],
            "pictures": [base64.b64encode(question.path.read_bytes()).decode()],
            "answers": [answer],
            "max_new_tokens": NUM_TOKENS,
        }
        for question, answer in right
    ]
    files = {file: entry.model_dump() for file, entry in describe_files(folder).items()}
    (folder / "manifest.json").write_text(json.dumps({"v": 1, "files": files, "smoke": smoke}, default=str))


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Client]:
    with Client(redis_server.url) as client:
        yield client


@pytest.fixture
def ledger(redis_server: RedisServer) -> Iterator[Ledger]:
    ledger = Ledger.connect(redis_server.url, LedgerConfig())
    yield ledger
    ledger.close()


@pytest.fixture
def fleet(tmp_path: Path, redis_server: RedisServer, s3_server: S3Server) -> Iterator[list[WorkerProcess]]:
    with redis_server.client() as raw:
        raw.flushdb()
    workers = start_fleet(2, tmp_path, redis_server, s3_server)
    yield workers
    for worker in workers:
        worker.kill()


#: What a setting can switch in the engine, on one worker or the other.
PATHS: Sequence[Mapping[str, object]] = ({"kv": "paged", "run_ahead": "on"}, {"kv": "slots"})


def start_fleet(count: int, directory: Path, redis_server: RedisServer, s3_server: S3Server) -> list[WorkerProcess]:
    settings: dict[str, object] = {"model": "demo", "model_name": MODEL, "lease_s": 6, "beat_s": 0.5}
    workers = [
        WorkerProcess(directory, redis_server.url, s3_server.url, **settings, **PATHS[number])
        for number in range(count)
    ]
    return [worker.wait_ready() for worker in workers]


def visionq(redis_server: RedisServer, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command as an operator does."""
    environment = {"VISIONQ_REDIS_URL": redis_server.url}
    return subprocess.run(
        [sys.executable, "-c", "from api_stub.cli.main import main; main()", "models", *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S + 60,
        check=False,
    )


def checkpoints(ledger: Ledger) -> set[str]:
    return {each.checkpoint for each in ledger.serving(MODEL).values()}


def right_answer(question: Question, checkpoint: str | None, *judged: Judged) -> str:
    return next(each.answers[name(question)] for each in judged if each.digest == checkpoint)


@pytest.mark.check
def test_500_jobs_go_through_a_promotion_and_a_rollback(
    fleet: list[WorkerProcess],
    client: Client,
    ledger: Ledger,
    redis_server: RedisServer,
    questions: list[Question],
    first: Judged,
    second: Judged,
) -> None:
    different = sum(first.answers[each] != second.answers[each] for each in first.answers)
    assert different >= len(questions) // 2, "the checkpoints answer alike"
    asked = [questions[number % len(questions)] for number in range(500)]
    is_changing = threading.Event()

    def submit(number: int) -> Any:
        if number >= 100:
            is_changing.wait(WAIT_S)
        if number >= 250:
            time.sleep(0.05 * (number - 250) / 8)
        question = asked[number]
        return client.vqa(question.uri, question=question.text, model=MODEL, max_new_tokens=NUM_TOKENS)

    with ThreadPoolExecutor(8) as pool:
        jobs = pool.map(submit, range(500))
        is_changing.set()
        promoted = visionq(redis_server, "promote", MODEL, str(second.folder))
        assert promoted.returncode == 0, promoted.stderr
        assert checkpoints(ledger) == {second.digest}
        back = visionq(redis_server, "rollback", MODEL)
        assert back.returncode == 0, back.stderr
        assert checkpoints(ledger) == {first.digest}
        results = [job.result(timeout=WAIT_S) for job in jobs]
    assert [result.text for result in results] == [
        right_answer(question, result.checkpoint, first, second)
        for question, result in zip(asked, results, strict=True)
    ]
    assert {result.checkpoint for result in results} == {first.digest, second.digest}
    assert ["starts again" in worker.text() for worker in fleet] == [False, False], "in the same tensors"


@pytest.mark.parametrize("fault", ["nan", "smoke", "digest", "file"])
def test_a_broken_checkpoint_is_given_up_and_nothing_fails(
    fault: str,
    fleet: list[WorkerProcess],
    client: Client,
    ledger: Ledger,
    redis_server: RedisServer,
    questions: list[Question],
    first: Judged,
    second: Judged,
    tmp_path: Path,
) -> None:
    folder, options, words = tmp_path / "broken", [], ""
    shutil.copytree(second.folder, folder)
    weights = folder / "model.safetensors"
    if fault == "nan":
        broken = load_file(weights)
        next(each for key, each in broken.items() if "layers" in key).view(-1)[0] = float("nan")
        save_file(broken, weights, {"format": "pt"})
        (folder / "manifest.json").unlink()
        words = "has values that are not finite"
    elif fault == "smoke":
        write_manifest(folder, [(questions[0], "a wrong answer")])
        words = "smoke set: question 1 is answered"
    elif fault == "digest":
        options, words = ["--digest", "ab" * 32], "the weights' digest is"
    else:
        copy_with(CHECKPOINT, tmp_path / "other", scale=1.2)
        shutil.copy(tmp_path / "other" / "model.safetensors", weights)
        words = "is not the file that its manifest.json names"
    stop = threading.Event()
    answered: list[Any] = []

    def keep_asking() -> None:
        while not stop.is_set():
            question = questions[len(answered) % len(questions)]
            job = client.vqa(question.uri, question=question.text, model=MODEL, max_new_tokens=NUM_TOKENS)
            answered.append((question, job.result(timeout=WAIT_S)))

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(keep_asking)
        promoted = visionq(redis_server, "promote", MODEL, str(folder), *options)
        stop.set()
        asking.result(WAIT_S)
    assert promoted.returncode == 1, promoted.stdout + promoted.stderr
    assert words in promoted.stderr
    eventually(lambda: {each.number for each in ledger.serving(MODEL).values()} == {2}, 30.0, "all know it")
    assert checkpoints(ledger) == {first.digest}
    asked = questions * 3  # so many that both workers take some
    jobs = [client.vqa(each.uri, question=each.text, model=MODEL, max_new_tokens=NUM_TOKENS) for each in asked]
    answered += [(each, job.result(timeout=60)) for each, job in zip(asked, jobs, strict=True)]
    started = {event.worker for job in jobs for event in job.events() if isinstance(event, JobStarted)}
    assert len(started) == 2
    for question, result in answered:
        assert (result.checkpoint, result.text) == (first.digest, first.answers[name(question)])


def test_a_worker_killed_in_the_middle_of_a_swap_is_followed_by_one_with_the_promoted_checkpoint(
    tmp_path: Path,
    client: Client,
    ledger: Ledger,
    redis_server: RedisServer,
    s3_server: S3Server,
    questions: list[Question],
    second: Judged,
) -> None:
    with redis_server.client() as raw:
        raw.flushdb()
    worker = start_fleet(1, tmp_path, redis_server, s3_server)[0]
    assert visionq(redis_server, "promote", MODEL, str(second.folder), "--no-wait").returncode == 0
    eventually(lambda: "something else is wanted" in worker.text(), 30.0, "the worker begins")
    worker.kill()
    following = start_fleet(1, tmp_path, redis_server, s3_server)[0]
    try:
        question = questions[0]
        job = client.vqa(question.uri, question=question.text, model=MODEL, max_new_tokens=NUM_TOKENS)
        result = job.result(timeout=60)
        assert (result.checkpoint, result.text) == (second.digest, second.answers[name(question)])
        wish = ledger.wish(MODEL)
        assert (wish.is_fulfilled, wish.weights.digest) == (True, second.digest)
    finally:
        following.kill()


def test_a_checkpoint_of_another_kind_restarts_the_worker_drained(
    tmp_path: Path, client: Client, ledger: Ledger, redis_server: RedisServer, s3_server: S3Server,
    questions: list[Question],
) -> None:  # fmt: skip
    with redis_server.client() as raw:
        raw.flushdb()
    worker = start_fleet(1, tmp_path, redis_server, s3_server)[0]
    try:
        done = visionq(redis_server, "promote", MODEL, "demo-captioner")
        assert done.returncode == 0, done.stderr + worker.text()[-3000:]
        assert "starts again for this" in worker.text()
        result = client.caption(questions[0].uri, model=MODEL).result(timeout=60)
        assert {result.checkpoint} == checkpoints(ledger)
        assert worker.process.poll() is None, "the same process"
        listed = visionq(redis_server, "list", "--json")
        assert json.loads(listed.stdout)["workers"][0]["source"] == "demo-captioner"
    finally:
        worker.kill()


def test_a_checkpoint_that_another_process_cannot_serve_is_given_up(
    tmp_path: Path, ledger: Ledger, client: Client, redis_server: RedisServer, s3_server: S3Server, first: Judged,
    questions: list[Question],
) -> None:  # fmt: skip
    """It loads and answers; what the operator has set does not fit it, which is found when the engine is made."""
    with redis_server.client() as raw:
        raw.flushdb()
    settings: dict[str, object] = {"model": "demo", "model_name": MODEL, "max_model_len": 1024, "beat_s": 0.5}
    worker = WorkerProcess(tmp_path, redis_server.url, s3_server.url, **settings).wait_ready()
    try:
        done = visionq(redis_server, "promote", MODEL, "demo-captioner")
        assert done.returncode == 1, done.stdout + worker.text()[-3000:]
        assert "VISIONQ_MAX_MODEL_LEN: 1024 is above the model's context of 256" in done.stderr
        eventually(lambda: checkpoints(ledger) == {first.digest}, 60.0, "the worker is back")
        question = questions[0]
        job = client.vqa(question.uri, question=question.text, model=MODEL, max_new_tokens=NUM_TOKENS)
        assert job.result(timeout=60).text == first.answers[name(question)]
        assert worker.process.poll() is None
    finally:
        worker.kill()


def test_other_files_at_the_same_place_are_another_checkpoint(
    tmp_path: Path, client: Client, ledger: Ledger, redis_server: RedisServer, s3_server: S3Server, second: Judged,
    questions: list[Question],
) -> None:  # fmt: skip
    with redis_server.client() as raw:
        raw.flushdb()
    place = tmp_path / "current"
    shutil.copytree(CHECKPOINT, place)
    settings: dict[str, object] = {"model": place, "model_name": MODEL, "beat_s": 0.5}
    worker = WorkerProcess(tmp_path, redis_server.url, s3_server.url, **settings).wait_ready()
    try:
        shutil.copytree(second.folder, place, dirs_exist_ok=True)
        assert visionq(redis_server, "promote", MODEL, str(place)).returncode == 0
        assert checkpoints(ledger) == {second.digest}
        question = questions[0]
        job = client.vqa(question.uri, question=question.text, model=MODEL, max_new_tokens=NUM_TOKENS)
        assert job.result(timeout=60).text == second.answers[name(question)]
    finally:
        worker.kill()


def test_a_worker_told_to_end_while_it_is_to_begin_anew_ends(
    tmp_path: Path, client: Client, redis_server: RedisServer, s3_server: S3Server
) -> None:
    with redis_server.client() as raw:
        raw.flushdb()
    worker = start_fleet(1, tmp_path, redis_server, s3_server)[0]
    try:
        job = client.vqa(question="hello", model=MODEL, max_new_tokens=1900, min_new_tokens=1900)
        eventually(lambda: job.status().status == "in_progress", 30.0, "the job runs")
        assert visionq(redis_server, "promote", MODEL, "demo-captioner", "--no-wait").returncode == 0
        eventually(lambda: '"draining"' in worker.text(), 60.0, "the worker lets its job end")
        assert job.status().status == "in_progress", "the job is over too early for this test"
        assert worker.terminate() == 0
        assert worker.text().count('"worker ready"') == 1
    finally:
        worker.kill()


def test_a_redis_that_comes_back_empty_learns_again_what_is_served(
    tmp_path: Path, ledger: Ledger, redis_server: RedisServer, s3_server: S3Server, second: Judged
) -> None:
    with redis_server.client() as raw:
        raw.flushdb()
    worker = start_fleet(1, tmp_path, redis_server, s3_server)[0]
    try:
        assert visionq(redis_server, "promote", MODEL, str(second.folder)).returncode == 0
        with redis_server.client() as raw:
            raw.flushdb()
        eventually(lambda: ledger.wish(MODEL).number == 1, 30.0, "it is written again")
        assert ledger.wish(MODEL).weights.source == str(second.folder)
        eventually(lambda: checkpoints(ledger) == {second.digest}, 30.0, "and served")
    finally:
        worker.kill()


def test_operators_promote_and_add_adapters_over_http_and_see_it(
    fleet: list[WorkerProcess], ledger: Ledger, redis_server: RedisServer, s3_server: S3Server, second: Judged
) -> None:
    with serving(redis_server.url, s3_server.url) as service:
        asked = {"checkpoint": str(second.folder), "digest": second.digest}
        reply = service.http.post(f"/v1/models/{MODEL}/promote", json=asked)
        assert reply.status_code == 202, reply.text
        assert (reply.json()["number"], reply.json()["source"]) == (1, str(second.folder))
        eventually(lambda: checkpoints(ledger) == {second.digest}, WAIT_S, "both serve it")
        assert service.http.post(f"/v1/models/{MODEL}/promote", json=asked).status_code == 409
        assert service.http.post(f"/v1/models/{MODEL}/rollback").status_code == 202
        eventually(lambda: second.digest not in checkpoints(ledger), WAIT_S, "both are back")
        assert service.http.post("/v1/models/other/rollback").status_code == 409
        shown = service.http.get("/v1/queues").json()["queues"]
        of_model = next(queue for queue in shown if queue["model"] == MODEL)
        assert [worker["source"] for worker in of_model["serving"]] == ["demo", "demo"]
