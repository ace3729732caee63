"""`visionq up`: endpoints that work once they are there, dead workers replaced, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers import eventually
from tests.survivors import processes_of

VISIONQ = [sys.executable, "-c", "from api_stub.cli.main import main; main()"]
READY_S = 240.0
Up = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    directory = tmp_path / "tmp"
    directory.mkdir()
    return directory


@pytest.fixture
def up(tmp_path: Path, temporary: Path) -> Iterator[Up]:
    """Starts `visionq up`; its words go to `tmp_path/up.log`, its temporary files to `temporary`."""
    running = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "up.log").open("wb") as log:
            process = subprocess.Popen(
                [*VISIONQ, "up", *arguments],
                env=dict(os.environ) | {"TMPDIR": str(temporary), "VISIONQ_TORCH_THREADS": "1"} | environment,
                stdout=log,
                stderr=log,
            )
        running.append(process)
        return process

    yield start
    for process in running:
        with process:
            process.kill()
    eventually(lambda: not processes_of(temporary), what="nothing of the stack runs on")


def wait_for(env_file: Path, process: subprocess.Popen[bytes]) -> dict[str, str]:
    """Wait for the endpoints and read them as a shell does."""
    log = env_file.with_name("up.log")
    eventually(lambda: env_file.exists() or process.poll() is not None, READY_S, "the endpoints")
    assert process.poll() is None, log.read_text()
    shell = f'set -a; . "{env_file}"; exec "{sys.executable}" -c "import json, os; print(json.dumps(dict(os.environ)))"'
    found: dict[str, str] = json.loads(subprocess.check_output(["env", "-i", "sh", "-c", shell], text=True))
    return {name: value for name, value in found.items() if name.startswith(("VISIONQ_", "AWS_"))}


def worker_pids(directory: Path) -> set[int]:
    return {
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if f"TMPDIR={directory}".encode() in _read(process / "environ") and b"worker.cli" in _read(process / "cmdline")
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_the_endpoints_serve_jobs_and_a_dead_worker_is_replaced(up: Up, tmp_path: Path, temporary: Path) -> None:
    env_file = tmp_path / "stack.env"
    process = up("--env-file", str(env_file), "--concurrency", "2")
    endpoints = wait_for(env_file, process)
    assert endpoints.keys() == {
        "VISIONQ_REDIS_URL", "VISIONQ_MEDIA_BUCKET", "VISIONQ_API_URL",
        "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION",
    }  # fmt: skip
    assert env_file.stat().st_mode & 0o777 == 0o600

    ask = [*VISIONQ, "vqa", "--question", "How many shapes?", "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | endpoints
    (before,) = worker_pids(temporary)
    os.kill(before, signal.SIGKILL)
    # Asked while no worker lives: the answer must come from the new one.
    answer = json.loads(subprocess.check_output(ask, env=environment, timeout=120))
    assert answer["usage"]["completion_tokens"] > 0
    assert worker_pids(temporary) - {before}
    assert "worker-1 ended with exit status -9; starting it again" in (tmp_path / "up.log").read_text()

    process.terminate()
    assert process.wait(60) == 0
    assert not env_file.exists()
    assert list(temporary.iterdir()) == []
    assert processes_of(temporary) == []


def test_a_killed_stack_takes_its_children_and_files_along(up: Up, tmp_path: Path, temporary: Path) -> None:
    env_file = tmp_path / "stack.env"
    process = up("--env-file", str(env_file), "--workers", "0")
    wait_for(env_file, process)

    process.kill()
    process.wait(20)

    eventually(lambda: not processes_of(temporary), what="the servers are gone")
    eventually(lambda: not env_file.exists() and not list(temporary.iterdir()), what="the files are gone")


def test_a_file_of_somebody_else_is_not_overwritten(up: Up, tmp_path: Path) -> None:
    env_file = tmp_path / ".profile"
    env_file.write_text("umask 022\n")
    assert up("--env-file", str(env_file), "--workers", "0").wait(60) == 1
    assert env_file.read_text() == "umask 022\n"
    assert "left alone" in (tmp_path / "up.log").read_text()


def test_a_worker_that_cannot_start_ends_the_stack_with_its_reason(up: Up, tmp_path: Path, temporary: Path) -> None:
    env_file = tmp_path / "stack.env"
    process = up("--env-file", str(env_file), VISIONQ_DTYPE="float7")
    assert process.wait(READY_S) == 1
    log = (tmp_path / "up.log").read_text()
    assert "worker-1 ended with exit status 78" in log
    assert "VISIONQ_DTYPE" in log
    assert not env_file.exists()
    assert list(temporary.iterdir()) == []
