"""How good generated answers are: word error rate, ROUGE-L, exact match and VQA accuracy, in all and per kind.

In: answers beside their references. Out: figures. Texts are compared as they are, case and punctuation included; only
white space is normalised (`NORMALISATION`). Of several references the closest counts. Knows no model and no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import jiwer

#: What is done to both texts before they are compared; part of every record of an evaluation.
NORMALISATION: Final = "runs of white space become one space, none at either end; nothing else"
#: VQA accuracy takes an answer for right that three people gave beside the one who is left out.
MIN_PEOPLE: Final = 4
_ENOUGH_PEOPLE: Final = 3


@dataclass(frozen=True, slots=True)
class Answered:
    """One generated answer and what would have been right.

    references: one or more texts, none of them empty; for VQA accuracy one per person who was asked.
    kind: the question's type, for the figures per kind; None: it has none.
    """

    text: str
    references: tuple[str, ...]
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """The figures of some answers; shares are 0…1.

    wer: word errors (substitutions, deletions, insertions) over the words of the closest references, both summed over
        all answers; above 1 when answers are longer than their references.
    rouge_l: mean F1 of the longest common subsequence of words (Lin 2004), the best reference of each answer.
    exact_match: share of answers that equal one of their references.
    vqa_accuracy: mean over answers and over the people left out of min(1, others who gave this answer / 3) (Antol et
        al. 2015); None unless every answer has MIN_PEOPLE references.
    """

    num_answers: int
    wer: float
    rouge_l: float
    exact_match: float
    vqa_accuracy: float | None

    def metrics(self) -> dict[str, float]:
        """Return the figures by name, for events and logs; what could not be computed is absent."""
        figures = {
            "wer": self.wer,
            "rouge_l": self.rouge_l,
            "exact_match": self.exact_match,
            "vqa_accuracy": self.vqa_accuracy,
        }
        return {name: value for name, value in figures.items() if value is not None}


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """The scores of all answers, and of each kind by its name; answers without a kind are in `overall` only."""

    overall: Scores
    by_kind: Mapping[str, Scores]


def score(answers: Iterable[Answered]) -> ScoreReport:
    """Score answers. Raises ValueError when there are none, or one has no reference or an empty one."""
    every = list(answers)
    kinds = sorted({answer.kind for answer in every if answer.kind is not None})
    by_kind = {kind: _score([answer for answer in every if answer.kind == kind]) for kind in kinds}
    return ScoreReport(_score(every), by_kind)


def normalise(text: str) -> str:
    """Return the text as it is compared, see NORMALISATION."""
    return " ".join(text.split())


def _score(answers: Sequence[Answered]) -> Scores:
    if not answers:
        raise ValueError("there are no answers to score")
    texts = [normalise(answer.text) for answer in answers]
    references = [_references(answer) for answer in answers]
    pairs = list(zip(texts, references, strict=True))
    errors, words = (sum(counts) for counts in zip(*(_word_errors(*pair) for pair in pairs), strict=True))
    has_people = all(len(each) >= MIN_PEOPLE for each in references)
    return Scores(
        num_answers=len(answers),
        wer=errors / words,
        rouge_l=_mean([max(_rouge_l(text, reference) for reference in each) for text, each in pairs]),
        exact_match=_mean([float(text in each) for text, each in pairs]),
        vqa_accuracy=_mean([_vqa_accuracy(text, each) for text, each in pairs]) if has_people else None,
    )


def _references(answer: Answered) -> list[str]:
    normalised = [normalise(reference) for reference in answer.references]
    if not normalised or not all(normalised):
        raise ValueError(f"an answer has {'an empty' if normalised else 'no'} reference: {answer.references!r}")
    return normalised


def _word_errors(text: str, references: Sequence[str]) -> tuple[int, int]:
    """Return the errors against the reference with the lowest rate, the first of equals, and its number of words."""

    def count(reference: str) -> tuple[int, int]:
        compared = jiwer.process_words(reference, text)
        return compared.substitutions + compared.deletions + compared.insertions, len(reference.split())

    return min(map(count, references), key=lambda counts: counts[0] / counts[1])


def _rouge_l(text: str, reference: str) -> float:
    found, wanted = text.split(), reference.split()
    common = _longest_common(found, wanted)
    return 2 * common / (len(found) + len(wanted))


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, keeping one row of the table."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for index, candidate in enumerate(other, start=1):
            before, row[index] = row[index], before + 1 if word == candidate else max(row[index], row[index - 1])
    return row[-1]


def _vqa_accuracy(text: str, references: Sequence[str]) -> float:
    """Leave each person out once, as the authors' evaluation does."""
    agreeing = sum(text == reference for reference in references)
    others = [agreeing - (text == reference) for reference in references]
    return _mean([min(1.0, count / _ENOUGH_PEOPLE) for count in others])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
