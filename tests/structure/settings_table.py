"""The README's table of settings, made from the settings classes.

`python -m tests.structure.settings_table` writes it.
"""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from api_stub.ledger.settings import variable_of
from api_stub.settings import ClientSettings, GatewaySettings
from worker.settings import WorkerSettings

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"(<!-- settings: .*? -->\n).*?(<!-- /settings -->)", re.DOTALL)


def table() -> str:
    """Return the table: variable, default, who reads it, meaning; in the order of the classes."""
    rows: dict[str, tuple[str, set[str], str]] = {}
    readers: tuple[tuple[str, type[BaseSettings]], ...] = (
        ("worker", WorkerSettings),
        ("client", ClientSettings),
        ("gateway", GatewaySettings),
    )
    for reader, settings in readers:
        for name, field in settings.model_fields.items():
            variable = variable_of(settings, name)
            default, known_readers, meaning = rows.get(variable, (_default(field), set(), field.description or ""))
            rows[variable] = (default, known_readers | {reader}, meaning)
    lines = ["| variable | default | read by | meaning |", "|---|---|---|---|"]
    for variable, (default, known_readers, meaning) in rows.items():
        who = ", ".join(sorted(known_readers, reverse=True))
        lines.append(f"| `{variable}` | {default} | {who} | {meaning} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """Return the README's text with the table as it should be."""
    return BLOCK.sub(lambda match: f"{match[1]}{table()}{match[2]}", readme)


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, Enum):
        value = value.value
    return "" if value is None or value in ("", ()) else f"`{value}`"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
