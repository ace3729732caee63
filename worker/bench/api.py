"""What the HTTP gateway costs beside the bare client: submitting, following, and readers that only wait.

Redis, S3 and the gateway are started for the run. No model: jobs are submitted and never claimed, and events are
published by this process through the ledger. Both ways of a pair take turns, so the machine's other work meets both.
"""

from __future__ import annotations

import http.client
import json
import os
import resource
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from api_stub.client.client import Client
from api_stub.contract.event import CompletedBody, DeltaBody, FinalEvent
from api_stub.contract.result import FinishReason, Result, Timings, Usage
from api_stub.devstack.signals import StopSignals
from api_stub.devstack.stack import Stack, StackOptions
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim, Finished, Publication
from api_stub.ledger.settings import LedgerConfig

WARM_UP_JOBS: Final = 20
TIMEOUT_S: Final = 60.0
IDLE_JOBS: Final = 50
_QUESTION: Final = json.dumps({"task": "visionq.vqa", "question": "hello"})
_BATCH: Final = 20


@dataclass(frozen=True, slots=True)
class ApiReport:
    """Seconds of each submit; events per second of each stream; bytes of the gateway's memory without and with readers.

    load: running processes when it began, mean of a minute.
    """

    client_submit_s: Sequence[float]
    http_submit_s: Sequence[float]
    client_events_per_s: Sequence[float]
    http_events_per_s: Sequence[float]
    num_idle: int
    rss_before_bytes: int
    rss_idle_bytes: int
    load: float
    num_cpus: int

    def json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(asdict(self), indent=2)

    def lines(self) -> str:
        """Return the report as a table."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"load {self.load:.1f} on {self.num_cpus} CPUs"
        for name, times in (("client", self.client_submit_s), ("HTTP", self.http_submit_s)):
            yield (f"submit, {name:<12} p50 {_ms(times, 50):7.2f} ms   p95 {_ms(times, 95):7.2f} ms   n {len(times)}")
        ratio = statistics.median(self.http_submit_s) / statistics.median(self.client_submit_s)
        yield f"ratio of medians     {ratio:.2f}"
        for name, rates in (("client", self.client_events_per_s), ("HTTP", self.http_events_per_s)):
            yield f"events/s, {name:<10} median {statistics.median(rates):9.0f}   n {len(rates)}"
        ratio = statistics.median(self.http_events_per_s) / statistics.median(self.client_events_per_s)
        yield f"ratio of medians     {ratio:.2f}"
        before, idle = self.rss_before_bytes / 2**20, self.rss_idle_bytes / 2**20
        yield f"{self.num_idle} idle readers   {idle:.0f} MiB, without them {before:.0f} MiB"


def bench_api(num_jobs: int, num_events: int, num_idle: int, repeats: int = 3) -> ApiReport:
    """Measure `num_jobs` submits each way, `repeats` streams of `num_events` each way, and `num_idle` readers."""
    load = os.getloadavg()[0]
    # The gateway inherits the limit.
    with _many_files(num_idle), StopSignals() as signals, Stack(StackOptions(num_workers=0), signals) as stack:
        stack.start_servers()
        stack.start_gateway()
        redis_url, url = stack.endpoints["VISIONQ_REDIS_URL"], stack.endpoints["VISIONQ_API_URL"]
        with Client(redis_url) as client, closing(_Api(url)) as api:
            submits = _submits(client, api, num_jobs)
            streams = [_streams(redis_url, client, api, num_events) for _ in range(repeats)]
            before = _rss_bytes(api.port)
            idle = _idle_bytes(client, api, num_idle)
    return ApiReport(
        client_submit_s=[client_s for client_s, _ in submits],
        http_submit_s=[http_s for _, http_s in submits],
        client_events_per_s=[rate for rate, _ in streams],
        http_events_per_s=[rate for _, rate in streams],
        num_idle=num_idle,
        rss_before_bytes=before,
        rss_idle_bytes=idle,
        load=load,
        num_cpus=os.cpu_count() or 1,
    )


class _Api:
    """One kept-alive connection to the gateway."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self.host, self.port = address.hostname or "", address.port or 0
        self._connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_S)

    def submit(self) -> str:
        """Hand a job in; return its id."""
        self._connection.request("POST", "/v1/jobs", _QUESTION, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != http.client.ACCEPTED:
            raise RuntimeError(f"the gateway answered {answer.status}: {body[:200]!r}")
        job_id: str = json.loads(body)["job_id"]
        return job_id

    def num_events(self, job_id: str) -> int:
        """Follow a job to its end over a connection of its own; return the number of its events."""
        with closing(http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_S)) as connection:
            connection.request("GET", f"/v1/jobs/{job_id}/events")
            answer = connection.getresponse()
            types = [json.loads(line[6:])["type"] for line in answer if line.startswith(b"data: ")]
            return len(types) - types.count("stream.gap")  # said to a reader that falls behind, and then made good

    def close(self) -> None:
        self._connection.close()


