"""Reads the compose files the way Docker Compose does: YAML, then `${NAME:-default}` and `${NAME:?message}`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
SECRETS = {
    "VALKEY_PASSWORD": "0123abcd",
    "S3_ACCESS_KEY_ID": "accesskey",
    "S3_SECRET_ACCESS_KEY": "4567cdef",
    "VISIONQ_API_KEYS": f"me:{'0' * 64}",
}

_VARIABLE = re.compile(r"\$(?:(?P<escaped>\$)|\{(?P<name>\w+)(?:(?P<sign>:[-?])(?P<rest>[^}]*))?\})")


class MissingVariable(Exception):
    """Raised for an unset `${NAME:?message}`; its text is the message."""


def load(*file_names: str, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return compose files laid over each other with variables filled in (none: as written)."""
    merged: dict[str, Any] = {}
    for file_name in file_names:
        content = yaml.safe_load((ROOT / file_name).read_text())
        merged = _merge(merged, content if variables is None else _fill(content, variables))
    return merged


def variables_in(text: str) -> set[str]:
    """Return the names of all variables that a compose file reads."""
    return {match["name"] for match in _VARIABLE.finditer(text) if match["name"]}


def _fill(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: _value(match, variables), value)
    if isinstance(value, list):
        return [_fill(item, variables) for item in value]
    if isinstance(value, dict):
        return {key: _fill(item, variables) for key, item in value.items()}
    return value


def _value(match: re.Match[str], variables: Mapping[str, str]) -> str:
    if match["escaped"]:
        return "$"
    value = variables.get(match["name"], "")
    if value or match["sign"] is None:
        return value
    if match["sign"] == ":?":
        raise MissingVariable(match["rest"])
    return str(match["rest"])


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _merge(below.get(key), value) for key, value in above.items()}
    return above
