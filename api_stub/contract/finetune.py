"""Fine-tuning: what is trained on which data set, how, and what it leaves.

`Finetuning` says it for places of any kind (a folder, `s3://…/`); `FinetuneJob` is the same as a job, whose places are
in S3. An option that is absent is the recipe's own.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from api_stub.contract.job_fields import DEFAULT_PRIORITY, DeadlineS, TaskName, Tenant, Webhook, check_metadata
from api_stub.contract.media import S3Object
from api_stub.contract.names import TRAINING_MODEL_NAME, is_model_name
from api_stub.contract.wire import ReadModel, WholeNumber, WireModel

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,19}(?=://)")


class FinetuneMethod(StrEnum):
    """What is trained: all weights, a LoRA adapter, or a LoRA adapter beside weights quantised to nf4."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"


class FinetuneRecipe(StrEnum):
    """How examples become labels. `auto`: what the model's architecture asks for."""

    AUTO = "auto"
    CAPTIONER = "captioner"
    CHAT = "chat"


def s3_prefix(uri: str) -> str:
    """Return the canonical spelling of `s3://bucket/prefix/`, which ends with a slash. Raises ValueError."""
    scheme = _SCHEME.match(uri)
    if scheme is None or scheme.group().lower() != "s3":
        raise ValueError(f"must be s3://bucket/prefix/, got {scheme.group() + '://…' if scheme else 'no scheme'}")
    place = S3Object.parse(uri)
    if place.version_id is not None:
        raise ValueError("must be s3://bucket/prefix/, without ?versionId=…")
    key = place.key.rstrip("/")
    if not key:
        raise ValueError("must be s3://bucket/prefix/, got a bucket without a prefix")
    return S3Object(place.bucket, f"{key}/").uri


def _name_or_prefix(base: str) -> str:
    return base if is_model_name(base) else s3_prefix(base)


#: `s3://bucket/prefix/`, in its canonical spelling.
S3Prefix = Annotated[str, AfterValidator(s3_prefix)]


class FinetuneOptions(WireModel):
    """How long and how to train; counts are optimizer steps or examples. What is absent is the recipe's own.

    `eval_every`: steps between two evaluations, each with a checkpoint. `eval_examples`: the most validation examples
    that one looks at. `resume`: true continues the newest checkpoint of the output, a URI the checkpoint there.
    `freeze_vision`: the vision tower learns nothing, which keeps what it sees when there are few pictures.
    `loader_workers`: threads that load and encode examples ahead; the order of examples does not depend on them.
    """

    epochs: float | None = Field(default=None, gt=0, le=10_000)
    max_steps: WholeNumber | None = Field(default=None, ge=1, le=10_000_000)
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    batch_size: WholeNumber | None = Field(default=None, ge=1, le=1024)
    gradient_accumulation: WholeNumber | None = Field(default=None, ge=1, le=1024)
    gradient_checkpointing: bool | None = None
    freeze_vision: bool | None = None
    warmup_steps: WholeNumber | None = Field(default=None, ge=0, le=1_000_000)
    weight_decay: float | None = Field(default=None, ge=0, le=1)
    max_grad_norm: float | None = Field(default=None, gt=0, le=1000)
    eval_every: WholeNumber | None = Field(default=None, ge=1, le=1_000_000)
    eval_examples: WholeNumber | None = Field(default=None, ge=1, le=1_000_000)
    max_new_tokens: WholeNumber | None = Field(default=None, ge=1, le=4096)
    save_total_limit: WholeNumber | None = Field(default=None, ge=1, le=100)
    seed: WholeNumber | None = Field(default=None, ge=0, lt=2**32)
    loader_workers: WholeNumber | None = Field(default=None, ge=0, le=8)
    lora_rank: WholeNumber | None = Field(default=None, ge=1, le=1024)
    lora_alpha: float | None = Field(default=None, gt=0, le=4096)
    lora_dropout: float | None = Field(default=None, ge=0, lt=1)
    resume: bool | str | None = None

    @model_validator(mode="after")
    def _one_length(self) -> FinetuneOptions:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs: not beside max_steps")
        return self


class Finetuning(WireModel):
    """What is trained, on what, how, and where its checkpoints go. Places are folders or `s3://bucket/prefix/`."""

    base: str = Field(min_length=1, max_length=1100)
    dataset: str = Field(min_length=1, max_length=4096)
    output: str = Field(min_length=1, max_length=4096)
    method: FinetuneMethod = FinetuneMethod.FULL
    recipe: FinetuneRecipe = FinetuneRecipe.AUTO
    options: FinetuneOptions = FinetuneOptions()

    @model_validator(mode="after")
    def _options_fit_the_method(self) -> Finetuning:
        if self.method is FinetuneMethod.FULL:
            for name in ("lora_rank", "lora_alpha", "lora_dropout"):
                if getattr(self.options, name) is not None:
                    raise ValueError(f"options.{name}: not with method full; use lora or qlora")
        return self


class FinetuneJob(Finetuning):
    """Fine-tune a model. `base` is the name of a model that the trainer knows, or a checkpoint in S3.

    Over HTTP, `output` lies under `VISIONQ_TRAINING_PREFIX/<tenant>/`. `model` names the queue and is always the same.
    """

    task: Literal[TaskName.FINETUNE] = TaskName.FINETUNE
    model: Literal["training"] = TRAINING_MODEL_NAME
    base: Annotated[str, AfterValidator(_name_or_prefix)] = Field(min_length=1, max_length=1100)
    dataset: S3Prefix
    output: S3Prefix
    deadline_s: DeadlineS | None = None
    priority: WholeNumber = Field(default=DEFAULT_PRIORITY, ge=0, le=9)
    tenant: Tenant = ""
    webhook: Webhook | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _bounded(self) -> FinetuneJob:
        check_metadata(self.metadata)
        if isinstance(self.options.resume, str):
            try:
                s3_prefix(self.options.resume)
            except ValueError as error:
                raise ValueError(f"options.resume: {error}") from None
        return self

    def resolved(self, job_id: str) -> FinetuneJob:
        """Return the job as the ledger keeps it: nothing is left to fill in."""
        return self


class FinetuneResult(ReadModel):
    """What fine-tuning leaves: the best checkpoint at `output_uri`, its digest, its metrics, and the steps made."""

    output_uri: str
    checkpoint: str
    metrics: dict[str, float]
    steps: int
