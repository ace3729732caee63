"""`docs/how-it-works.md` lists the files that a job, a token and an HTTP completion pass; here a real run is traced.

A gateway and a worker run in one fresh process, in which nothing is cached yet, with the shipped model and a real Redis
and S3. A profile function notes the product's files in the order in which a thread, or a request's task, first enters a
function of each.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from types import FrameType

import pytest
import redis
from celery.exceptions import Ignore

from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.contract.job import TaskName
from api_stub.ledger.lua import Transition, script
from api_stub.ledger.settings import LedgerConfig
from api_stub.settings import ClientSettings
from tests.gateway.service import serving
from tests.servers import S3Server
from worker.bootstrap import build
from worker.broker.tasks import _JobTask
from worker.demo_model.draw import write_picture
from worker.demo_model.scenes import make_scene
from worker.jobs.entry import Entry
from worker.lifecycle.process import WorkerProcess
from worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-it-works.md"
MAX_ENGINE_FILES = 9
QUESTION = "Describe the image."


#: What is recorded: from a call of the first function to the return, or the call, of the second.
#: In one thread; for HTTP in one request's task, to its end.
MARKS = {
    "submit": ("api_stub/client/client.py vqa", "return api_stub/client/client.py vqa"),
    "job": ("worker/broker/tasks.py run", "call worker/streaming/output.py wait"),
    "step": ("worker/engine/core.py step", "return worker/engine/core.py step"),
    "publish": ("worker/streaming/publisher.py _add_step", "return worker/streaming/publisher.py _send_next"),
    "http": ("api_stub/gateway/middleware.py __call__", ""),
}


#: The page's headings above the lists.
HEADINGS = {
    "Submitting": "submit",
    "From the doorbell to the engine": "job",
    "One step of the engine": "step",
    "From the engine to the readers": "publish",
    "A chat completion": "http",
}


class Trace:
    """A profile function that keeps, for each of `names`, the files of every turn in the order of first entry."""

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()
        self.turns: dict[str, list[list[str]]] = {name: [] for name in MARKS}
        self._paths: dict[str, str | None] = {}
        self._running: dict[tuple[str, object], list[str]] = {}

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        if event not in ("call", "return") or not self.names:
            return
        path = self._path(frame.f_code.co_filename)
        if path is None:
            return
        place = f"{path} {frame.f_code.co_name}"
        for name in self.names:
            first, last = MARKS[name]
            key = (name, _task() if name == "http" else threading.get_ident())
            if event == "call" and place == first and key not in self._running:
                self._running[key] = []
            files = self._running.get(key)
            if files is None:
                continue
            if event == "call" and path not in files:
                files.append(path)
            if f"{event} {place}" == last:
                self.turns[name].append(self._running.pop(key))

    def keep_request_of(self, path: str) -> None:
        """Keep the recordings of requests that pass a file, now that all have ended."""
        self.turns["http"] = [files for (name, _), files in self._running.items() if name == "http" and path in files]

    def middle(self, name: str) -> list[str]:
        """Return the turn in the middle: the first and the last do more than the others."""
        return self.turns[name][len(self.turns[name]) // 2]

    def _path(self, filename: str) -> str | None:
        if filename not in self._paths:
            path = Path(filename)
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("api_stub", "worker")
            self._paths[filename] = str(path.relative_to(ROOT)) if inside else None
        return self._paths[filename]


def _task() -> object:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def load_scripts(commands: redis.Redis, *configs: LedgerConfig) -> None:
    """Load the ledger's and the gateway's scripts, whoever used this Redis before: the lists are a busy Redis'."""
    for file in (ROOT / "api_stub" / "gateway" / "scripts").glob("*.lua"):
        commands.script_load(file.read_text("utf-8"))
    for config in configs:
        for transition in Transition:
            commands.script_load(script(transition, config))


def handle_one(process: WorkerProcess) -> None:
    """Take the next doorbell off the queue, as Celery would, and run its task on this thread."""
    found = process.ledger.client.brpop(
        [names.queue_list("default", step) for step in names.PRIORITY_STEPS], timeout=30
    )
    assert found is not None, "no doorbell rang"
    job_id = str(json.loads(found[1])["headers"]["id"])
    with pytest.raises(Ignore):
        _JobTask(TaskName.VQA, process, lambda: None).run(
            Entry(job_id, TaskName.VQA.value, 6, is_doorbell=True).to_json()
        )


@pytest.fixture
def passed(redis_url: str, s3_server: S3Server, tmp_path: Path) -> dict[str, list[str]]:
    """The files that each part of a run passes, by the names of `HEADINGS`."""
    path = tmp_path / "how.png"
    write_picture(path, make_scene(Random(5), num_things=3))
    s3_server.client().put_object(Bucket="media", Key="how.png", Body=path.read_bytes())
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(traced, redis_url, s3_server.url).result(timeout=240)


def traced(redis_url: str, s3_url: str) -> dict[str, list[str]]:
    """Trace one vqa job about a picture, asked for over Redis, and one chat completion, asked for over HTTP."""
    settings = WorkerSettings(redis_url=redis_url, s3_endpoint_url=s3_url, torch_threads=1, decode_processes=1)
    trace = Trace()
    process = build(settings)
    threading.setprofile(trace)
    try:
        process.start()
        process.on_ready()
        with serving(redis_url, s3_url) as service, Client(redis_url) as client:
            load_scripts(
                process.ledger.client, process.ledger.config, ClientSettings().ledger, service.gateway.ledger.config
            )
            trace.names = frozenset(("submit", "job", "step", "publish"))
            sys.setprofile(trace)
            job = client.vqa("s3://media/how.png", question=QUESTION)
            sys.setprofile(None)
            _in_thread(lambda: handle_one(process)).join(120)
            result = job.result(timeout=60)
            assert result.usage.completion_tokens > 5, result
            trace.names = frozenset(("http",))
            thread = _in_thread(lambda: handle_one(process))
            body = {"model": "default", "messages": [{"role": "user", "content": QUESTION}]}
            assert service.http.post("/v1/chat/completions", json=body, timeout=120).status_code == 200
            thread.join(120)
    finally:
        trace.names = frozenset()
        threading.setprofile(None)
        process.stop()
    trace.keep_request_of("api_stub/gateway/openai/routes.py")
    return {name: trace.middle(name) for name in HEADINGS.values()}


def _in_thread(run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def listed(heading: str) -> list[str]:
    """Return the files of the numbered list under a heading of the page."""
    section = PAGE.read_text().partition(f"\n### {heading}\n")[2].partition("\n#")[0]
    return re.findall(r"^\d+\. `([^`]+)`", section, flags=re.MULTILINE)


def test_the_page_lists_the_files_that_are_passed(passed: dict[str, list[str]]) -> None:
    for heading, name in HEADINGS.items():
        assert listed(heading) == passed[name], f"### {heading}"
    of_a_token = {*passed["step"], *passed["publish"]}
    assert len([path for path in of_a_token if path.startswith("worker/engine/")]) <= MAX_ENGINE_FILES
