"""Runs what it is told with the packages of an earlier release. A program by itself: it imports nothing of this one.

In: one JSON object per line, `code` (Python) and `given` (its variables). Out: `answer`, which the code has set, or
`error`. Values of the contract go out as their JSON.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict, is_dataclass
from typing import Any

import api_stub
from api_stub.client import Client
from api_stub.contract import event, job, result
from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.ledger.config import LedgerConfig
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.reaper import Reaper
from api_stub.ledger.rows import Publication
from api_stub.submit import Doorbells


def plain(value: Any) -> Any:
    """Return a JSON form."""
    if hasattr(value, "to_json"):
        return json.loads(value.to_json())
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def main() -> None:
    """Answer until the input ends."""
    url, config = sys.argv[1], LedgerConfig(**json.loads(sys.argv[2]))
    told, sys.stdout = sys.stdout, sys.stderr
    ledger, doorbells = Ledger.connect(url, config), Doorbells(url)
    names = {
        "Client": Client, "client": Client(url), "ledger": ledger, "doorbells": doorbells, "job": job, "event": event,
        "result": result, "ErrorCode": ErrorCode, "ErrorInfo": ErrorInfo, "Publication": Publication,
        "reaper": Reaper(ledger, doorbells.ring, 0.5), "where": api_stub.__file__, "json": json,
    }  # fmt: skip
    for line in sys.stdin:
        asked = json.loads(line)
        names.update(asked["given"], answer=None)
        try:
            exec(asked["code"], names)
            said = {"answer": names["answer"]}
        except Exception:  # noqa: BLE001 - told code may raise anything
            said = {"error": traceback.format_exc()}
        print(json.dumps(said, default=plain), file=told, flush=True)


main()
