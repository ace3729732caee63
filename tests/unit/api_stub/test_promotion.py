"""A promotion that depends on an evaluation: only a better one, of these weights, on the same examples."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from api_stub.contract.promotion import NotBetter, Promotion
from api_stub.contract.wish import NothingToChange, Weights, Wish

NEW, SERVED = "aa" * 32, "bb" * 32


def record(checkpoint: str, **fields: Any) -> dict[str, Any]:
    scores = {"wer": 0.2, "exact_match": 0.7} | fields.pop("scores", {})
    told = {"v": 1, "model": "m", "checkpoint": checkpoint, "data_digest": "d", "split": "validation"}
    return told | {"num_examples": 100, "seed": 0, "scores": scores, "prompt": "ignored"} | fields


def promotion(**fields: Any) -> Promotion:
    return Promotion.model_validate({"checkpoint": "s3://models/new/"} | fields)


def test_without_a_record_the_checkpoint_is_wanted_as_it_is() -> None:
    assert promotion(digest=NEW).weights({SERVED}) == Weights(source="s3://models/new/", digest=NEW)


def test_a_record_names_the_digest_and_the_scores() -> None:
    wanted = promotion(record=record(NEW)).weights({SERVED})
    assert (wanted.digest, wanted.scores["wer"]) == (NEW, 0.2)
    of_adapter = promotion(record=record(NEW, base=SERVED)).weights({SERVED})
    assert of_adapter.digest == f"{SERVED}+{NEW}"
    with pytest.raises(ValidationError, match=f"record: is of {NEW}, not of {SERVED}"):
        promotion(record=record(NEW), digest=SERVED)


@pytest.mark.parametrize(
    ("metric", "better", "worse"), [("wer", 0.1, 0.2), ("exact_match", 0.8, 0.7), ("exact_match", 0.71, 0.6)]
)
def test_only_a_better_one_is_promoted(metric: str, better: float, worse: float) -> None:
    baseline = record(SERVED)
    good = promotion(record=record(NEW, scores={metric: better}), baseline=baseline, if_better=metric)
    assert good.weights({SERVED}).digest == NEW
    bad = promotion(record=record(NEW, scores={metric: worse}), baseline=baseline, if_better=metric)
    with pytest.raises(NotBetter, match=f"{metric}: {worse} is not better than"):
        bad.weights({SERVED})


@pytest.mark.parametrize(
    ("fields", "served", "words"),
    [
        ({"if_better": "wer", "baseline": record(SERVED)}, {NEW}, "baseline: is of bb.*, which no worker serves"),
        ({"if_better": "wer", "baseline": record(SERVED, num_examples=99)}, {SERVED}, "was asked something else"),
        ({"if_better": "loss", "baseline": record(SERVED)}, {SERVED}, "record: no score 'loss'; there are wer"),
    ],
)
def test_evaluations_that_cannot_be_compared_are_refused(fields: Any, served: set[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        promotion(record=record(NEW), **fields).weights(served)


def test_a_comparison_needs_both_records() -> None:
    with pytest.raises(ValidationError, match="if_better: needs record and baseline"):
        promotion(if_better="wer", record=record(NEW))


def test_the_same_weights_are_not_promoted_twice() -> None:
    wish = Wish().promoted(promotion(digest=NEW).weights(()))
    with pytest.raises(NothingToChange, match="is promoted already"):
        wish.promoted(promotion(digest=NEW).weights(()))
    assert wish.promoted(promotion(digest=SERVED).weights(())).number == 2
    assert wish.promoted(promotion().weights(())).weights.number == 2, "other files may lie there now"


def test_a_failed_wish_goes_back_to_one_that_was_fulfilled() -> None:
    good = Wish().promoted(Weights(source="good")).fulfilled(NEW)
    never_tried = good.promoted(Weights(source="bad"))
    back = never_tried.promoted(Weights(source="worse")).failed("smoke set")
    assert (back.number, back.weights) == (4, good.weights)
    with pytest.raises(NothingToChange):
        back.failed("again")
    assert never_tried.promoted(Weights(source="worse")).rolled_back().weights == good.weights


def test_wishes_follow_each_other() -> None:
    with pytest.raises(NothingToChange, match="nothing to roll back to"):
        Wish().rolled_back()
    one = Wish().promoted(Weights(source="s3://a/"))
    assert (one.number, one.is_fulfilled) == (1, False)
    two = one.fulfilled("digest").promoted(Weights(source="s3://b/"))
    assert two.former == Weights(number=1, source="s3://a/", digest="digest")
    failed = two.failed("smoke set")
    assert (failed.number, failed.weights, failed.problem) == (3, two.former, "smoke set")
    assert failed.rolled_back().weights == Weights()
    back = two.fulfilled("other").rolled_back()
    assert (back.weights, back.former) == (two.former, Weights(number=2, source="s3://b/", digest="other"))
