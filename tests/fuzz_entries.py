"""Entries of a broker's list as nobody should write them, drawn from a seed, and what becomes of each.

`python -m tests.fuzz_entries --count 1000000` passes them through a worker's receiving code in this process, over a
real Redis; with `--live` they are pushed to a worker of its own, with good jobs in between, which all must be answered.
"""

from __future__ import annotations

import argparse
import base64
import bz2
import json
import logging
import lzma
import random
import sys
import tempfile
import time
import urllib.request
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from kombu import Consumer, Queue
from kombu.utils import json as kombu_json
from pydantic import SecretStr

from api_stub.contract import names
from api_stub.contract.error import ErrorCode
from api_stub.contract.job import MAX_JOB_BYTES, TaskName
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server, eventually, free_port
from worker.broker.app import make_app
from worker.jobs.claim import Claimer
from worker.jobs.entry import MAX_ENTRY_BYTES, DropReason, Entry, Unreadable, read_entry
from worker.jobs.message import read_message
from worker.settings import WorkerSettings

QUEUE: Final = names.queue("default")
QUESTION: Final = {"question": "hello", "sampling": {"max_new_tokens": 1}}
DEPTHS: Final = (3, 30, 126, 199, 254, 480, 700, 900, 990, 5_000, 100_000)
SECRET: Final = "hunter2"

Draw = random.Random


def _deep(draw: Draw) -> str:
    """JSON text that is nested, closed or not."""
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}"), ('[{"":', "}]")))
    depth = draw.choice(DEPTHS)
    return opening * depth + "1" + (closing * depth if draw.random() < 0.8 else "")


def _odd_text(draw: Draw) -> str:
    """One odd JSON value, as text."""
    return draw.choice(
        (
            "null", "true", "false", "0", "-1", "1.5", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "[]", "{}",
            '""', '" "', '"\\u0000"', '"\\ud800"', '"a\\nb"', '"' + "x" * 300 + '"', "9" * 400, "9" * 5_000, "[1]",
            '{"__type__":"decimal","__value__":"x"}', '{"__type__":"uuid","__value__":{"hex":1}}',
            '{"__type__":"bytes","__value__":1}', '{"__type__":"nope","__value__":1}', '{"a":1,"a":2}', '"gzip"',
            '"\U0001f600"', '"' + SECRET + '\\n"', _deep(draw), json.dumps(_noise(draw)),
        )
    )  # fmt: skip


def _noise(draw: Draw, depth: int = 0) -> object:
    kind = draw.randrange(7 if depth < 4 else 5)
    if kind == 5:
        return [_noise(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 6:
        return {draw.choice(("id", "task", "args", "kwargs", "a", "")): _noise(draw, depth + 1) for _ in range(3)}
    return (
        None,
        draw.random() < 0.5,
        draw.randrange(-(10**12), 10**12),
        draw.random(),
        "".join(map(chr, _points(draw))),
    )[kind]


def _points(draw: Draw) -> list[int]:
    return [draw.randrange(0x3000) for _ in range(draw.randrange(12))]


def _written(fields: dict[str, object], odd: dict[str, str]) -> str:
    """Write an object of which some values are given as text, so that they need be no JSON; `odd` may add a second."""
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items() if name not in odd]
    return "{" + ", ".join(parts + [f"{json.dumps(name)}: {text}" for name, text in odd.items()]) + "}"


def _some_odd(draw: Draw, names_of: Sequence[str]) -> dict[str, str]:
    return {draw.choice(names_of): _odd_text(draw) for _ in range(draw.choice((0, 0, 1, 1, 2)))}


HEADERS: Final = ("id", "task", "lang", "eta", "expires", "retries", "timelimit", "compression", "root_id", "group",
                  "parent_id", "origin", "argsrepr", "ignore_result", "stamps", "visionq-doorbell", "redelivered",
                  "visionq-refused")  # fmt: skip
PROPERTIES: Final = ("correlation_id", "reply_to", "delivery_mode", "delivery_info", "priority", "body_encoding",
                     "delivery_tag", "type", "expiration")  # fmt: skip
MESSAGE: Final = ("body", "content-type", "content-encoding", "headers", "properties", "redelivered", "x")
FIELDS: Final = ("question", "sampling", "media", "messages", "model", "metadata", "webhook", "tenant", "priority",
                 "deadline_s", "media_options", "task", "self", "args", "colour")  # fmt: skip
METHODS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "gzip": zlib.compress, "application/x-gzip": zlib.compress, "bzip2": bz2.compress, "xz": lzma.compress,
    "zstd": bytes, "brotli": bytes, "rot13": bytes,
}  # fmt: skip


