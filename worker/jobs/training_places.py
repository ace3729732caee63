"""What a fine-tuning job may use: which names are bases, what may be read, where checkpoints may go.

In: a job as its producer wrote it. Out: the same job with a base that can be loaded, or InvalidRequest. The gateway has
checked more (a key's rights); this is the worker's own say, for every producer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from api_stub.contract.finetune import FinetuneJob, s3_prefix
from api_stub.contract.media import S3Object
from worker.errors import InvalidRequest
from worker.settings import WorkerSettings

#: Names of the checkpoints that ship with the worker.
SHIPPED = ("demo", "demo-captioner")


@dataclass(frozen=True, slots=True)
class TrainingPlaces:
    """`bases`: checkpoints by the names that jobs give. `root`: `s3://bucket/prefix/` below which checkpoints are."""

    bases: Mapping[str, str]
    buckets: frozenset[str]
    root: str

    @classmethod
    def of(cls, settings: WorkerSettings) -> Self:
        """Read them from the settings of a worker that serves: what it serves can be trained by that name."""
        bases = {**{name: name for name in SHIPPED}, settings.model_name: settings.model, **settings.bases}
        return cls(bases, settings.readable_buckets, settings.training_root)

    def resolved(self, job: FinetuneJob) -> FinetuneJob:
        """Return the job with its base's checkpoint for a name. Raises InvalidRequest that names the field."""
        self._check_readable("dataset", job.dataset)
        if not job.output.startswith(self.root):
            self._check_readable("output", job.output)
        if isinstance(job.options.resume, str):
            self._check_below_root("options.resume", s3_prefix(job.options.resume))
        return job.model_copy(update={"base": self._base(job.base)})

    def _base(self, base: str) -> str:
        if base in self.bases:
            return self.bases[base]
        if "://" not in base:
            known = ", ".join(sorted(self.bases))
            raise InvalidRequest(
                f"base: {base!r} is no model that this trainer knows; it knows {known} (VISIONQ_TRAINING_BASES) and "
                f"checkpoints below {self.root}"
            )
        self._check_below_root("base", base)
        return base

    def _check_below_root(self, field: str, uri: str) -> None:
        if not uri.startswith(self.root):
            raise InvalidRequest(f"{field}: not below {self.root} (VISIONQ_TRAINING_PREFIX)")

    def _check_readable(self, field: str, uri: str) -> None:
        bucket = S3Object.parse(uri).bucket
        if bucket not in self.buckets:
            raise InvalidRequest(f"{field}: the bucket {bucket!r} is not among those that this worker may use")
