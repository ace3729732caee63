"""A reconnect storm: many readers over some jobs, each cut at random; the gateway is killed and comes back meanwhile.

`python -m tests.gateway.storm --readers 500 --jobs 50` starts a Redis and a gateway of its own and prints what it saw.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.gateway.service import Sent, sent_events, text_of
from tests.gateway.test_process import STOP_S, ApiProcess
from tests.servers import RedisServer, free_port
from tests.unit.api_stub.workers import ScriptedWorker

NUM_WORDS = 40
STORM_S = 240.0
Start = Callable[[int], ApiProcess]


@dataclass(slots=True)
class Reader:
    """One reader of one job: what it has read, and how often its connection ended before the job."""

    job_id: str
    dice: random.Random
    events: list[Sent] = field(default_factory=list)
    num_cuts: int = 0
    num_breaks: int = 0

    @property
    def is_done(self) -> bool:
        """Tell whether the final event is there."""
        return bool(self.events) and self.events[-1].type == "job.completed"

    async def read(self, port: int) -> None:
        """Read to the end, leaving at random and coming back with the last id."""
        while not self.is_done:
            try:
                await self._read_some(port, patience=self.dice.randint(1, 20))
            except (OSError, asyncio.IncompleteReadError, ValueError):
                self.num_breaks += 1
            if not self.is_done:
                await asyncio.sleep(self.dice.uniform(0.01, 0.2))

    async def _read_some(self, port: int, patience: int) -> None:
        stream, out = await asyncio.open_connection("127.0.0.1", port)
        try:
            last = f"Last-Event-ID: {self.events[-1].id}\r\n" if self.events else ""
            out.write(f"GET /v1/jobs/{self.job_id}/events HTTP/1.1\r\nHost: localhost\r\n{last}\r\n".encode())
            head = await stream.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise ValueError(head[:40])
            async for event in _events(stream):
                self.events.append(event)
                patience -= 1
                if patience == 0 and not self.is_done:
                    self.num_cuts += 1
                    return
        finally:
            out.close()
            with contextlib.suppress(OSError):
                await out.wait_closed()


@dataclass(frozen=True, slots=True)
class Storm:
    """What happened: numbers of all readers together, and seconds."""

    num_readers: int
    num_jobs: int
    num_whole: int
    num_events: int
    num_cuts: int
    num_breaks: int
    seconds: float
    rss_bytes: int

    def line(self) -> str:
        """Return it as text."""
        return (
            f"{self.num_whole} of {self.num_readers} readers of {self.num_jobs} jobs have the whole text; "
            f"{self.num_events} events, {self.num_cuts} cuts by readers, {self.num_breaks} by the killed gateway, "
            f"{self.seconds:.1f} s, gateway {self.rss_bytes / 2**20:.0f} MiB at the end"
        )


def storm(redis_url: str, start: Start, num_readers: int, num_jobs: int, seed: int = 0) -> Storm:
    """Let it rage. A third of the text comes before the gateway is killed, a third while it is away, the rest after."""
    port = free_port()
    api = start(port).wait_ready()
    job_ids = [api.submit() for _ in range(num_jobs)]
    ledger = Ledger.connect(redis_url, LedgerConfig(lease_s=600))
    workers = [ScriptedWorker(ledger) for _ in job_ids]
    for worker, job_id in zip(workers, job_ids, strict=True):
        worker.take(job_id)
    readers = [Reader(job_ids[i % num_jobs], random.Random(seed * num_readers + i)) for i in range(num_readers)]
    begun = time.monotonic()
    api = asyncio.run(asyncio.wait_for(_rage(api, start, workers, readers), STORM_S))
    seconds = time.monotonic() - begun
    ledger.close()
    texts = {worker.claim.job_id: worker.text for worker in workers}
    return Storm(
        num_readers=num_readers,
        num_jobs=num_jobs,
        num_whole=sum(_is_whole(reader, texts[reader.job_id]) for reader in readers),
        num_events=sum(len(reader.events) for reader in readers),
        num_cuts=sum(reader.num_cuts for reader in readers),
        num_breaks=sum(reader.num_breaks for reader in readers),
        seconds=seconds,
        rss_bytes=api.rss_bytes(),
    )


async def _rage(api: ApiProcess, start: Start, workers: list[ScriptedWorker], readers: list[Reader]) -> ApiProcess:
    async with asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(reader.read(api.port))
        third = NUM_WORDS // 3
        await asyncio.to_thread(_say, workers, range(third))
        # All are in the middle of the text.
        while min(len(reader.events) for reader in readers) < third // 2:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(_kill, api)
        await asyncio.to_thread(_say, workers, range(third, 2 * third))
        api = await asyncio.to_thread(lambda: start(api.port).wait_ready())
        await asyncio.to_thread(_say, workers, range(2 * third, NUM_WORDS))
        await asyncio.to_thread(lambda: [worker.finish() for worker in workers])
    return api


def _say(workers: list[ScriptedWorker], numbers: range) -> None:
    for number in numbers:
        for worker in workers:
            worker.say(f"word {number} ")


def _kill(api: ApiProcess) -> None:
    api.process.kill()
    api.process.wait(STOP_S)


def _is_whole(reader: Reader, text: str) -> bool:
    seqs = [int(event.id) for event in reader.events]
    result = reader.events[-1].data["result"]
    assert isinstance(result, dict)
    return seqs == list(range(1, len(seqs) + 1)) and text_of(reader.events) == text == result["text"]


async def _events(stream: asyncio.StreamReader) -> AsyncIterator[Sent]:
    """Read events from a chunked body; what is not whole when the connection ends is none."""
    rest = ""
    while size := int(await stream.readline(), 16):
        rest += (await stream.readexactly(size + 2))[:-2].decode()
        *blocks, rest = rest.split("\n\n")
        for block in blocks:
            for event in sent_events(iter([*block.split("\n"), ""])):
                yield event


def main() -> None:
    """Run it beside nothing else."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readers", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        server = RedisServer(Path(directory))
        started: list[ApiProcess] = []

        def start(port: int) -> ApiProcess:
            started.append(ApiProcess(server.url, port, Path(directory) / "api.log"))
            return started[-1]

        try:
            seen = storm(server.url, start, options.readers, options.jobs, options.seed)
        finally:
            for api in started:
                _kill(api)
            server.stop()
    sys.stdout.write(f"{seen.line()}\n")
    if seen.num_whole != seen.num_readers:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
