"""One fine-tuning run, from what was asked for to the best checkpoint.

In: a `Finetuning`, and what the run may use. Out: a `FinetuneResult`; on the way, progress, and checkpoints below the
output. A run that is started again with the same plan continues its newest whole checkpoint, exactly. Knows no queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from api_stub.contract.finetune import FinetuneResult, Finetuning
from worker.settings import WorkerSettings
from worker.training.progress import (
    AskStop,
    Progress,
    ReportCommit,
    ReportProgress,
    Stopped,
    StopReason,
    TrainingRefused,
)

__all__ = ["Places", "Progress", "StopReason", "Stopped", "TrainingRefused", "finetune"]


@dataclass(frozen=True, slots=True)
class Places:
    """What a run uses of its surroundings.

    settings: device, storage, limits of media; the job says which model.
    directory: for data, drafts of checkpoints and what is resumed; it must exist, and whoever made it removes it.
    job, fence: of the attempt that runs; empty and 0 when no queue is involved.
    """

    settings: WorkerSettings
    directory: Path
    job: str = ""
    fence: int = 0


def finetune(
    job: Finetuning,
    *,
    places: Places,
    progress: ReportProgress = lambda _: None,
    stop: AskStop = lambda: None,
    committed: ReportCommit = lambda _step, _uri: None,
) -> FinetuneResult:
    """Train, and return the best checkpoint. Blocks until the run ends; all callbacks are called on this thread.

    Raises DatasetBroken, with all findings and before the first step; TrainingRefused for what cannot be; CannotStart
    for a base that cannot be loaded; Stopped when `stop` has given a reason, or another attempt has the job; and
    StorageUnavailable, after which the same run can be started again.
    """
    raise NotImplementedError
