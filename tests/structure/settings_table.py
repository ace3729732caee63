"""The tables of docs/settings.md, made from the settings classes.

`python -m tests.structure.settings_table` writes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from api_stub.ledger.settings import variable_of
from api_stub.settings import ClientSettings, GatewaySettings
from tests.structure.pages import DOCS
from worker.settings import WorkerSettings

PAGE = DOCS / "settings.md"
SHARED = "shared"
_READERS: tuple[tuple[str, type[BaseSettings]], ...] = (
    ("worker", WorkerSettings),
    ("client", ClientSettings),
    ("gateway", GatewaySettings),
)
_TABLE = re.compile(r"(<!-- settings of (?P<name>\w+): .*? -->\n).*?(<!-- /settings -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Row:
    default: str
    readers: tuple[str, ...]
    meaning: str


def variables() -> list[str]:
    """Return the names of all settings, in the order of the classes."""
    return list(_rows())


def with_tables(page: str) -> str:
    """Return the page's text with its tables as they should be."""
    return _TABLE.sub(lambda match: f"{match[1]}{_table(match['name'])}{match[3]}", page)


def _table(name: str) -> str:
    """Return one table: of the settings that several processes read (SHARED), or of one reader's own."""
    is_shared = name == SHARED
    head = ("variable", "default", "read by", "meaning") if is_shared else ("variable", "default", "meaning")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for variable, row in _rows().items():
        if is_shared and len(row.readers) > 1:
            who = ", ".join(sorted(row.readers, reverse=True))
            lines.append(f"| `{variable}` | {row.default} | {who} | {row.meaning} |")
        elif row.readers == (name,):
            lines.append(f"| `{variable}` | {row.default} | {row.meaning} |")
    return "\n".join(lines) + "\n"


def _rows() -> dict[str, _Row]:
    rows: dict[str, _Row] = {}
    for reader, settings in _READERS:
        for name, field in settings.model_fields.items():
            variable = variable_of(settings, name)
            known = rows.get(variable, _Row(_default(field), (), field.description or ""))
            rows[variable] = _Row(known.default, (*known.readers, reader), known.meaning)
    return rows


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, Enum):
        value = value.value
    return "" if value is None or value in ("", ()) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
