"""A forked worker is to the tests what an executed one is; and a zygote that has ended is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forks
from tests.forks import ENVIRONMENT, ForkedProcess, Forks, ZygoteEnded, can_fork
from tests.processes import ctrl_c_is_heard
from tests.servers import eventually

PROGRAM = "tests.structure.ending"


@pytest.fixture
def own_forks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Forks]:
    """A zygote of this test's, which imports nothing of the worker's."""
    monkeypatch.setattr(forks, "FORKS", own := Forks(modules=()))
    yield own
    own.stop()


def environment(directory: Path) -> dict[str, str]:
    return ENVIRONMENT | {"VISIONQ_MODEL": "demo", "TMPDIR": str(directory)}


def executed(how: str, directory: Path) -> tuple[int, str]:
    with ctrl_c_is_heard(), (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, how], env=environment(directory), stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return process.wait(60), (directory / "log").read_text()


def forked(how: str, directory: Path) -> tuple[int, str]:
    log = directory / "log"
    log.write_bytes(b"")
    return ForkedProcess(PROGRAM, (how,), environment(directory), log).wait(60), log.read_text()


@pytest.mark.parametrize("how", ["return", "status", "words", "error", "at once", "SIGTERM", "SIGKILL", "SIGINT"])
def test_a_forked_process_is_and_ends_as_an_executed_one(how: str, own_forks: Forks, tmp_path: Path) -> None:
    status, said = executed(how, tmp_path)
    forked_status, forked_said = forked(how, tmp_path)
    assert forked_status == status
    if how != "at once":  # what was not flushed is lost
        facts, *words = said.splitlines()
        forked_facts, *forked_words = forked_said.splitlines()
        assert json.loads(forked_facts) == json.loads(facts)
        assert json.loads(facts)["leads_session"]
        assert words_of(forked_words) == words_of(words)


def words_of(lines: list[str]) -> list[str]:
    """Without the frames of a traceback: a fork's begin in the zygote."""
    return [line for line in lines if not re.match(r"  |Traceback|[\s^~]*$", line)]


def test_a_forked_process_is_waited_for_and_killed(own_forks: Forks, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    process = ForkedProcess("http.server", ("--bind", "127.0.0.1", "0"), environment(tmp_path), log)
    eventually(lambda: "Serving HTTP" in log.read_text() or process.poll() is not None, 60, "it serves")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.terminate()
    assert process.wait(20) == process.poll() == process.returncode == -signal.SIGTERM
    process.kill()  # its number may be another's by now: nothing is sent


def test_a_zygote_that_is_killed_is_told_and_leaves_nothing(own_forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    left = ForkedProcess("http.server", ("--bind", "127.0.0.1", "0"), environment(tmp_path), tmp_path / "log")
    assert left.poll() is None
    eventually(lambda: "Serving HTTP" in (tmp_path / "log").read_text(), 60, "it serves")
    os.kill(own_forks.pid, signal.SIGKILL)
    with pytest.raises(ZygoteEnded, match="the zygote has ended with -9"):
        left.wait(20)
    with pytest.raises(ZygoteEnded, match="the zygote has ended with -9"):
        forked("return", tmp_path)
    eventually(lambda: not Path(f"/proc/{left.pid}/fd/0").exists(), 20, "it has ended")


def test_a_zygote_ends_what_it_forked(own_forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    left = ForkedProcess("http.server", ("--bind", "127.0.0.1", "0"), environment(tmp_path), tmp_path / "log")
    own_forks.stop()
    eventually(lambda: not Path(f"/proc/{left.pid}/fd/0").exists(), 20, "it has ended")


@pytest.mark.parametrize(
    ("variables", "forks_it"),
    [
        ({}, True),
        ({"VISIONQ_MODEL": "demo", "AWS_REGION": "x", "HF_TOKEN": "hf_x", "TMPDIR": "/tmp/x"}, True),
        ({"HF_HOME": "/tmp/x"}, False),
        ({"HF_HUB_OFFLINE": "0"}, False),
        ({"OMP_NUM_THREADS": "7"}, False),
    ],
)
def test_only_variables_that_are_read_late_reach_a_fork(variables: dict[str, str], forks_it: bool) -> None:
    assert can_fork(variables) == forks_it
