"""Scores of generated answers, against figures computed by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from api_stub.contract.promotion import is_better
from worker.training.scores import Answered, ScoreReport, normalise, score


def scored(text: str, *references: str) -> ScoreReport:
    return score([Answered(text, references)])


def test_word_errors_are_summed_over_all_answers_before_they_are_divided() -> None:
    # 1 of 2 words, and 1 of 8: the mean of rates would be 0.3125.
    report = score([Answered("a x", ("a b",)), Answered("a b c d e f g", ("a b c d e f g h",))])
    assert report.overall.wer == pytest.approx(2 / 10)


def test_substitutions_deletions_and_insertions_count_alike() -> None:
    assert scored("der rote Kreis", "der blaue Kreis").overall.wer == pytest.approx(1 / 3)
    assert scored("der Kreis", "der blaue Kreis").overall.wer == pytest.approx(1 / 3)
    assert scored("der ganz blaue Kreis", "der blaue Kreis").overall.wer == pytest.approx(1 / 3)
    assert scored("", "der blaue Kreis").overall.wer == 1.0
    assert scored("a b c d", "x").overall.wer == 4.0


def test_case_and_punctuation_count_and_white_space_does_not() -> None:
    assert scored("Ein  roter\n\tKreis ", " Ein roter Kreis").overall.exact_match == 1.0
    assert scored("ein roter Kreis", "Ein roter Kreis").overall.wer == pytest.approx(1 / 3)
    assert scored("Ein roter Kreis.", "Ein roter Kreis").overall.exact_match == 0.0
    assert normalise(" a\u00a0 b\n") == "a b"


def test_of_several_references_the_closest_counts() -> None:
    overall = scored("a b c", "x y z w", "a b d", "q").overall
    assert overall.wer == pytest.approx(1 / 3)
    assert overall.rouge_l == pytest.approx(2 / 3)
    assert overall.exact_match == 0.0
    assert scored("a b c", "x", "a b c").overall.exact_match == 1.0


def test_the_lowest_rate_is_the_closest_and_not_the_fewest_errors() -> None:
    # One error in one word, two errors in four.
    assert scored("a b", "a", "a b c d").overall.wer == pytest.approx(2 / 4)


def test_rouge_l_is_f1_of_the_longest_common_subsequence() -> None:
    # The first two are the examples of Lin 2004, section 3.1.
    assert scored("police kill the gunman", "police killed the gunman").overall.rouge_l == pytest.approx(3 / 4)
    assert scored("the gunman kill police", "police killed the gunman").overall.rouge_l == pytest.approx(2 / 4)
    assert scored("", "a").overall.rouge_l == 0.0
    assert scored("a b", "a b c d").overall.rouge_l == pytest.approx(2 * (2 / 2) * (2 / 4) / (2 / 2 + 2 / 4))


def test_longest_common_subsequence_equals_the_search_through_all_subsequences() -> None:
    rng = random.Random(3)
    for _ in range(60):
        one, other = (" ".join(rng.choices("abc", k=rng.randint(1, 6))) for _ in range(2))
        common = max(
            length
            for length in range(7)
            for picked in itertools.combinations(one.split(), length)
            if _is_subsequence(picked, other.split())
        )
        expected = 2 * common / (len(one.split()) + len(other.split()))
        assert scored(one, other).overall.rouge_l == pytest.approx(expected), (one, other)


def _is_subsequence(picked: tuple[str, ...], words: list[str]) -> bool:
    rest = iter(words)
    return all(word in rest for word in picked)


@pytest.mark.parametrize(
    ("agreeing", "accuracy"),
    # Ten people, as in the data set: the mean over ten leave-one-out subsets.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_is_the_authors_leave_one_out_mean(agreeing: int, accuracy: float) -> None:
    people = ("red",) * agreeing + ("blue",) * (10 - agreeing)
    assert scored("red", *people).overall.vqa_accuracy == pytest.approx(accuracy)


def test_vqa_accuracy_needs_people() -> None:
    assert scored("red", "red", "red", "red").overall.vqa_accuracy is None
    mixed = score([Answered("red", ("red",) * 10), Answered("red", ("red",))])
    assert mixed.overall.vqa_accuracy is None
    assert "vqa_accuracy" not in mixed.overall.metrics()
    assert scored("red", *["red"] * 4).overall.metrics()["vqa_accuracy"] == 1.0


def test_figures_come_in_all_and_per_kind() -> None:
    report = score(
        [
            Answered("red", ("red",), "colour"),
            Answered("two", ("three",), "count"),
            Answered("blue", ("red",), "colour"),
            Answered("red", ("red",)),
        ]
    )
    assert {kind: (s.num_answers, s.exact_match) for kind, s in report.by_kind.items()} == {
        "colour": (2, 0.5),
        "count": (1, 0.0),
    }
    assert (report.overall.num_answers, report.overall.exact_match) == (4, 0.5)


@pytest.mark.parametrize("references", [(), ("",), ("red", " \n")])
def test_an_answer_without_a_reference_is_refused(references: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="reference"):
        score([Answered("red", references)])


def test_no_answers_have_no_scores() -> None:
    with pytest.raises(ValueError, match="no answers"):
        score([])


def test_lower_is_better_for_error_rates_only() -> None:
    assert is_better("wer", 0.1, 0.2)
    assert not is_better("wer", 0.2, 0.2)
    assert is_better("exact_match", 0.2, 0.1)
    assert not is_better("exact_match", 0.1, 0.1)
