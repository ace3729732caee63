"""What a run measured, beside what was wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure. at_most, at_least: its limits, where it has any."""

    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether it keeps its limits; not a number keeps none."""
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    def line(self) -> str:
        """One row of the table."""
        wanted = ", ".join(
            f"{words} {limit:g}" for words, limit in (("at most", self.at_most), ("at least", self.at_least))
            if limit is not None
        )  # fmt: skip
        verdict = "" if self.is_met else "  MISSED"
        return f"  {self.name:<58} {self.value:>10.4g}  {wanted}{verdict}"


@dataclass(slots=True)
class Report:
    """The figures of one run, and lines that explain them."""

    name: str
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        """Add a figure."""
        self.figures.append(Figure(name, value, at_most, at_least))

    def check(self, name: str, holds: bool) -> None:
        """Add what must hold."""
        self.add(name, float(holds), at_least=1)

    @property
    def is_met(self) -> bool:
        """Whether all figures keep their limits; a run without any has shown nothing."""
        return bool(self.figures) and all(figure.is_met for figure in self.figures)

    def lines(self) -> Iterator[str]:
        """Yield the table."""
        yield self.name
        yield from (figure.line() for figure in self.figures)
        yield from (f"  {note}" for note in self.notes)
