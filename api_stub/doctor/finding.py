"""What the doctor says about one thing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is. A warning is worth reading; a problem makes the command fail."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    level: Level
    message: str


def judged(check: str, is_fine: bool, message: str, otherwise: Level = Level.PROBLEM) -> Finding:
    """Return a finding that is fine or not."""
    return Finding(check, Level.OK if is_fine else otherwise, message)
