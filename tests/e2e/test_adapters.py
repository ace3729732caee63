"""One base answers for many: jobs name adapters that one worker serves, in one batch with jobs of the base alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from peft import PeftModel
from PIL import Image

from api_stub.client.client import Client
from api_stub.contract.event import JobStarted
from api_stub.errors import JobFailed
from tests.e2e.scenes import Question, stored_questions
from tests.e2e.test_swap import visionq
from tests.gateway.service import Service, serving
from tests.processes import WorkerProcess, start_workers
from tests.servers import RedisServer, S3Server
from tests.tiny.adapters import with_noisy_adapters
from tests.tiny.reference import Reference
from worker.demo_model import CHECKPOINT
from worker.models.digests import folder_digest

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

OWNERS = ("", "red", "green", "blue")
TARGETS = r".*text_model.*\.(q_proj|v_proj|down_proj)"
NUM_JOBS = 24
NUM_TOKENS = 12


@dataclass(frozen=True)
class Adapted:
    """The folders of three adapters of the shipped model, and what PEFT's own `generate` says with each."""

    folders: Mapping[str, Path]
    reference: Reference
    peft: PeftModel

    def answer(self, owner: str, question: Question) -> str:
        messages = self.reference.single_turn([Image.open(question.path)], question.text)
        if not owner:
            with self.peft.disable_adapter():
                return self.reference.answer(messages, NUM_TOKENS)
        self.peft.set_adapter(owner)
        return self.reference.answer(messages, NUM_TOKENS)

    def checkpoint(self, owner: str) -> str:
        base = folder_digest(CHECKPOINT)
        return f"{base}+{folder_digest(self.folders[owner])}" if owner else base


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    folder, reference = tmp_path_factory.mktemp("adapters"), Reference(CHECKPOINT)
    ranks = dict(zip(OWNERS[1:], (4, 2, 6), strict=True))
    peft = with_noisy_adapters(reference.model, ranks, targets=TARGETS, std=0.4, base="demo")
    peft.save_pretrained(folder, save_embedding_layers=False)
    reference.model = peft
    return Adapted({owner: folder / owner for owner in OWNERS[1:]}, reference, peft)


@pytest.fixture(scope="module")
def worker(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, s3_server: S3Server, adapted: Adapted
) -> Iterator[WorkerProcess]:
    pairs = ",".join(f"{owner}={folder}" for owner, folder in adapted.folders.items())
    folder = tmp_path_factory.mktemp("worker")
    settings = {"model": "demo", "model_name": "shared", "adapters": pairs, "lease_s": 6, "beat_s": 1}
    started = start_workers(1, folder, redis_server, s3_server, **settings)[0]
    yield started
    started.kill()


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> list[Question]:
    folder = tmp_path_factory.mktemp("questions")
    asked = stored_questions(s3_server.client(), folder, "--count", "12", "--seed", "3")
    return [question for question in asked if not question.uri.endswith(".mp4")][:NUM_JOBS]


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Client]:
    with Client(redis_server.url) as client:
        yield client


def name_of(owner: str) -> str:
    return f"shared:{owner}" if owner else "shared"


def test_jobs_of_three_adapters_and_of_the_base_get_each_its_own_answer(
    worker: WorkerProcess, adapted: Adapted, client: Client, questions: list[Question]
) -> None:
    owners = [OWNERS[number % 4] for number in range(len(questions))]
    options: dict[str, Any] = {"max_new_tokens": NUM_TOKENS}
    jobs = [
        client.vqa(question.uri, question=question.text, model=name_of(owner), **options)
        for owner, question in zip(owners, questions, strict=True)
    ]
    results = [job.result(timeout=120) for job in jobs]
    assert [result.text for result in results] == [
        adapted.answer(owner, question) for owner, question in zip(owners, questions, strict=True)
    ]
    assert len(jobs) == NUM_JOBS
    assert len({adapted.answer(owner, questions[0]) for owner in OWNERS}) == 4, "the adapters answer alike"
    assert [result.model for result in results] == list(map(name_of, owners))
    assert [result.checkpoint for result in results] == list(map(adapted.checkpoint, owners))
    for owner, job in zip(owners[:4], jobs[:4], strict=True):
        started = [event for event in job.events() if isinstance(event, JobStarted)]
        assert [(event.adapter, event.checkpoint) for event in started] == [(owner or None, adapted.checkpoint(owner))]
    again = client.retry(jobs[1].id)
    assert again.result(timeout=60).checkpoint == adapted.checkpoint(owners[1])


