"""Another Celery app, which knows nothing of visionq: its worker notes what it is sent, under a key of its own."""

from __future__ import annotations

import json
import os
from typing import Any

import redis
from celery import Celery

URL = os.environ.get("FOREIGN_REDIS_URL", "redis://127.0.0.1:1/0")
NOTES = "foreign:notes:"

app = Celery("foreign", broker=URL, backend=URL, set_as_current=False)
app.conf.update(
    broker_connection_retry_on_startup=True, worker_hijack_root_logger=False, worker_enable_remote_control=False
)


@app.task(bind=True, name="foreign.note")
def note(self: Any, *args: object, key: str) -> object:
    """Write down the arguments and where they came from; return the first argument's text with an exclamation mark."""
    about = {
        "args": args, "id": self.request.id, "parent_id": self.request.parent_id, "root_id": self.request.root_id
    }  # fmt: skip
    with redis.Redis.from_url(URL) as client:
        client.rpush(NOTES + key, json.dumps(about))
    said = args[0] if args else None
    return f"{said['text']}!" if isinstance(said, dict) else said


@app.task(name="foreign.ask")
def ask(question: str) -> str:
    """Return the question: the first task of a chain."""
    return question
