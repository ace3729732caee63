"""The record of an evaluation: the scores, and all that another one would need to get the same ones."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Final, Literal

from pydantic import Field

from api_stub.contract.wire import ReadModel

_LIBRARIES: Final = ("visionq-worker", "torch", "transformers", "tokenizers", "jiwer", "bitsandbytes")


class EvaluationRecord(ReadModel):
    """What was evaluated on what, how, and what came out.

    checkpoint: digest of the weights that answered, of an adapter's where there is one; base: then of its base's.
    data_digest: of the whole data set. seed: of the split, where the data set names none. prompt: how examples with
    captions are asked; conversations ask for themselves. normalisation: what is done to texts before they are compared.
    scores: name → value over all examples; by_kind: the same per kind of question. mistakes: some wrong answers.
    """

    v: Literal[1] = 1
    model: str
    checkpoint: str
    base: str | None = None
    dataset: str
    data_digest: str
    split: str
    num_examples: int
    seed: int
    prompt: str
    normalisation: str
    settings: Mapping[str, str | int | float]
    versions: Mapping[str, str]
    scores: Mapping[str, float]
    by_kind: Mapping[str, Mapping[str, float]] = Field(default_factory=dict)
    num_by_kind: Mapping[str, int] = Field(default_factory=dict)
    mistakes: tuple[Mistake, ...] = ()

    def lines(self) -> str:
        """Return it for people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.model} on {self.num_examples} examples of {self.dataset} ({self.split})"
        names = list(self.scores)
        yield f"{'':<20}{'n':>6}" + "".join(f"{name:>14}" for name in names)
        yield _row("all", self.num_examples, self.scores, names)
        for kind, scores in self.by_kind.items():
            yield _row(kind, self.num_by_kind[kind], scores, names)
        yield f"checkpoint {self.checkpoint}" + ("" if self.base is None else f" on base {self.base}")
        yield f"data {self.data_digest}"


class Mistake(ReadModel):
    """An answer that equals none of its references, with the line of its example."""

    line: int
    answer: str
    references: tuple[str, ...]


EvaluationRecord.model_rebuild()


def versions() -> dict[str, str]:
    """Return the versions on which generated texts depend."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _row(name: str, num: int, scores: Mapping[str, float], names: list[str]) -> str:
    cells = (f"{scores[each]:>14.4f}" if each in scores else f"{'–':>14}" for each in names)
    return f"{name:<20}{num:>6}" + "".join(cells)
