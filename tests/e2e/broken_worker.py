"""A worker that breaks: `python -m tests.e2e.broken_worker`; broken_supervisor.py runs it.

Each start takes the first line of the file BREAKS: `stall` (the model's forward never returns), `mute` (the consumer
leaves its queue and nobody notices), nothing (a healthy worker).
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from celery import signals

import worker.bootstrap
import worker.cli
from worker.models.loader import LoadedModel
from worker.settings import WorkerSettings

BREAKS = Path(os.environ["BREAKS"])
load = worker.bootstrap.load
is_serving = threading.Event()


def next_break() -> str:
    first, _, rest = BREAKS.read_text().partition("\n")
    BREAKS.write_text(rest)
    return first


def load_a_model_that_stalls(settings: WorkerSettings) -> LoadedModel:
    loaded = load(settings)

    def stall(*_: object) -> None:
        if is_serving.is_set():
            threading.Event().wait()

    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(stall)
    return loaded


def note_serving(**_: Any) -> None:
    is_serving.set()


def leave_the_queue(sender: Any, **_: Any) -> None:
    sender.task_consumer.cancel()


def main() -> None:
    kind = next_break()
    if kind == "stall":
        worker.bootstrap.load = load_a_model_that_stalls  # type: ignore[attr-defined]
        signals.worker_ready.connect(note_serving)
    elif kind == "mute":
        signals.worker_ready.connect(leave_the_queue)
    sys.argv[1:] = ["start"]
    worker.cli.main()


if __name__ == "__main__":
    main()