def test_a_job_for_an_adapter_that_is_not_served_is_told_which_are(worker: WorkerProcess, client: Client) -> None:
    job = client.vqa(question="hello", model="shared:violet")
    words = "no adapter 'violet' of 'shared' is served"
    with pytest.raises(JobFailed, match=words) as told:
        job.result(timeout=60)
    assert told.value.code == "invalid_request"
    assert [event.checkpoint for event in job.events() if isinstance(event, JobStarted)] == [None]


def test_plain_celery_names_an_adapter(worker: WorkerProcess, adapted: Adapted, redis_server: RedisServer) -> None:
    app = Celery(broker=redis_server.url, backend=redis_server.url)
    sent = app.send_task("visionq.vqa", kwargs={"question": "hello", "model": "shared:red"}, queue="visionq.shared")
    assert sent.get(timeout=60)["checkpoint"] == adapted.checkpoint("red")


def test_adapters_are_listed_and_asked_over_http(
    worker: WorkerProcess, redis_server: RedisServer, s3_server: S3Server
) -> None:
    with serving(redis_server.url, s3_server.url, api_models="") as service:
        found = [model["id"] for model in service.http.get("/v1/models").json()["data"]]
        listed = [name for name in found if name.startswith("shared")]  # others were served in this Redis before
        assert listed == ["shared", "shared:blue", "shared:green", "shared:red"]
        assert service.http.get("/v1/models/shared:red").json()["id"] == "shared:red"
        assert ask(service, "shared:red").json()["model"] == "shared:red"
        refused = ask(service, "shared:violet")
        assert refused.status_code == 400
        assert "no adapter 'violet' of 'shared' is served" in refused.json()["error"]["message"]
        assert ask(service, "unknown:red").status_code == 404
        job = {"task": "visionq.vqa", "question": "hello", "model": "shared:violet"}
        assert service.http.post("/v1/jobs", json=job).json()["code"] == "invalid_request"


def ask(service: Service, model: str) -> Any:
    return service.http.post(
        "/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": "hello"}]}
    )


def test_adapters_are_added_and_removed_while_the_worker_runs(
    adapted: Adapted, client: Client, questions: list[Question], redis_server: RedisServer, s3_server: S3Server,
    tmp_path: Path,
) -> None:  # fmt: skip
    settings = {"model": "demo", "model_name": "growing", "lease_s": 6, "beat_s": 0.5}
    worker = start_workers(1, tmp_path, redis_server, s3_server, **settings)[0]
    question, options = questions[0], {"max_new_tokens": NUM_TOKENS}
    try:
        added = visionq(redis_server, "adapters", "add", "growing", "green", str(adapted.folders["green"]))
        assert added.returncode == 0, added.stderr
        for owner, model in (("green", "growing:green"), ("", "growing")):
            job = client.vqa(question.uri, question=question.text, model=model, **options)
            result = job.result(timeout=60)
            assert result.text == adapted.answer(owner, question)
            assert result.checkpoint == adapted.checkpoint(owner)
        wrong = visionq(redis_server, "adapters", "add", "growing", "other", str(CHECKPOINT))
        assert wrong.returncode == 1, wrong.stdout
        assert "so it is no adapter" in wrong.stderr
        removed = visionq(redis_server, "adapters", "remove", "growing", "green")
        assert removed.returncode == 0, removed.stderr
        with pytest.raises(JobFailed, match="no adapter 'green' of 'growing' is served"):
            client.vqa(question.uri, question=question.text, model="growing:green", **options).result(timeout=60)
        assert client.vqa(question.uri, question=question.text, model="growing", **options).result(
            timeout=60
        ).text == adapted.answer("", question)
    finally:
        worker.kill()
