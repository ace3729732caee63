"""The doorbell that the ledger pushes itself: the message that a Celery producer would put into the broker's list.

The layout is the public one of Celery's message protocol 2 inside kombu's Redis transport.
"""

from __future__ import annotations

import base64
import json
from typing import Final

from api_stub.contract.job import TaskName
from api_stub.contract.names import DOORBELL_HEADER

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
