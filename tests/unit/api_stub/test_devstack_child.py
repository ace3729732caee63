"""Children end when they are told to, when they do not want to, and when their parent is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from api_stub.devstack.child import Child, CleanupProcess, StackFailed
from tests.servers import eventually
from tests.survivors import processes_of

ENVIRONMENT = dict(os.environ)
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""


KILLED_AT_ONCE = """
import os, signal, subprocess, sys
from pathlib import Path
from api_stub.devstack.child import Child, CleanupProcess

class Popen(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if "time.sleep" in str(args):
            os.kill(os.getpid(), signal.SIGKILL)

cleanup_process = CleanupProcess()
subprocess.Popen = Popen
command = [sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]]
Child("child", command, os.environ, Path(sys.argv[1]), cleanup_process)
"""


@pytest.fixture
def cleanup_process() -> Iterator[CleanupProcess]:
    cleanup_process = CleanupProcess()
    yield cleanup_process
    cleanup_process.close()


def start(code: str, directory: Path, cleanup_process: CleanupProcess) -> Child:
    child = Child("child", [sys.executable, "-c", code], ENVIRONMENT, directory, cleanup_process)
    eventually(lambda: child.output.read_text() or child.exit_status() is not None, what="the child wrote a line")
    return child


def is_running(pid: int) -> bool:
    """Tell whether a process exists and is no zombie (whoever adopted an orphan may be slow to reap it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_ended_child_is_reported_with_its_last_words(tmp_path: Path, cleanup_process: CleanupProcess) -> None:
    child = start("import sys; print('loading'); sys.exit('no such model')", tmp_path, cleanup_process)
    eventually(lambda: child.exit_status() is not None, what="the child ended")

    with pytest.raises(StackFailed) as caught:
        child.require_alive()

    assert "child ended with exit status 1" in str(caught.value)
    assert "no such model" in str(caught.value)
    child.stop(0)


def test_a_program_that_does_not_exist_is_a_stack_failure(tmp_path: Path, cleanup_process: CleanupProcess) -> None:
    with pytest.raises(StackFailed, match="child cannot be started"):
        Child("child", [str(tmp_path / "nothing")], ENVIRONMENT, tmp_path, cleanup_process)


def test_a_child_may_end_in_its_own_way(tmp_path: Path, cleanup_process: CleanupProcess) -> None:
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(600)"
    )
    child = start(code, tmp_path, cleanup_process)
    child.stop(20)
    assert child.exit_status() == 7


def test_a_child_that_ignores_sigterm_is_killed_with_its_own_children(
    tmp_path: Path, cleanup_process: CleanupProcess
) -> None:
    child = start(STUBBORN, tmp_path, cleanup_process)
    grandchild = int(child.output.read_text())

    child.stop(0.2)

    assert child.exit_status() == -signal.SIGKILL
    eventually(lambda: not is_running(grandchild), what="the grandchild is gone")


def test_ctrl_c_on_the_terminal_does_not_reach_a_child(tmp_path: Path, cleanup_process: CleanupProcess) -> None:
    child = start(SLEEP, tmp_path, cleanup_process)
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    child.stop(5)


def test_a_watchdog_leaves_forgotten_groups_alone(tmp_path: Path) -> None:
    cleanup_process = CleanupProcess()
    child = start(SLEEP, tmp_path, cleanup_process)
    cleanup_process.send("forget", child.pid)
    cleanup_process.close()
    assert child.exit_status() is None
    child.ask_to_stop()
    eventually(lambda: child.exit_status() is not None, what="the child ended")


def test_a_child_goes_when_the_parent_is_killed_before_it_knows_the_id(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", KILLED_AT_ONCE, str(tmp_path)])
    assert parent.wait(20) == -signal.SIGKILL
    eventually(lambda: not processes_of(tmp_path), what="the child is gone")


def test_a_child_starts_without_its_watchdog(tmp_path: Path) -> None:
    cleanup_process = CleanupProcess()
    cleanup_process.close()
    broken = os.pipe()
    os.close(broken[0])
    cleanup_process._process.stdin = os.fdopen(
        broken[1], "wb"
    )  # whoever killed the process left a pipe without a reader
    child = start(SLEEP, tmp_path, cleanup_process)
    assert child.exit_status() is None
    child.stop(5)
    cleanup_process.close()


def test_children_and_files_go_when_the_parent_is_killed(tmp_path: Path) -> None:
    directory, env_file = tmp_path / "stack", tmp_path / "stack.env"
    directory.mkdir()
    env_file.touch()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(directory), str(env_file)], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
        parent.wait(20)
        eventually(lambda: not is_running(pid), what="the child is gone")
        eventually(lambda: not directory.exists() and not env_file.exists(), what="the files are gone")
    finally:
        parent.stdout.close()
        parent.kill()


PARENT = f"""
import os, sys, time
from pathlib import Path
from api_stub.devstack.child import Child, CleanupProcess
directory, env_file = sys.argv[1:]
cleanup_process = CleanupProcess()
cleanup_process.send("remove", directory)
cleanup_process.send("remove", env_file)
child = Child("child", [sys.executable, "-c", {SLEEP!r}], dict(os.environ), Path(directory), cleanup_process)
print(child.pid, flush=True)
time.sleep(600)
"""
