"""One run of a script as a value: which, with which arguments, and how to read the reply. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from api_stub.contract.job import TaskName
from api_stub.ledger.lua import Transition

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One script run. `parse` reads Redis' reply (text replies) and may raise what the transition raises."""

    transition: Transition
    args: tuple[str | int | float, ...]
    parse: Callable[[Any], T]


def task_of(name: str) -> TaskName | None:
    """Return the task that a row or a reply names; None without one, or for one that another release has added."""
    return TaskName(name) if name in set(TaskName) else None
