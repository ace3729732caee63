"""The scripts' text: one Lua file per transition, behind the shared functions and the contract's names.

Names, error codes and limits are rendered into the text from the contract and the settings, so that they exist once.
Keys are computed inside the scripts: the ledger lives in one Redis database, never in a cluster. The doorbell's
message, which the scripts push into the broker's list, is the one that a Celery producer would put there: Celery's
message protocol 2 inside the layout of kombu's Redis transport.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from importlib.resources import files
from typing import Final

from api_stub.contract import names
from api_stub.contract.error import RETRYABLE_CODES
from api_stub.contract.event import MAX_TRAINING_EVENTS, VERSION, Stage
from api_stub.contract.job import TaskName
from api_stub.contract.names import DOORBELL_HEADER
from api_stub.contract.result import FAILURE_CLASS, FAILURE_MODULE
from api_stub.contract.status import CELERY_STATES
from api_stub.ledger.settings import SHARED_SETTINGS, LedgerConfig

#: Rung for a job of no known task: the worker fails it under any name.
FALLBACK_TASK: Final = TaskName.VQA
_BODY: Final = [[], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]


def message_template() -> str:
    """Return the message's JSON; `<id>`, `<task>`, `<queue>`, `<tag>` and `<priority>` stand for JSON values."""
    message = {
        "body": base64.b64encode(json.dumps(_BODY).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": "<task>",
            "id": "<id>",
            "root_id": "<id>",
            "parent_id": None,
            "group": None,
            "ignore_result": True,
            DOORBELL_HEADER: 1,
        },
        "properties": {
            "correlation_id": "<id>",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "<queue>"},
            "priority": "<priority>",
            "body_encoding": "base64",
            "delivery_tag": "<tag>",
        },
    }
    text = json.dumps(message)
    for name in ("task", "id", "queue", "priority", "tag"):
        text = text.replace(f'"<{name}>"', f"<{name}>")
    return text


class Transition(StrEnum):
    """The scripts. The value is the file's name."""

    SUBMIT = "submit"
    CLAIM = "claim"
    BEAT = "beat"
    LOADING = "loading"
    LEAVE = "leave"
    PUBLISH = "publish"
    FINISH = "finish"
    GIVE_BACK = "give_back"
    KEEP = "keep"
    CANCEL = "cancel"
    RING_AGAIN = "ring_again"
    REAP = "reap"
    VIEW = "view"
    LIST_JOBS = "list_jobs"
    REPLAY = "replay"
    RETRY = "retry"
    DEAD = "dead"
    DROP = "drop"
    PAUSE = "pause"
    PURGE = "purge"
    CANCEL_JOBS = "cancel_jobs"
    DELETE = "delete"
    KNOWN = "known"
    TAKE_DELIVERIES = "take_deliveries"
    SETTLE_DELIVERY = "settle_delivery"
    TAKE_LINKED = "take_linked"
    SETTLE_LINKED = "settle_linked"
    WISH = "wish"


#: Parts that some scripts share, read behind what all of them share.
_PARTS: Final[dict[Transition, tuple[str, ...]]] = {
    Transition.SUBMIT: ("_known", "_queue", "_create"),
    Transition.RETRY: ("_known", "_queue", "_create"),
    Transition.BEAT: ("_known", "_queue"),
    Transition.LOADING: ("_known",),
    Transition.KNOWN: ("_known",),
    Transition.RING_AGAIN: ("_queue",),
    Transition.CLAIM: ("_known", "_queue", "_ending"),
    Transition.FINISH: ("_known", "_queue", "_ending"),
    Transition.GIVE_BACK: ("_known", "_queue", "_ending"),
    Transition.CANCEL: ("_known", "_queue", "_ending", "_cancel"),
    Transition.CANCEL_JOBS: ("_known", "_queue", "_ending", "_cancel"),
    Transition.PAUSE: ("_known", "_queue"),
    Transition.PURGE: ("_known", "_queue", "_ending"),
    Transition.REAP: ("_known", "_queue", "_ending"),
    Transition.SETTLE_LINKED: ("_known", "_queue", "_ending"),
    Transition.VIEW: ("_queue", "_view"),
    Transition.LIST_JOBS: ("_queue", "_view"),
    Transition.DEAD: ("_queue", "_view"),
}


