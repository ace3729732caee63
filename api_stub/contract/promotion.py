"""An operator's wish for another checkpoint, and the comparison of two evaluations that it may depend on. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from pydantic import Field, model_validator

from api_stub.contract.wire import ReadModel, WireModel
from api_stub.contract.wish import Weights

#: Figures of `visionq-worker evaluate` that are better when they are lower. Of all others higher is better.
LOWER_IS_BETTER: Final = frozenset({"wer", "loss"})


def is_better(metric: str, new: float, old: float) -> bool:
    """Return whether a figure has improved."""
    return new < old if metric in LOWER_IS_BETTER else new > old


class NotBetter(ValueError):
    """Raised when the checkpoint's evaluation is not better than that of what is served."""


class Evaluated(ReadModel):
    """What is read of a record that `visionq-worker evaluate --json` printed.

    checkpoint: digest of the weights, of an adapter's where there is one; base: then of its base's. data_digest, split,
    num_examples, seed: what was asked.
    """

    checkpoint: str
    base: str | None = None
    data_digest: str
    split: str
    num_examples: int
    seed: int = 0
    scores: Mapping[str, float]

    @property
    def digest(self) -> str:
        """The digest that a worker tells of these weights."""
        return self.checkpoint if self.base is None else f"{self.base}+{self.checkpoint}"

    @property
    def asked(self) -> tuple[object, ...]:
        """Equal for two evaluations whose figures may be compared."""
        return self.data_digest, self.split, self.num_examples, self.seed


class Promotion(WireModel):
    """What is to be served: a folder, hub id or `s3://bucket/prefix/`, as VISIONQ_MODEL would name it.

    digest: the weights must have it. record: its evaluation, whose digest the weights must have. if_better: a metric
    in which `record` must be better than `baseline`, the evaluation of what is served now.
    """

    checkpoint: str = Field(min_length=1, max_length=1024)
    digest: str = Field(default="", max_length=200)
    if_better: str | None = Field(default=None, max_length=100)
    record: Evaluated | None = None
    baseline: Evaluated | None = None

    @model_validator(mode="after")
    def _complete(self) -> Promotion:
        if self.if_better is not None and (self.record is None or self.baseline is None):
            raise ValueError("if_better: needs record and baseline, the evaluations to compare")
        if self.record is not None and self.digest not in ("", self.record.digest):
            raise ValueError(f"record: is of {self.record.digest}, not of {self.digest}")
        return self

    def weights(self, served: Collection[str]) -> Weights:
        """Return what is wanted. `served`: digests of what workers serve now.

        Raises NotBetter, and ValueError for evaluations that cannot be compared.
        """
        if self.if_better is not None:
            assert self.record is not None
            assert self.baseline is not None
            _check_better(self.if_better, self.record, self.baseline, served)
        if self.record is None:
            return Weights(source=self.checkpoint, digest=self.digest)
        return Weights(source=self.checkpoint, digest=self.record.digest, scores=self.record.scores)


def _check_better(metric: str, new: Evaluated, former: Evaluated, served: Collection[str]) -> None:
    if served and former.digest not in served:
        raise ValueError(f"baseline: is of {former.digest}, which no worker serves; served are {', '.join(served)}")
    if new.asked != former.asked:
        raise ValueError(f"baseline: was asked something else than record: {former.asked}, {new.asked}")
    for name, record in (("record", new), ("baseline", former)):
        if metric not in record.scores:
            raise ValueError(f"{name}: no score {metric!r}; there are {', '.join(record.scores)}")
    value, before = new.scores[metric], former.scores[metric]
    if not is_better(metric, value, before):
        raise NotBetter(f"{metric}: {value:.6g} is not better than {before:.6g}, which is served")