def _submits(client: Client, api: _Api, num_jobs: int) -> list[tuple[float, float]]:
    def over_client() -> None:
        client.vqa(question="hello")

    def over_http() -> None:
        api.submit()

    for _ in range(WARM_UP_JOBS):
        over_client()
        over_http()
    return [(_seconds(over_client), _seconds(over_http)) for _ in range(num_jobs)]


def _streams(redis_url: str, client: Client, api: _Api, num_events: int) -> tuple[float, float]:
    """Events per second from publishing to reading, live, by the client and over HTTP."""

    def over_client(job_id: str) -> int:
        with closing(client.job(job_id).events(timeout=TIMEOUT_S)) as events:
            num = 0
            for event in events:
                num += 1
                if isinstance(event, FinalEvent):
                    break
            return num

    return _rate(redis_url, client, over_client, num_events), _rate(redis_url, client, api.num_events, num_events)


def _rate(redis_url: str, client: Client, read: Callable[[str], int], num_events: int) -> float:
    job_id = client.vqa(question="hello").id
    with closing(Ledger.connect(redis_url, LedgerConfig(lease_s=600))) as ledger:
        claim = ledger.claim(job_id, "bench")
        if not isinstance(claim, Claim):
            raise RuntimeError(f"the bench's job was not claimed: {claim}")
        writer = threading.Thread(target=_write, args=(ledger, claim, num_events))
        begun = time.perf_counter()
        writer.start()
        num = read(job_id)
        seconds = time.perf_counter() - begun
        writer.join(TIMEOUT_S)
    if num != num_events + 3:  # queued, started, the pieces, completed
        raise RuntimeError(f"{num} events were read, {num_events + 3} were written")
    return num / seconds


def _write(ledger: Ledger, claim: Claim, num_events: int) -> None:
    """Publish as a worker does: many rows in one call."""
    for first in range(0, num_events, _BATCH):
        numbers = range(first, min(first + _BATCH, num_events))
        rows = [
            Publication(claim.job_id, claim.fence, n + 1, DeltaBody(text="word ", offset=5 * n, num_tokens=1))
            for n in numbers
        ]
        ledger.publish(rows)
    assert claim.task is not None
    result = Result(
        job_id=claim.job_id,
        task=claim.task,
        model=claim.model,
        text="word " * num_events,
        finish_reason=FinishReason.LENGTH,
        usage=Usage(completion_tokens=num_events),
        timings=Timings(),
        attempt=claim.attempt,
    )
    if ledger.finish(claim.job_id, claim.fence, CompletedBody(result=result)) is not Finished.DONE:
        raise RuntimeError("the bench's job did not end")


def _idle_bytes(client: Client, api: _Api, num_idle: int) -> int:
    """Return the gateway's memory while readers wait for jobs that nobody takes."""
    job_ids = [client.vqa(question="hello").id for _ in range(min(IDLE_JOBS, num_idle))]
    readers: list[socket.socket] = []
    try:
        for number in range(1, num_idle + 1):
            readers.append(reader := socket.create_connection((api.host, api.port), TIMEOUT_S))
            path = f"/v1/jobs/{job_ids[number % len(job_ids)]}/events"
            reader.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            if number % _BATCH == 0 or number == num_idle:
                _await_event(reader)  # readers come in numbers, not all at the same moment
        return _rss_bytes(api.port)
    finally:
        for reader in readers:
            reader.close()


def _await_event(reader: socket.socket) -> None:
    received = b""
    while b"job.queued" not in received:
        received += (piece := reader.recv(4096))
        if not piece or b"HTTP/1.1 5" in received:
            raise RuntimeError(f"the gateway refused a reader: {received[:200]!r}")


@contextmanager
def _many_files(num: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, num + 1024), hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _rss_bytes(port: int) -> int:
    """Return the memory of the child process that listens on a port."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (directory / "cmdline").read_bytes().split(b"\0")
            if b"api" in arguments and str(port).encode() in arguments:
                return int((directory / "statm").read_text().split()[1]) * resource.getpagesize()
        except OSError:
            continue  # it ended meanwhile
    raise RuntimeError(f"no gateway on port {port}")


def _seconds(step: Callable[[], None]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def _ms(times: Sequence[float], percent: int) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1] * 1e3
