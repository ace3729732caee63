"""What must not be left when all is quiet: keys, messages, threads, file handles, processes, scratch files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis

from api_stub.contract import names
from api_stub.contract.status import JobStatus
from tests.survivors import processes_of

ENDED: Final = frozenset(status.value for status in JobStatus if status.is_final)
MODEL: Final = names.DEFAULT_MODEL_NAME
#: Keys without an end of life: one of each, however many jobs there were.
SINGLETONS: Final = frozenset(
    {str(value) for name, value in vars(names).items() if name.endswith("_KEY")}
    - {names.DUE_KEY, names.UNSERVED_KEY, names.DEAD_KEY}  # nothing is due and nobody was given up
    | {names.watermark_key(names.list_id(MODEL, step)) for step in names.PRIORITY_STEPS}
    | {names.depth_key(MODEL), "unacked", "unacked_index"}
    | {f"_kombu.{kind}.{names.queue(MODEL)}" for kind in ("binding", "binding_permanent")}
)
#: How the delivery tags of junk begin.
JUNK_TAG: Final = "junk-"
#: A worker's handles and threads beyond one per job it can hold: model, logs, Celery's, kombu's and botocore's own.
MAX_OTHER_HANDLES: Final = 60
MAX_OTHER_THREADS: Final = 30


#: What a worker has open for each of its decoders: two pipes.
HANDLES_OF_DECODER: Final = 2


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process holds. `resident_bytes` is its resident set; `handles` tells its open files by kind.

    num_decoders: its decoder processes, of which there are as many as files were ever decoded at once, within a limit;
    each ends after some hundred files, so their number goes down and up again.
    """

    num_threads: int
    num_handles: int
    resident_bytes: int
    handles: str = ""
    num_decoders: int = 0

    @property
    def num_other_handles(self) -> int:
        """Open files beside those of the decoders."""
        return self.num_handles - HANDLES_OF_DECODER * self.num_decoders


def usage_of(pid: int) -> Usage:
    """Ask the kernel about a process. Raises OSError when it is gone."""
    process = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    kinds = Counter(_kind(handle) for handle in (process / "fd").iterdir())
    return Usage(
        num_threads=int(fields["Threads"]),
        num_handles=kinds.total(),
        resident_bytes=int(fields["VmRSS"].split()[0]) * 1024,
        handles=", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8)),
        num_decoders=sum("worker.media.decoder" in _command(child) for child in _children(process)),
    )


def _children(process: Path) -> list[str]:
    children: list[str] = []
    for thread in (process / "task").iterdir():
        with suppress(OSError):  # the thread has ended
            children += (thread / "children").read_text().split()
    return children


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:  # it has ended
        return ""


def _kind(handle: Path) -> str:
    """Return what is open: `socket`, `pipe`, …, or a file's name."""
    try:
        target = str(handle.readlink())
    except OSError:
        return "closed"
    return target if target.startswith("/") else target.partition(":")[0]


def queued_messages(direct: redis.Redis) -> int:
    """Doorbells that nobody has taken yet."""
    return sum(int(direct.llen(names.queue_list(MODEL, step))) for step in names.PRIORITY_STEPS)


def junk_held(direct: redis.Redis) -> list[str]:
    """Junk that lies among the messages that workers hold."""
    return [tag for tag in direct.hkeys("unacked") if tag.startswith(JUNK_TAG)]


def key_problems(direct: redis.Redis) -> list[str]:
    """Return the keys that nothing will ever remove, and counters that are off."""
    problems = [
        f"key without an end of life: {key!r}"
        for key in direct.scan_iter(count=1000)
        if key not in SINGLETONS and direct.ttl(key) < 0
    ]
    if (depth := int(direct.get(names.depth_key(MODEL)) or 0)) != 0:
        problems.append(f"{names.depth_key(MODEL)} is {depth} with all jobs final")
    return problems


def passing_keys(direct: redis.Redis) -> list[str]:
    """Return the keys of jobs; those of workers and tenants are few, and renewed as long as there are any."""
    of_workers = (names.workers_key(""), names.suspects_key(""), names.serves_key(""))
    lasting = (*of_workers, names.jobs_key(""), "_kombu", "unacked")
    return [key for key in direct.scan_iter(count=1000) if key not in SINGLETONS and not key.startswith(lasting)]


def message_problems(direct: redis.Redis, plain_ids: Collection[str] = ()) -> list[str]:
    """Return the unacknowledged messages that cannot be explained: each must belong to a job that is over.

    Those of killed workers stay until kombu's visibility timeout and are skipped then. A plain message, one of
    `plain_ids`, that was held before the ledger knew its job comes back then, too: until its adoption it has the
    broker's guarantees only.
    """
    problems = []
    for raw in direct.hvals("unacked"):
        headers = json.loads(raw)[0]["headers"]
        status = str(direct.hget(names.job_key(headers["id"]), "status"))
        is_on_its_way = status == "None" and headers["id"] in plain_ids
        if status not in ENDED and not is_on_its_way:
            problems.append(f"unacknowledged message of {headers['id']}, which is {status}")
    if (extra := int(direct.zcard("unacked_index")) - int(direct.hlen("unacked"))) != 0:
        problems.append(f"{extra} entries of unacked_index have no message")
    return problems


def usage_problems(pid: int, usage: Usage, concurrency: int) -> list[str]:
    """Return what a quiet worker holds too much of."""
    problems = []
    if usage.num_threads > (limit := concurrency + MAX_OTHER_THREADS):
        problems.append(f"worker {pid} has {usage.num_threads} threads, the limit is {limit}")
    if usage.num_handles > (limit := 3 * concurrency + MAX_OTHER_HANDLES):
        problems.append(f"worker {pid} has {usage.num_handles} open files, the limit is {limit}: {usage.handles}")
    return problems


def remains(scratch: Path) -> list[str]:
    """Return what workers that have ended left behind: files and processes."""
    files = [
        f"left behind: {path.relative_to(scratch)}"
        for path in scratch.rglob("*")
        if path.is_file() or "visionq" in path.name
    ]
    return files + [f"still running: {command}" for command in processes_of(scratch)]
