"""`visionq-worker start --devices`: one worker process per device, restarted when it dies, ended together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from api_stub.client.client import Client
from tests.processes import READY_S, WorkerProcess, num_workers
from tests.servers import RedisServer, S3Server, eventually, free_port
from worker.errors import CannotStart
from worker.lifecycle.supervisor import Device, parse_devices

Start = Callable[..., "Supervised"]


class Supervised(WorkerProcess):
    """A supervisor with its log."""

    options = ("--devices", "cpu,cpu")

    def facts(self, message: str) -> list[dict[str, object]]:
        """What the supervisor's log lines with this message say."""
        lines = [line for line in self.text().splitlines() if f'"{message}"' in line]
        return [fact for fact in map(json.loads, lines) if fact.get("action") == "supervise"]

    def pids(self) -> list[int]:
        """Process ids of all workers started so far."""
        return [int(str(fact["pid"])) for fact in self.facts("worker started")]

    def wait_ready_times(self, count: int) -> None:
        """Wait until workers have announced `count` times that they consume."""
        eventually(
            lambda: self.process.poll() is not None or self.text().count('"worker ready"') >= count,
            READY_S,
            f"{count} workers ready",
        )
        assert self.process.poll() is None, self.text()[-4000:]


@pytest.fixture
def start(redis_url: str, s3_server: S3Server, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a supervisor; everything is killed in the end."""
    started: list[Supervised] = []

    def begin(**settings: object) -> Supervised:
        plain = {"model": "demo", "lease_s": 3, "beat_s": 0.5, "grace_s": 1, "sweep_s": 0.2, "drain_s": 5}
        started.append(Supervised(tmp_path, redis_url, s3_server.url, **(plain | settings)))
        return started[-1]

    yield begin
    for supervised in started:
        supervised.kill()
        eventually(lambda found=supervised: not any(map(is_running, found.pids())), 30, "no worker is left")


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if entry)


def test_two_workers_share_a_queue_one_that_is_killed_comes_back_sigterm_drains_both(
    start: Start, redis_server: RedisServer, redis_url: str
) -> None:
    supervised = start(drain_s=30)
    supervised.wait_ready_times(2)
    first, _ = supervised.pids()
    with redis_server.client() as raw, Client(redis_url) as client:
        assert num_workers(raw) == 2
        jobs = [client.vqa(question=f"hello {number}", max_new_tokens=30) for number in range(60)]
        assert len({worker_of(job) for job in jobs}) == 2
        long = [client.vqa(question=f"long {n}", min_new_tokens=800, max_new_tokens=800) for n in range(8)]
        eventually(lambda: all(job.status().status == "in_progress" for job in long), 30, "all run")
        os.kill(first, signal.SIGKILL)
        supervised.wait_ready_times(3)
        assert all(job.result(timeout=60).usage.completion_tokens == 800 for job in long)
        last = [client.vqa(question=f"last {n}", min_new_tokens=300, max_new_tokens=300) for n in range(4)]
        eventually(lambda: all(job.status().status == "in_progress" for job in last), 30, "all run")
        assert supervised.terminate() == 0
        assert [job.status().status for job in last] == ["completed"] * 4, "running jobs were not drained"
    (death,) = supervised.facts("worker died")
    assert (death["status"], death["number"], death["backoff_s"]) == (-signal.SIGKILL, 0, 1.0)
    assert not any(map(is_running, supervised.pids()))
    assert supervised.facts("worker killed") == []


def worker_of(job: object) -> str:
    return next(event.worker for event in job.events(timeout=60) if event.type == "job.started")


def test_workers_are_kept_to_their_devices_and_share_the_cores(start: Start) -> None:
    port = free_port()
    supervised = start(torch_threads="", http_port=port)
    eventually(lambda: len(supervised.pids()) == 2, 30, "both are started")
    ports = set()
    for pid in supervised.pids():
        seen = environment(pid)
        assert (seen["CUDA_VISIBLE_DEVICES"], seen["VISIONQ_DEVICE"]) == ("", "cpu")
        ports.add(int(seen["VISIONQ_HTTP_PORT"]))
        assert seen["VISIONQ_TORCH_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2))
    assert ports == {port, port + 1}


def test_sigterm_ends_workers_that_are_still_loading(start: Start) -> None:
    supervised = start()
    eventually(lambda: len(supervised.pids()) == 2, 30, "both are started")
    assert supervised.terminate() == 0


@pytest.mark.parametrize(
    ("settings", "variable"),
    [({"model": "/no/such/folder"}, "VISIONQ_MODEL=/no/such/folder"), ({"dtype": "float7"}, "VISIONQ_DTYPE")],
    ids=["at load", "at once"],
)
def test_a_setting_that_cannot_work_ends_all_with_78(start: Start, settings: dict[str, str], variable: str) -> None:
    supervised = start(**settings)
    assert supervised.process.wait(60) == 78
    assert f"cannot start: {variable}" in supervised.text()


def test_a_worker_that_cannot_start_again_is_no_reason_to_end_the_other_but_a_killed_supervisor_is(
    start: Start, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.symlink_to(Path("worker/demo_model/checkpoint").absolute())
    supervised = start(model=checkpoint)
    supervised.wait_ready_times(2)
    checkpoint.unlink()
    os.kill(supervised.pids()[0], signal.SIGKILL)
    eventually(lambda: "cannot start" in supervised.text(), 60, "the restart is refused")
    checkpoint.symlink_to(Path("worker/demo_model/checkpoint").absolute())
    supervised.wait_ready_times(3)
    assert [death["status"] for death in supervised.facts("worker died")][:2] == [-9, 78]
    assert [death["backoff_s"] for death in supervised.facts("worker died")][:2] == [1.0, 2.0]
    supervised.kill()
    eventually(lambda: not any(map(is_running, supervised.pids())), 30, "workers end without their supervisor")


def test_devices_are_read() -> None:
    assert parse_devices("0,1", None) == (Device("0", "0"), Device("1", "1"))
    assert parse_devices("0+1, 2+3", None) == (Device("0+1", "0,1"), Device("2+3", "2,3"))
    assert parse_devices("1,0", "4,7") == (Device("1", "7"), Device("0", "4"))
    assert parse_devices("cpu,cpu", "4") == (Device("cpu", ""), Device("cpu", ""))
    assert parse_devices("GPU-ab,MIG-cd", "4")[1].visible_gpus == "MIG-cd"
    kinds = [device.environment["VISIONQ_DEVICE"] for device in parse_devices("cpu,0,1+2", None)]
    assert kinds == ["cpu", "cuda", "auto"]


@pytest.mark.parametrize("value", ["", "0,", "x", "-1", "0,0", "0+1,1+2", "cuda:0", "2", "GPU-a,GPU-a"])
def test_devices_that_make_no_sense_are_refused(value: str) -> None:
    with pytest.raises(CannotStart, match="--devices"):
        parse_devices(value, "4,7")


def test_supervising_needs_no_torch() -> None:
    program = "import sys, worker.cli; print(*{'torch', 'transformers', 'celery', 'boto3'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
