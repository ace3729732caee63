"""One example of a data set, and what is wrong with a data set: every finding with its file and line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Final

from api_stub.contract.conversation import Turn
from worker.errors import InvalidRequest

#: Findings that an error's text repeats; the error itself has all of them.
SHOWN_FINDINGS: Final = 20


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One fault of a data set. `line` counts from 1; None: it is not about one line."""

    file: str
    line: int | None
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.message}"


class DatasetBroken(InvalidRequest):
    """Raised when a data set cannot be trained on. Has all findings, in the order of lines."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        shown = [str(finding) for finding in self.findings[:SHOWN_FINDINGS]]
        if (left_out := len(self.findings) - len(shown)) > 0:
            shown.append(f"and {left_out} more")
        super().__init__("the data set cannot be used:\n" + "\n".join(shown))


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data set: pictures and clips with captions or with a conversation about them.

    line: of `metadata.jsonl`, from 1. files: relative names, in the order in which the model sees them.
    texts: captions, each of them right; empty for a conversation.
    messages: the conversation, which an assistant's turn ends; None for captions. Its media parts are `files`, in
    order.
    kind: the kind of question, by which scores are told apart.
    """

    line: int
    files: tuple[str, ...]
    texts: tuple[str, ...] = ()
    messages: tuple[Turn, ...] | None = None
    kind: str | None = None

    def drawn_text(self, seed: int, epoch: int, index: int) -> str | None:
        """Return the caption that is learnt in an epoch; None for a conversation.

        A function of its arguments alone: any process at any time draws the same one. `index` is the example's place
        in the training split.
        """
        if not self.texts:
            return None
        return self.texts[0] if len(self.texts) == 1 else Random(f"{seed} {epoch} {index}").choice(self.texts)