def message(
    job_id: str,
    body: bytes,
    *,
    headers: dict[str, object] | None = None,
    odd: tuple[dict[str, str], dict[str, str], dict[str, str]] = ({}, {}, {}),
    encoding: str | None = "base64",
    task: str | None = "visionq.vqa",
) -> bytes:
    """Return a list entry as kombu writes it. `odd` replaces headers, properties and parts by JSON texts."""
    said = headers or {}
    if task is not None:
        said = {"task": task, "id": job_id, "lang": "py"} | said
    properties: dict[str, object] = {
        "correlation_id": job_id, "delivery_mode": 2, "priority": 0, "delivery_tag": str(uuid.UUID(int=7)),
        "delivery_info": {"exchange": "", "routing_key": QUEUE},
    }  # fmt: skip
    text = base64.b64encode(body).decode() if encoding == "base64" else body.decode(errors="replace")
    if encoding is not None:
        properties["body_encoding"] = encoding
    parts = {"headers": _written(said, odd[0]), "properties": _written(properties, odd[1])}
    rest: dict[str, object] = {"body": text, "content-encoding": "utf-8", "content-type": "application/json"}
    return _written(rest, parts | odd[2]).encode(errors="surrogatepass")


def good(job_id: str) -> bytes:
    """Return an entry that is a good job."""
    return message(job_id, json.dumps([[], QUESTION, {}]).encode())


