"""What the ledger costs when it is large, by Redis' own count: `python -m tests.ledger_scale`, by hand.

Bytes of waiting jobs and the time of a claim, then one sweep's time in Redis with many model names and jobs, by one
sweeping process and by ten. Jobs go in by the real script; it needs about 2.5 GB for a million of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import redis

from api_stub.contract import names
from api_stub.contract.job import VqaJob
from api_stub.ledger import calls
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.lua import Transition, script
from api_stub.ledger.reaper import Reaper
from api_stub.ledger.rows import Claim
from api_stub.ledger.settings import LedgerConfig
from tests.servers import TESTED, RedisServer

BATCH: Final = 1000
QUESTION: Final = VqaJob(media=("s3://media/scene.png",), question="What colour is the circle?")
SWEEPER: Final = "import sys; from tests.ledger_scale import sweep; sweep(sys.argv[1], float(sys.argv[2]))"
SWEEP_S: Final = 1.0
#: A sweep takes longer, the commands that it runs do not: their entries would be hundreds per sweep.
NOTED_US: Final = 20
#: Redis' Lua collects what earlier scripts have left within the calls that come next, whatever they do: after so many
#: submits a script that only returns 1 may take 14 ms. So it collects that before sweeps are timed, and what the former
#: phase's notes leave is given back to the system.
COLLECTING: Final = "collectgarbage('collect') return 1"

SETTLE_S: Final = 5.0


def fill(client: redis.Redis, num_jobs: int, num_names: int = 1) -> None:
    """Submit the same question again and again, to one model name after the other."""
    sha = client.script_load(script(Transition.SUBMIT, LedgerConfig()))
    args = [str(value) for value in calls.submit(str(uuid.uuid4()), QUESTION).args]
    model, where = args.index("default"), args.index("default:6")
    for first in range(0, num_jobs, BATCH):
        with client.pipeline(transaction=False) as pipeline:
            for number in range(first, min(first + BATCH, num_jobs)):
                name = names.DEFAULT_MODEL_NAME if num_names == 1 else f"model-{number % num_names}"
                args[0], args[model], args[where] = str(uuid.uuid4()), name, names.list_id(name, 6)
                pipeline.evalsha(sha, 0, *args)
            pipeline.execute()


def bytes_of_waiting_jobs(client: redis.Redis, num_jobs: int) -> float:
    """Return what each of so many waiting jobs of one model adds to the memory that Redis uses."""
    before = client.info("memory")["used_memory"]
    fill(client, num_jobs)
    return float(client.info("memory")["used_memory"] - before) / num_jobs


def claim_times_s(url: str, num: int) -> list[float]:
    """Claim jobs as their doorbells come."""
    ledger, took = Ledger.connect(url, LedgerConfig()), []
    for _ in range(num):
        message = ledger.client.rpop(names.queue_list(names.DEFAULT_MODEL_NAME, 6))
        job_id = json.loads(str(message))["headers"]["id"]
        began = time.perf_counter()
        claim = ledger.claim(job_id, "worker-1")
        took.append(time.perf_counter() - began)
        assert isinstance(claim, Claim), claim
    ledger.close()
    return took


def sweep(url: str, seconds: float) -> None:
    """Sweep as every worker and gateway does, every `SWEEP_S`; what a sweeping process runs."""
    ledger = Ledger.connect(url, LedgerConfig())
    reaper, ends = Reaper(ledger, SWEEP_S), time.monotonic() + seconds
    while time.monotonic() < ends:
        reaper.sweep()
        time.sleep(SWEEP_S)
    ledger.close()


@contextmanager
def slow_sweeps(client: redis.Redis) -> Iterator[list[float]]:
    """Collect the milliseconds that Redis itself says that each sweep took; filled in when it is left."""
    took: list[float] = []
    sha = client.script_load(script(Transition.REAP, LedgerConfig()))
    client.config_set("slowlog-max-len", 100_000)
    client.config_set("slowlog-log-slower-than", NOTED_US)
    client.slowlog_reset()
    client.eval(COLLECTING, 0)
    client.memory_purge()
    time.sleep(SETTLE_S)
    yield took
    client.config_set("slowlog-log-slower-than", -1)
    entries = client.slowlog_get(100_000)
    took += [entry["duration"] / 1000 for entry in entries if sha.encode() in _bytes(entry["command"])]


def _bytes(command: str | bytes) -> bytes:
    return command.encode() if isinstance(command, str) else command


def sweep_ms(url: str, client: redis.Redis, num_processes: int, seconds: float) -> list[float]:
    """Let processes sweep side by side; return each sweep's time in Redis."""
    with slow_sweeps(client) as took, ExitStack() as running:
        command = [sys.executable, "-c", SWEEPER, url, str(seconds)]
        for _ in range(num_processes):
            running.enter_context(subprocess.Popen(command))
    return took


def told(took: list[float]) -> str:
    """Return a line about times."""
    worst = ", ".join(f"{one:.3f}" for one in sorted(took)[:-4:-1])
    return f"{len(took)} sweeps, median {statistics.median(took):.3f} ms, longest {worst} ms"


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.ledger_scale", description=__doc__)
    parser.add_argument("--names", type=int, default=100_000, help="model names")
    parser.add_argument("--jobs", type=int, default=1_000_000, help="jobs, over all names")
    parser.add_argument("--waiting", type=int, default=50_000, help="jobs of one name, for bytes and claims")
    parser.add_argument("--seconds", type=float, default=20.0, help="of sweeping, for each number of processes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), "--appendonly", "no")
        try:
            measure(server, given)
        finally:
            server.stop()


def say(line: str) -> None:
    """Tell at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def measure(server: RedisServer, given: argparse.Namespace) -> None:
    """Fill and measure one server."""
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        about = client.info("server")
        say(f"{TESTED}: {about.get('server_name', 'redis')} {about.get('valkey_version', about['redis_version'])}")
        each = bytes_of_waiting_jobs(client, given.waiting)
        say(f"{given.waiting} waiting jobs: {each:.0f} bytes each")
        took = claim_times_s(server.url, min(given.waiting, 2000))
        say(f"claim: p50 {statistics.median(took) * 1e6:.0f} µs over {len(took)}")
        client.flushall()
        began = time.monotonic()
        fill(client, given.jobs, given.names)
        say(f"{given.jobs} jobs of {given.names} names in {time.monotonic() - began:.0f} s")
        with slow_sweeps(client) as took:
            sweep(server.url, 0.1 * SWEEP_S)
            while client.exists(names.NEWS_KEY):
                sweep(server.url, 0.1 * SWEEP_S)
        say(f"news of all names: {told(took)}")
        for num_processes in (1, 10):
            took = sweep_ms(server.url, client, num_processes, given.seconds)
            say(f"{num_processes} sweeping: {told(took)}")


if __name__ == "__main__":
    main()
