"""`visionq doctor`: prints what the examination finds; exit status 0 when nothing is a problem, 1 when something is."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from api_stub import connections
from api_stub.doctor import Level, examine
from api_stub.flags import JsonFlag
from api_stub.report import reported, visible
from api_stub.settings import ClientSettings


def doctor(
    max_keys: Annotated[int, typer.Option(min=1, help="Most keys to look at.")] = 200_000, as_json: JsonFlag = False
) -> None:
    """Examine Redis, settings, workers and queues; look for what is left lying about. Changes nothing."""
    is_ill = False
    with reported(as_json), connections.store_errors():
        settings = ClientSettings.load()
        with connections.commands(settings.redis_url.get_secret_value()) as client:
            for finding in examine(client, settings.ledger, max_keys):
                is_ill = is_ill or finding.level is Level.PROBLEM
                line = f"{finding.level.value:8} {finding.check:10} {finding.message}"
                typer.echo(json.dumps(asdict(finding), ensure_ascii=False) if as_json else visible(line))
    raise typer.Exit(1 if is_ill else 0)