def script(transition: Transition, config: LedgerConfig) -> str:
    """Return the complete text of a transition's script."""
    parts = ("_common", *_PARTS.get(transition, ()), transition)
    text = "\n".join(map(_read, parts))
    return f"{_constants(config, text)}\n{text}"


def _read(name: str) -> str:
    return files(__package__).joinpath("scripts", f"{name}.lua").read_text("utf-8")


def _constants(config: LedgerConfig, text: str) -> str:
    """Return the tables that `text` uses, with the members that it names: Redis makes them anew for every call."""
    keys = {
        "job": names.job_key(""),
        "events": names.events_key(""),
        "result": names.result_key(""),
        "depth": names.depth_key(""),
        "workers": names.workers_key(""),
        "jobs": names.jobs_key(""),
        "waiting": names.waiting_key(""),
        "watermark": names.watermark_key(""),
        "held": names.held_key("", "").removesuffix(":"),
        "turns": names.turns_key(""),
        "tenants": names.tenants_key(""),
        "suspects": names.suspects_key(""),
        "aged": names.aged_key(""),
        "strange": names.strange_key(""),
        "turn": names.TURN_KEY,
        "num_held": names.NUM_HELD_KEY,
        "paused": names.PAUSED_KEY,
        "leases": names.LEASES_KEY,
        "settings": names.SETTINGS_KEY,
        "queue": names.queue(""),
        "separator": names.PRIORITY_SEPARATOR,
        "due": names.DUE_KEY,
        "dead": names.DEAD_KEY,
        "fence": names.FENCE_KEY,
        "submitted": names.SUBMITTED_KEY,
        "lists": names.LISTS_KEY,
        "news": names.NEWS_KEY,
        "serving": names.SERVING_KEY,
        "known": names.KNOWN_KEY,
        "unserved": names.UNSERVED_KEY,
        "sweep": names.SWEEP_KEY,
        "watch": names.WATCH_KEY,
        "counts": names.COUNTS_KEY,
        "cancel": names.CANCEL_CHANNEL,
        "deliveries": names.DELIVERIES_KEY,
        "delivery": names.delivery_key(""),
        "given_up": names.GIVEN_UP_KEY,
        "gone": names.gone_key(""),
        "linked": names.LINKED_KEY,
        "serves": names.serves_key(""),
        "wanted": names.wanted_key(""),
    }
    tables = {
        "KEY": keys,
        "CONFIG": asdict(config),
        "SHARED": {"settings": " ".join(f"{name}={getattr(config, name):.9g}" for name in SHARED_SETTINGS)},
        "CELERY_STATE": {status.value: state.value for status, state in CELERY_STATES.items()},
        "RETRYABLE": {code.value: "true" for code in sorted(RETRYABLE_CODES)},
        "EVENT": {"version": VERSION},
        "DOORBELL": {"message": message_template(), "task": FALLBACK_TASK.value},
        "STEP": {str(step): place for place, step in enumerate(names.PRIORITY_STEPS)},
        "FAILURE": {"class": FAILURE_CLASS, "module": FAILURE_MODULE},
        "TRAINING": {
            "progress": f'"type":"job.progress","stage":"{Stage.TRAINING}"',
            "kept_events": MAX_TRAINING_EVENTS,
        },
    }
    used = {name: _used(name, members, text) for name, members in tables.items()}
    return "\n".join(f"local {name} = {_table(members)}" for name, members in used.items() if members)


def _used(table: str, members: Mapping[str, object], text: str) -> Mapping[str, object]:
    """Return what `text` uses of a table: all of one that it indexes or walks through."""
    if f"{table}[" in text or f"({table})" in text:
        return members
    return {name: value for name, value in members.items() if f"{table}.{name}" in text}


def _table(members: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"[{_literal(name)}] = {_literal(value)}" for name, value in members.items()) + "}"


def _literal(value: object) -> str:
    if isinstance(value, str):
        return '"' + "".join(c if c.isalnum() or c in ":._-" else f"\\{ord(c):03d}" for c in value) + '"'
    return repr(value)
