"""`manifest.json` and `latest.json`: what a checkpoint holds and of which run it is, as JSON beside the weights.

The manifest is written after all other files of a checkpoint: a checkpoint without one, or whose files differ from it,
is never loaded. Knows no storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from api_stub.contract.finetune import FinetuneMethod, FinetuneRecipe
from api_stub.contract.wire import ReadModel
from worker.models.digests import sha256_of, weights_digest
from worker.models.manifest import MANIFEST as MANIFEST
from worker.models.manifest import FileEntry as FileEntry
from worker.models.manifest import SmokeQuestion as SmokeQuestion

LATEST: Final = "latest.json"
#: Optimizer, scheduler and place in the data: below this folder of a checkpoint, which serving does not read.
STATE_FOLDER: Final = "state"


class Plan(ReadModel):
    """What decides a run's weights, step by step: two runs of one plan are the same run.

    base_digest: of the weights that training starts from. data: the data set's digest. The rest is as in the job, with
    the recipe's own values for what it left open.
    """

    base: str
    base_digest: str
    data: str
    method: FinetuneMethod
    recipe: FinetuneRecipe
    seed: int
    max_steps: int
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    gradient_checkpointing: bool
    eval_every: int
    eval_examples: int
    max_new_tokens: int
    freeze_vision: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None

    def differences(self, other: Plan, names: Iterable[str]) -> list[str]:
        """Return `name: own value, there the other one` for those of the fields that differ."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [f"{name}: {own}, there {there}" for name, own, there in pairs if own != there]


#: Fields that a resumed run must share with its checkpoint, also when more steps are asked for than at first.
KEPT_FIELDS: Final = (
    "base_digest",
    "data",
    "method",
    "recipe",
    "seed",
    "freeze_vision",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
)


class Manifest(ReadModel):
    """What a checkpoint is.

    checkpoint: digest of the weights. metrics: of the last evaluation at or before this step. smoke: questions that
    these weights answered right in it. versions: of the
    libraries, the device and the number of threads, on which equal weights after a resume depend.
    """

    v: Literal[1] = 1
    step: int
    checkpoint: str
    files: Mapping[str, FileEntry]
    plan: Plan
    metrics: Mapping[str, float] = {}
    smoke: tuple[SmokeQuestion, ...] = ()
    versions: Mapping[str, str] = {}


class Latest(ReadModel):
    """Which checkpoint of an output is the newest and which the best, and which attempt may write.

    claim: grows with every attempt that begins to write here; only the last one may. job, fence: of that attempt.
    checkpoint, best: names of folders beside this file; absent before the first checkpoint.
    """

    v: Literal[1] = 1
    claim: int = 0
    job: str = ""
    fence: int = 0
    step: int = 0
    checkpoint: str | None = None
    best: str | None = None


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Return size and sha256 of every file below a folder, by its name with slashes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): FileEntry(num_bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
    }


def digest_of(files: Mapping[str, FileEntry]) -> str:
    """Return the digest of the weights among a checkpoint's files."""
    return weights_digest({name: entry.sha256 for name, entry in files.items()})


def read_manifest(content: bytes) -> Manifest | None:
    """Return the manifest; None for content that is none."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError:
        return None


def read_latest(content: bytes) -> Latest | None:
    """Return what `latest.json` says; None for content that is none."""
    try:
        return Latest.model_validate_json(content)
    except ValidationError:
        return None
