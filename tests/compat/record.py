"""Records what a worker of an earlier release leaves in Redis: `python -m tests.compat.record TREE`, its checkout.

Out: `recorded.json` beside this file, `{jobs: {what it shows: job id}, keys: {name: [type, value]}}`. Its values are
read as text; times are those of the recording.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import redis

from tests.compat.earlier import FOLDER, Earlier
from tests.servers import RedisServer, eventually

RECORDED = FOLDER / "recorded.json"
HOOK = {"url": "https://example.org/", "events": ["job.completed", "job.failed", "job.cancelled", "job.expired"]}
LONG = {"max_new_tokens": 1500, "min_new_tokens": 1500, "temperature": 2.0, "seed": 1}


def dump(client: redis.Redis) -> dict[str, list[Any]]:
    """Return all that is in Redis."""
    readers: dict[str, Any] = {
        "string": client.get, "hash": client.hgetall, "list": lambda key: client.lrange(key, 0, -1),
        "set": lambda key: sorted(client.smembers(key)), "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        "stream": client.xrange,
    }  # fmt: skip
    return {key: [kind := client.type(key), readers[kind](key)] for key in sorted(client.scan_iter("*"))}


def restore(client: redis.Redis, keys: dict[str, list[Any]]) -> None:
    """Write it all again."""
    for key, (kind, value) in keys.items():
        match kind:
            case "string":
                client.set(key, value)
            case "hash":
                client.hset(key, mapping=value)
            case "list":
                client.rpush(key, *value)
            case "set":
                client.sadd(key, *value)
            case "zset":
                client.zadd(key, dict(value))
            case "stream":
                for entry_id, fields in value:
                    client.xadd(key, fields, id=entry_id)


def main(tree: Path) -> None:
    """Run a worker of `tree`, kill it amid a job, and write down what is there then."""
    directory = Path(tempfile.mkdtemp())
    server = RedisServer(directory)
    earlier = Earlier(server.url, lease_s=15.0)
    variables = {"PYTHONPATH": str(tree), "VISIONQ_REDIS_URL": server.url, "VISIONQ_MODEL": "demo"}
    with (directory / "log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "worker.cli", "start"], cwd=tree, env=os.environ | variables, stdout=log, stderr=log
        )
    try:
        eventually(lambda: b"worker ready" in (directory / "log").read_bytes(), 240, "the worker is ready")

        def submit(**fields: Any) -> str:
            fields = {"task": "visionq.vqa", "question": "hello", "webhook": HOOK} | fields
            return str(earlier("client.submit(fields).id", fields=fields))

        def ends(job_id: str) -> None:
            eventually(lambda: earlier("client.job(i).status()", i=job_id)["status"] in ("completed", "failed"), 60)

        jobs = {"completed": submit(), "failed": submit(question="x " * 9000)}
        ends(jobs["completed"])
        ends(jobs["failed"])
        jobs["lost"] = submit(sampling=LONG)
        eventually(lambda: earlier("client.job(i).status()", i=jobs["lost"])["status"] == "in_progress", 60)
        worker.send_signal(signal.SIGKILL)
        worker.wait(20)
        jobs["cancelled"] = submit()
        earlier("client.job(i).cancel()", i=jobs["cancelled"])
        jobs["expired"] = submit(deadline_s=0.05)
        eventually(
            lambda: earlier("[ledger.reap(), client.job(i).status()][1]", i=jobs["expired"])["status"] == "expired", 10
        )
        jobs["queued"] = submit()
        with server.client() as client:
            text = json.dumps({"jobs": jobs, "keys": dump(client)}, indent=0, ensure_ascii=False)
        RECORDED.write_text(text + "\n", encoding="utf-8")
    finally:
        worker.kill()
        worker.wait(20)
        earlier.close()
        server.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
