"""A question with its true answer, and the words that all questions share."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked and what is true. `kind` is a key of one of the three tables of this package."""

    kind: str
    text: str
    answer: str


def spelling(rng: Random) -> str:
    """`colour` or `color`: users write both."""
    return "colour" if rng.random() < 0.6 else "color"
