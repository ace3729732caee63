"""`visionq demo` as a stranger runs it: true answers from the pipeline, and nothing left behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from api_stub.demo.tasks import LABELS
from tests.processes import ctrl_c_is_heard
from tests.servers import eventually
from tests.survivors import processes_of

Demo = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    """Starts demos whose temporary files lie in `tmp_path`."""
    running = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        with ctrl_c_is_heard():
            process = subprocess.Popen(
                [sys.executable, "-c", "from api_stub.cli.main import main; main()", "demo", *arguments],
                env=dict(os.environ) | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"} | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        running.append(process)
        return process

    yield start
    for process in running:
        with process:
            process.kill()
    eventually(lambda: not processes_of(tmp_path), what="nothing of the demo runs on")


def nothing_is_left(directory: Path) -> bool:
    return not processes_of(directory) and not list(directory.iterdir())


def test_every_answer_comes_from_the_worker_and_is_true(demo: Demo, tmp_path: Path) -> None:
    process = demo("--json", "--stay", VISIONQ_MODEL_NAME="other")
    assert process.stdout is not None
    assert process.stderr is not None
    words = list(takewhile(lambda line: "stays until Ctrl-C" not in line, process.stderr))
    answers = [json.loads(process.stdout.readline()) for _ in range(3)]
    playground = next(line for line in process.stderr if line.startswith("Playground")).split()[-1]

    assert_answers(answers)
    assert_gateway(playground, answers)
    assert_side_by_side(words)
    assert any("worker.cli" in line for line in processes_of(tmp_path))

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == ""
    assert nothing_is_left(tmp_path)


def assert_answers(answers: Sequence[dict[str, Any]]) -> None:
    assert [answer["task"] for answer in answers] == ["visionq.caption", "visionq.vqa", "visionq.video_qa"]
    for answer in answers:
        assert answer["result"]["text"] == answer["truth"]
        assert answer["is_true"]
        assert answer["is_streamed"]
        assert answer["result"]["job_id"] == answer["job_id"]
        assert answer["result"]["usage"]["completion_tokens"] > 0
        assert 0 < answer["seconds_to_first_token"] <= answer["seconds_to_answer"]
    assert [answer["result"]["usage"]["frames"] for answer in answers] == [0, 0, 8]


def assert_gateway(playground: str, answers: Sequence[dict[str, Any]]) -> None:
    """The page is there, and the gateway knows the jobs of both ways."""
    assert [answer["way"] for answer in answers] == ["redis", "http", "redis"]
    with urllib.request.urlopen(playground, timeout=30) as page:
        assert page.headers.get_content_type() == "text/html"
    for answer in answers:
        with urllib.request.urlopen(f"{playground}v1/jobs/{answer['job_id']}", timeout=30) as view:
            assert json.load(view)["result"]["text"] == answer["truth"]


def assert_side_by_side(lines: Sequence[str]) -> None:
    for label in LABELS.values():
        own = [line.removeprefix(label).strip() for line in lines if line.startswith(f"{label} ")]
        assert own[0] == "[queued]"
        assert own[-1] == "[completed]"
        assert any(line.startswith("…") for line in own)
    last_start = max(i for i, line in enumerate(lines) if "[started]" in line)
    assert last_start < min(i for i, line in enumerate(lines) if "[completed]" in line), "the jobs did not run at once"


@pytest.mark.check
def test_the_shipped_captioner_is_asked_for_a_caption_only(demo: Demo, tmp_path: Path) -> None:
    out, err = demo("--json", VISIONQ_MODEL="demo-captioner").communicate(timeout=120)
    (answer,) = map(json.loads, out.splitlines())
    assert (answer["task"], answer["question"], answer["is_true"]) == ("visionq.caption", "", True), err
    assert "one job, about a picture that was just drawn" in err
    assert nothing_is_left(tmp_path)


def test_ctrl_c_ends_everything(demo: Demo, tmp_path: Path) -> None:
    process = demo()
    eventually(lambda: any("worker.cli" in line for line in processes_of(tmp_path)), 60, "the worker was started")

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "stopped by SIGINT" in err
    assert nothing_is_left(tmp_path)


def test_a_killed_demo_takes_everything_along(demo: Demo, tmp_path: Path) -> None:
    process = demo()
    eventually(lambda: any("worker.cli" in line for line in processes_of(tmp_path)), 60, "the worker was started")

    process.kill()
    process.wait(20)

    eventually(lambda: nothing_is_left(tmp_path), what="nothing is left")
