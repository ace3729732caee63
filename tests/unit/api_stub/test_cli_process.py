"""The `visionq` program as a person and a shell run it: in a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.event import Stage
from api_stub.ledger.ledger import Ledger
from tests.processes import ctrl_c_is_heard
from tests.servers import eventually
from tests.unit.api_stub.ledger_kit import question
from tests.unit.api_stub.workers import ScriptedWorker

JOB = "job-1"
VISIONQ = str(Path(sys.executable).with_name("visionq"))


@pytest.fixture
def environment(redis_url: str) -> dict[str, str]:
    return {**os.environ, "VISIONQ_REDIS_URL": redis_url, "TERM": "xterm-256color", "COLUMNS": "200"}


@pytest.fixture
def running(ledger: Ledger, worker: ScriptedWorker) -> ScriptedWorker:
    """The worker that runs JOB."""
    ledger.submit(JOB, question())
    worker.take(JOB)
    return worker


class Terminal:
    """A program whose stdout and stderr are a terminal."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self._screen, inside = pty.openpty()
        with ctrl_c_is_heard():
            self.process = subprocess.Popen(
                [VISIONQ, *arguments],
                env=environment,
                stdin=inside,
                stdout=inside,
                stderr=inside,
                start_new_session=True,
            )
        os.close(inside)
        self._seen = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def shows(self, words: str) -> None:
        eventually(lambda: words in self.text, what=f"{words!r} is on the screen, which shows {self.text!r}")

    @property
    def text(self) -> str:
        """What was written so far, without the terminal's own codes."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._seen.decode("utf-8", errors="replace"))

    def wait(self) -> int:
        status = self.process.wait(30)
        self._reader.join(10)
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self._reader.join(10)
        os.close(self._screen)

    def _read(self) -> None:
        try:
            while chunk := os.read(self._screen, 4096):
                self._seen += chunk
        except OSError:  # Linux answers EIO when the last writer has left
            pass


@pytest.fixture
def watching(environment: dict[str, str], running: ScriptedWorker) -> Iterator[Terminal]:
    """`visionq watch` of the running job on a terminal."""
    terminal = Terminal(environment, "watch", JOB)
    yield terminal
    terminal.close()


def test_a_terminal_shows_stages_then_the_text_as_it_arrives_then_what_it_took(
    watching: Terminal, running: ScriptedWorker
) -> None:
    watching.shows("started by scripted@test:1")
    running.progress(Stage.FETCHING)
    watching.shows("fetching 0/1")
    running.progress(Stage.PREFILL)
    watching.shows("generating")
    running.say("It is ")
    watching.shows("It is ")
    running.say("[red]\x1b[2J")
    running.finish()
    assert watching.wait() == 0
    assert "It is [red]␛[2J\r\n" in watching.text
    assert f"ended by stop; job {JOB}" in watching.text


def test_a_terminal_says_that_nobody_serves_the_model(environment: dict[str, str], ledger: Ledger) -> None:
    terminal = Terminal(environment, "vqa", "-q", "Why?", "--job-id", JOB, "--model", "rare")
    terminal.shows("queued: no worker serves the model 'rare' now")
    ledger.cancel(JOB)
    assert terminal.wait() == 1
    assert "cancelled: cancelled while it was queued" in terminal.text
    terminal.close()


def test_a_terminal_gets_the_whole_answer_after_a_restart_that_differs(
    watching: Terminal, running: ScriptedWorker
) -> None:
    running.say("It is blue")
    watching.shows("It is blue")
    running.give_back()
    running.take(JOB)
    running.say("It is ", "red")
    running.finish()
    assert watching.wait() == 0
    assert re.search(r"It is blue\r\na new attempt differs.*waiting for the whole answer\r\n", watching.text)
    assert "It is red\r\n" in watching.text


def test_ctrl_c_on_a_terminal_stops_watching_only(
    watching: Terminal, running: ScriptedWorker, redis_client: redis.Redis
) -> None:
    running.say("It")
    watching.shows("It")
    os.killpg(watching.process.pid, signal.SIGINT)
    assert watching.wait() == 130
    assert f"job {JOB} goes on: `visionq watch {JOB}`" in watching.text
    assert redis_client.hget(names.job_key(JOB), "cancel") is None
    running.finish()


def test_a_pipe_carries_the_text_as_it_arrives(environment: dict[str, str], running: ScriptedWorker) -> None:
    with subprocess.Popen([VISIONQ, "watch", JOB], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        running.say("It is ")
        assert os.read(process.stdout.fileno(), 100) == b"It is "
        running.say("red")
        running.finish()
        assert process.stdout.read() == b"red\n"
        assert process.wait(30) == 0


def test_a_reader_of_the_pipe_that_leaves_causes_no_traceback(
    environment: dict[str, str], running: ScriptedWorker
) -> None:
    process = subprocess.Popen([VISIONQ, "watch", JOB], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    running.say("It")
    assert os.read(process.stdout.fileno(), 100) == b"It"
    process.stdout.close()
    running.say(" is", " red")
    running.finish()
    assert process.wait(30) == 1
    assert process.stderr.read() == b""
    process.stderr.close()
