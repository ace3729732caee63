"""One fine-tuning run, from what was asked for to the best checkpoint.

In: a `Finetuning`, and what the run may use. Out: a `FinetuneResult`; on the way, progress, and checkpoints below the
output. A run that is started again with the same plan continues its newest whole checkpoint, exactly. Knows no queue.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from api_stub.contract.finetune import FinetuneResult, Finetuning
from worker.media.access import MediaAccess
from worker.media_access import media_access
from worker.models.generation_defaults import eos_token_ids
from worker.models.loader import LoadedModel, load_processor
from worker.prompting.prepare import PromptBuilder
from worker.prompting.processors import cast
from worker.settings import WorkerSettings
from worker.training.checkpoints import Checkpoints, Found, fetch_checkpoint
from worker.training.dataset import Dataset, DatasetBroken, open_dataset
from worker.training.evaluation import Evaluation
from worker.training.labels import Encoder, check_fits, encode, encoder_for
from worker.training.loop import Loop, Reports
from worker.training.manifest import STATE_FOLDER, Plan
from worker.training.objects import open_objects, training_client
from worker.training.planning import choose_recipe, make_plan, require_same_run, seed_of
from worker.training.progress import (
    AskStop,
    Progress,
    ReportCommit,
    ReportProgress,
    Stopped,
    StopReason,
    TrainingRefused,
)
from worker.training.recipe import Recipe
from worker.training.sampler import Batches, Key
from worker.training.state import RunState, load_run
from worker.training.trainer import make_trainer
from worker.training.tuning import TunedModel, base_digest, training_settings, tune

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

logger = logging.getLogger(__name__)

__all__ = ["Places", "Progress", "StopReason", "Stopped", "TrainingRefused", "finetune"]

_LIBRARIES = ("visionq-worker", "torch", "transformers", "peft", "bitsandbytes")


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
    reports = Reports(progress, stop, committed)
    settings = training_settings(places.settings, job.base, job.method)
    _require_one_gpu(settings)
    client = training_client(settings)
    recipe = choose_recipe(job, load_processor(settings))
    checkpoints = Checkpoints(
        open_objects(job.output, client),
        job=places.job,
        fence=places.fence,
        save_total_limit=job.options.save_total_limit or recipe.save_total_limit,
    )
    with _media(settings) as access:
        dataset = open_dataset(
            job.dataset,
            seed=seed_of(job.options),
            access=access,
            directory=_made(places.directory / "data"),
            should_stop=reports.stop_or_go_on,
        )
        digest = base_digest(settings)
        plan = make_plan(job, recipe, base_digest=digest, data=dataset.digest, num_examples=len(dataset.train))
        resumed = _made(places.directory / "resumed")
        task = _Task(job, plan, recipe, dataset, checkpoints, places.directory)
        found = _resumable(job, plan, checkpoints, client, resumed)
        student = _student(task, settings, found, reports)
        # Only now: a job that is refused takes the output from nobody.
        checkpoints.claim()
        if checkpoints.steps()[-1:] > ([] if found is None else [found.manifest.step]):
            found = _resumable(job, plan, checkpoints, client, resumed)  # the last attempt has added one meanwhile
            student = _student(task, settings, found, reports)
        run = _run_of(found) if student is None else _train(task, student, found, reports)
    return _result(run, checkpoints)


@dataclass(frozen=True, slots=True)
class _Task:
    """What is to be done, when all is known and nothing has been trained yet."""

    job: Finetuning
    plan: Plan
    recipe: Recipe
    dataset: Dataset
    checkpoints: Checkpoints
    directory: Path


@dataclass(frozen=True, slots=True)
class _Student:
    """The model that learns, and what encodes examples for it."""

    tuned: TunedModel
    encoder: Encoder


def _run_of(found: Found | None) -> RunState:
    return RunState() if found is None else load_run(found.folder / STATE_FOLDER)


def _student(task: _Task, settings: WorkerSettings, found: Found | None, reports: Reports) -> _Student | None:
    """Load the model as the checkpoint left it, and check that it can learn the data set; None: nothing is left to do.

    Raises DatasetBroken, TrainingRefused, CannotStart, and InvalidRequest for a family whose labels are not proven.
    """
    run = _run_of(found)
    if run.step >= task.plan.max_steps and not run.needs_evaluation:
        return None
    tuned = tune(settings, task.plan, None if found is None else found.folder)
    loaded = tuned.loaded
    encoder = encoder_for(
        loaded.processor,
        loaded.model.config,
        task.recipe.name.value,
        eos_token_ids=eos_token_ids(loaded.model, loaded.tokenizer),
    )
    findings = check_fits(task.dataset, encoder, reports.stop_or_go_on)
    if findings:
        raise DatasetBroken(findings)
    return _Student(tuned, encoder)


def _train(task: _Task, student: _Student, found: Found | None, reports: Reports) -> RunState:
    """Make the steps that are left; return where the run is then. Raises Stopped when it is not at its end."""
    tuned, encoder, run = student.tuned, student.encoder, _run_of(found)
    plan, loaded, dataset = task.plan, tuned.loaded, task.dataset
    loop = Loop(
        plan,
        tuned,
        Evaluation(tuned, dataset, encoder, PromptBuilder(loaded), plan),
        task.checkpoints,
        reports,
        best_metric=task.recipe.best_metric,
        versions=_versions(loaded),
        directory=task.directory,
        run=run,
        resumed=None if found is None else found.folder / STATE_FOLDER,
    )
    batches = Batches(
        _Encoded(dataset, encoder, tuned, plan.seed),
        num_examples=len(dataset.train),
        seed=plan.seed,
        batch_size=plan.batch_size,
        num_batches=plan.max_steps * plan.gradient_accumulation,
        first_batch=run.step * plan.gradient_accumulation,
        num_threads=task.job.options.loader_workers or 0,
    )
    if plan.gradient_checkpointing:
        tuned.checkpoint_gradients()
    facts = {"action": "train.start", "base": plan.base, "step": run.step, "max_steps": plan.max_steps}
    logger.info("training", extra=facts)
    loop.trainer = make_trainer(tuned.model, plan, batches, loop, task.directory, loaded.device)
    loop.trainer.train()
    facts |= {"action": "train.end", "step": loop.run.step, "stopped": loop.stop_reason}
    logger.info("training ended", extra=facts)
    if loop.stop_reason is not None:
        raise Stopped(loop.stop_reason, _newest_uri(task.checkpoints, loop.stop_reason))
    return loop.run


def _newest_uri(checkpoints: Checkpoints, reason: StopReason) -> str | None:
    steps = [] if reason is StopReason.LOST else checkpoints.steps()
    return checkpoints.uri_of(steps[-1]) if steps else None


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Makes the model's inputs of a batch, on any thread: decodes its files, draws its captions, encodes both."""

    dataset: Dataset
    encoder: Encoder
    tuned: TunedModel
    seed: int

    def __call__(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        examples = [self.dataset.train[key.index] for key in keys]
        texts = [
            example.drawn_text(self.seed, key.epoch, key.index) for example, key in zip(examples, keys, strict=True)
        ]
        media = [self.dataset.media(example) for example in examples]
        return cast(encode(self.encoder, examples, texts, media).arguments(), self.tuned.loaded.dtype)


def _resumable(
    job: Finetuning, plan: Plan, checkpoints: Checkpoints, client: S3Client, directory: Path
) -> Found | None:
    """Return the checkpoint to go on from: the output's newest, else the one that the job names; None: from the base.

    Raises TrainingRefused when it is of another run, or when there is none to resume.
    """
    resume = job.options.resume
    found = checkpoints.newest(directory)
    if found is None and isinstance(resume, str):
        prefix = resume if resume.endswith("/") else f"{resume}/"
        found = fetch_checkpoint(open_objects(prefix, client), "", directory / "named")
        if found is None:
            raise TrainingRefused(f"options.resume: {resume} is no whole checkpoint")
    if found is None:
        if resume:
            raise TrainingRefused(f"options.resume: there is no checkpoint to resume in {checkpoints.uri}")
        return None
    require_same_run(plan, found, is_asked_for=bool(resume))
    logger.info("resuming", extra={"action": "train.resume", "checkpoint": found.uri, "step": found.manifest.step})
    return found


def _result(run: RunState, checkpoints: Checkpoints) -> FinetuneResult:
    """Return the best checkpoint of a run that has ended; the newest if the best one is broken or missing."""
    best = None if run.best is None else checkpoints.manifest(run.best.step)
    if run.best is not None and best is not None:
        uri, metrics = checkpoints.uri_of(run.best.step), run.best.metrics
    else:
        best, uri, metrics = checkpoints.manifest(run.step), checkpoints.uri_of(run.step), run.metrics
    if best is None:
        raise TrainingRefused(f"{checkpoints.uri}: its checkpoints were removed while the run went on")
    return FinetuneResult(output_uri=uri, checkpoint=best.checkpoint, metrics=dict(metrics), steps=run.step)


@contextmanager
def _media(settings: WorkerSettings) -> Iterator[MediaAccess]:
    access = media_access(settings)
    try:
        yield access
    finally:
        access.decoders.close()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _require_one_gpu(settings: WorkerSettings) -> None:
    if settings.device != "cpu" and torch.cuda.device_count() > 1:
        raise TrainingRefused(
            f"{torch.cuda.device_count()} GPUs are visible and a run uses one: set CUDA_VISIBLE_DEVICES to one of them"
        )


def _versions(loaded: LoadedModel) -> dict[str, str]:
    """Return what equal weights after a resume depend on, beside the plan."""
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    found["device"] = torch.cuda.get_device_name() if loaded.device.type == "cuda" else platform.machine()
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