def entry(draw: Draw) -> bytes:
    """Return an odd entry; most have an id that is a UUID of the draw."""
    job_id = str(uuid.UUID(int=draw.getrandbits(128), version=4))
    kind = draw.randrange(20)
    whole = message(job_id, _body(draw), odd=(_some_odd(draw, HEADERS), _some_odd(draw, PROPERTIES), {}))
    if kind == 0:
        return draw.randbytes(draw.choice((0, 1, 7, 200, 10_000)))
    if kind == 1:
        return _odd_text(draw).encode(errors="surrogatepass")
    if kind == 2:
        return whole[: draw.randrange(len(whole))] if draw.random() < 0.5 else whole[draw.randrange(len(whole)) :]
    if kind == 3:
        flipped = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            flipped[draw.randrange(len(flipped))] = draw.randrange(256)
        return bytes(flipped)
    if kind == 4:
        return message(job_id, _body(draw), odd=({}, {}, _some_odd(draw, MESSAGE)))
    if kind in (5, 6):
        packed, method = _body(draw), draw.choice(list(METHODS))
        if draw.random() < 0.9:
            packed = METHODS[method](packed)
        if draw.random() < 0.2:
            packed = packed[: draw.randrange(len(packed) + 1)]
        return message(job_id, packed, headers={"compression": method})
    if kind == 7:  # protocol 1
        said = {"id": job_id, "task": draw.choice(("visionq.vqa", "no.such")), "args": [], "kwargs": {}}
        return message(
            job_id,
            _written(said, _some_odd(draw, ("id", "task", "args", "kwargs"))).encode(errors="replace"),
            task=None,
        )
    if kind == 8:
        return message(
            job_id, b"[[], {}, {}]", headers={names.DOORBELL_HEADER: 1}, odd=(_some_odd(draw, HEADERS), {}, {})
        )
    if kind == 9:
        embed = _written({}, {draw.choice(("callbacks", "errbacks", "chain", "chord")): _odd_text(draw)})
        return message(job_id, f"[[], {json.dumps(QUESTION)}, {embed}]".encode(errors="replace"))
    if kind == 10:
        task = draw.choice(("celery.chord_unlock", "celery.map", "celery.group", "no.such", "visionq.finetune", ""))
        return message(job_id, json.dumps([[], {"secret": SECRET}, {}]).encode(), task=task)
    if kind == 11 and draw.random() < 0.01:
        huge = draw.choice((MAX_JOB_BYTES, MAX_ENTRY_BYTES, MAX_ENTRY_BYTES + 9, 6 * MAX_ENTRY_BYTES))
        return message(job_id, draw.choice((b"x", b"[", b"{},")) * (huge // 2), encoding=draw.choice(("base64", None)))
    return whole


def _body(draw: Draw) -> bytes:
    kind = draw.randrange(8)
    if kind == 0:
        return draw.randbytes(draw.randrange(60))
    if kind == 1:
        return _odd_text(draw).encode(errors="surrogatepass")
    if kind == 2 and draw.random() < 0.02:
        return b" " * draw.choice((MAX_JOB_BYTES, 3_000_000))
    odd = _some_odd(draw, FIELDS) or {"colour": "1"}
    kwargs = _odd_text(draw) if kind == 3 else _written(dict(QUESTION), odd)
    args = _odd_text(draw) if kind == 4 else "[]"
    text = f"[{args}, {kwargs}, {{}}]"
    return text.encode(draw.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1")), errors="replace")


def entries(seed: int) -> Iterator[bytes]:
    """Yield the entries of a seed, without end."""
    draw = random.Random(seed)
    while True:
        yield entry(draw)


class Receiver:
    """A worker's receiving code in this process: from the bytes of an entry to a job, its refusal or its drop.

    Without `notes` Redis keeps no copies of the messages that are held, which costs most of the time.
    """

    def __init__(self, url: str, *, notes: bool = True) -> None:
        self.outcomes: Counter[str] = Counter()
        self._app = make_app(WorkerSettings(redis_url=SecretStr(url)), None, lambda reason: self._ends(reason.value))
        self._app.conf.broker_transport_options["ack_emulation"] = notes
        self._claimer = Claimer(Ledger.connect(url, LedgerConfig()), worker="fuzz", model="default")
        self._connection = self._app.connection_for_read()
        self._consumer = Consumer(
            self._connection, [Queue(QUEUE)], on_message=self._message, accept=["json"], auto_declare=False
        )
        self._consumer.consume()
        self._num_ends = 0

    def close(self) -> None:
        self._connection.release()
        self._app.close()

    def take(self, raw: bytes) -> None:
        """Receive one entry. Raises whatever would have ended the worker, AssertionError for no or two ends."""
        self._num_ends = 0
        self._consumer.channel._receive(raw, QUEUE)
        assert self._num_ends == 1, f"{self._num_ends} ends"
        assert not self._consumer.channel.qos._delivered.keys() - self._consumer.channel.qos._dirty, "not acknowledged"

    def _ends(self, outcome: str) -> None:
        assert outcome != DropReason.BROKE, "the last net was needed"
        self._num_ends += 1
        self.outcomes[outcome] += 1

    def _message(self, message: Any) -> None:
        assert set(TaskName) >= {message.headers["task"]}
        _, kwargs, _ = message.decode()
        entry = Entry.from_json(kwargs["entry"])
        kept = kombu_json.loads(kombu_json.dumps(message._raw))
        assert read_entry(json.dumps(kept).encode()) == entry, "what a requeue puts back says the same"
        try:
            job_message = read_message(entry)
        except Unreadable as error:
            self._ends(error.reason.value)
        else:
            if job_message.fields is None:
                self._ends("doorbell")
            else:
                job, problem = self._claimer._read(job_message, job_message.fields)
                assert (job is None) == (problem is not None)
                self._ends("job" if job is not None else "refused")
        message.ack()


def receive(url: str, count: int, seed: int, *, notes: bool = True) -> Counter[str]:
    """Pass `count` entries through the receiving code. Without `notes` Redis keeps no copy of each meanwhile."""
    receiver = Receiver(url, notes=notes)
    try:
        for index, raw in zip(range(count), entries(seed), strict=False):
            try:
                receiver.take(raw)
            except BaseException as error:
                error.add_note(f"entry {index} of seed {seed}: {raw[:2_000]!r}")
                raise
    finally:
        receiver.close()
    return receiver.outcomes


def expected(raw: bytes) -> tuple[str | None, str]:
    """Return the id under which an entry is answered, and what it is: doorbell, plain, or the reason of its drop."""
    try:
        job_message = read_message(read_entry(raw))
    except Unreadable as error:
        return None, error.reason.value
    return job_message.job_id, "doorbell" if job_message.fields is None else "plain"


def live(server: RedisServer, worker: WorkerProcess, metrics_port: int, count: int, seed: int) -> Counter[str]:
    """Push `count` entries to a worker, a good job after every twentieth, and account for each."""
    found: Counter[str] = Counter()
    ids: set[str] = set()
    good_ids: list[str] = []
    steps = names.PRIORITY_STEPS
    draw = random.Random(seed)
    before = dropped(metrics_port)
    with server.client() as client:
        for index, raw in zip(range(count), entries(seed), strict=False):
            job_id, kind = expected(raw)
            if job_id is not None and job_id in ids:
                continue  # one job under one id: what becomes of a second is another test's
            if kind == "plain" and job_id is not None:
                ids.add(job_id)
            found[kind] += 1
            client.lpush(names.queue_list("default", draw.choice(steps)), raw)
            if index % 20 == 19:
                good_ids.append(str(uuid.uuid4()))
                client.lpush(QUEUE, good(good_ids[-1]))
        ledger = Ledger.connect(server.url, LedgerConfig())
        for job_id in good_ids:
            eventually(lambda job_id=job_id: _status(ledger, job_id) == "completed", 300, f"{job_id} is answered")
        for job_id in ids:
            eventually(lambda job_id=job_id: _is_final(ledger, job_id), 300, f"{job_id!r} is final")
            view = ledger.view(job_id)
            assert view is not None
            found[str(view.status)] += 1
            if view.error is not None:
                assert view.error.code in (ErrorCode.INVALID_REQUEST, ErrorCode.MODEL_MISMATCH), view
        # How deep JSON may be nested depends on the caller's own depth, so that a reason may be another one there.
        drops = sum(found[reason.value] for reason in DropReason)
        try:
            eventually(lambda: (dropped(metrics_port) - before).total() == drops, 30, "each drop is counted")
        except AssertionError as error:
            error.add_note(f"expected {drops}, counted {dropped(metrics_port) - before}")
            raise
        eventually(lambda: not client.hlen("unacked"), 20, "nothing stays unacknowledged")
    assert worker.process.poll() is None, worker.text()[-4_000:]
    told = [line for line in worker.text().splitlines() if SECRET in line]
    assert not told, told[:5]
    ledger.close()
    return found | Counter({"good": len(good_ids)})


def _status(ledger: Ledger, job_id: str) -> str:
    view = ledger.view(job_id)
    return "" if view is None else view.status.value


def _is_final(ledger: Ledger, job_id: str) -> bool:
    return _status(ledger, job_id) in {"completed", "failed", "expired", "cancelled"}


def dropped(port: int) -> Counter[str]:
    """Read a worker's metric of dropped messages, by reason."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        lines = [
            line for line in reply.read().decode().splitlines() if line.startswith("visionq_messages_dropped_total")
        ]
    return Counter({line.split('reason="')[1].split('"')[0]: int(float(line.rsplit(" ", 1)[1])) for line in lines})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--live", action="store_true")
    asked = parser.parse_args()
    logging.disable()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder))
        try:
            if asked.live:
                outcomes = _live(Path(folder), server, asked.count, asked.seed)
            else:
                outcomes = receive(server.url, asked.count, asked.seed, notes=False)
        finally:
            server.stop()
    facts = {"count": asked.count, "seed": asked.seed, "seconds": round(time.monotonic() - began, 1)}
    sys.stdout.write(json.dumps(facts | {"outcomes": dict(outcomes.most_common())}) + "\n")
    return 0


def _live(folder: Path, server: RedisServer, count: int, seed: int) -> Counter[str]:
    s3, port = S3Server(folder), free_port()
    worker = WorkerProcess(folder, server.url, s3.url, model="demo", http_port=port, lease_s=6, beat_s=1, grace_s=2)
    try:
        return live(server, worker.wait_ready(), port, count, seed)
    finally:
        worker.kill()
        s3.stop()


if __name__ == "__main__":
    sys.exit(main())
