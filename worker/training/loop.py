"""What happens between two steps of a run: progress, evaluation, checkpoint, and the end when it is asked for.

A checkpoint is made every `eval_every` steps, after the last one, and when the run is stopped. It holds no times and no
paths, so that two attempts that reach a step write the same checkpoint.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from worker.training.checkpoints import Checkpoints, name_of
from worker.training.evaluation import Evaluation
from worker.training.manifest import STATE_FOLDER, Manifest, Plan, SmokeQuestion, describe_files, digest_of
from worker.training.progress import (
    AskStop,
    Progress,
    ReportCommit,
    ReportProgress,
    Stopped,
    StopReason,
    TrainingRefused,
)
from worker.training.state import Best, Entry, RunState, load_state, save_state
from worker.training.trainer import PlannedTrainer
from worker.training.tuning import TunedModel

#: Points of the loss curve that a checkpoint's state keeps.
_MAX_POINTS: Final = 1000


@dataclass(frozen=True, slots=True)
class Reports:
    """Whom a run tells, and whom it asks."""

    progress: ReportProgress
    stop: AskStop
    committed: ReportCommit

    def stop_or_go_on(self) -> None:
        """Raise Stopped when the run shall stop."""
        reason = self.stop()
        if reason is not None:
            raise Stopped(reason)


class Loop(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Follows one trainer. `resumed` is the folder of the state to go on from.

    run: where the run is; stop_reason: why it was stopped, None when it came to its end.
    """

    def __init__(
        self,
        plan: Plan,
        tuned: TunedModel,
        evaluation: Evaluation,
        checkpoints: Checkpoints,
        reports: Reports,
        *,
        best_metric: str,
        versions: Mapping[str, str],
        directory: Path,
        run: RunState,
        resumed: Path | None,
    ) -> None:
        self.run = run
        self.stop_reason: StopReason | None = None
        self.trainer: PlannedTrainer | None = None
        self._plan = plan
        self._tuned = tuned
        self._evaluation = evaluation
        self._checkpoints = checkpoints
        self._reports = reports
        self._best_metric = best_metric
        self._versions = versions
        self._directory = directory
        self._resumed = resumed
        self._point_every = math.ceil(plan.max_steps / _MAX_POINTS)
        self._rate = plan.learning_rate
        self._began_at = 0.0
        self._training_s = 0.0
        self._num_steps = 0
        self._smoke: tuple[SmokeQuestion, ...] = ()  # of these very weights

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Go on from the state, and make up for an evaluation that the last attempt was stopped in."""
        if self._resumed is not None:
            optimizer, scheduler = given["optimizer"], given["lr_scheduler"]
            load_state(self._resumed, optimizer, scheduler)
            set_numbers(optimizer, scheduler, self._plan)
            state.global_step = self.run.step
        if self.run.needs_evaluation:
            self._evaluate()
            if self.stop_reason is not None:
                control.should_training_stop = True
            elif self.run.step >= self._plan.max_steps:
                self._save(given["optimizer"], given["lr_scheduler"])
        self._began_at = time.monotonic()

    def on_step_begin(self, args: object, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Note the step's learning rate; after it, the scheduler is at the next one's."""
        self._rate = float(given["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Report the step; evaluate and save when it is due; stop when it is asked for."""
        self._training_s += time.monotonic() - self._began_at
        self._num_steps += 1
        step = state.global_step
        self._smoke = ()
        self.run = self.run.model_copy(update={"step": step})
        loss = self._loss()
        if step % self._point_every == 0 or step == 1:
            self._note({"loss": loss, "learning_rate": self._rate})
        self._tell(loss)
        is_due = step % self._plan.eval_every == 0 or step >= self._plan.max_steps
        self.stop_reason = self._reports.stop()
        if is_due:
            self.run = self.run.model_copy(update={"needs_evaluation": True})
            if self.stop_reason is None:
                self._evaluate()
                self._tell(loss)
        if self.stop_reason is not StopReason.LOST and (is_due or self.stop_reason is not None):
            self._save(given["optimizer"], given["lr_scheduler"])
        if self.stop_reason is not None:
            control.should_training_stop = True
        self._began_at = time.monotonic()

    def _loss(self) -> float:
        assert self.trainer is not None, "run.py sets it"
        assert self.trainer.step_loss is not None, "a step was made"
        loss = float(self.trainer.step_loss)
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss is {loss}")
        return loss

    def _not_finite(self, what: str) -> TrainingRefused:
        return TrainingRefused(
            f"step {self.run.step}: {what}; the learning rate of {self._plan.learning_rate} is too high for this "
            "model, or its weights are broken"
        )

    def _tell(self, loss: float) -> None:
        left = self._plan.max_steps - self.run.step
        examples = self._num_steps * self._plan.batch_size * self._plan.gradient_accumulation
        self._reports.progress(
            Progress(
                step=self.run.step,
                max_steps=self._plan.max_steps,
                loss=loss,
                learning_rate=self._rate,
                examples_per_s=examples / max(self._training_s, 1e-9),
                eta_s=left * self._training_s / self._num_steps,
                metrics=self.run.metrics,
            )
        )

    def _evaluate(self) -> None:
        """Measure the model; leaves the evaluation due when the run is asked to stop meanwhile."""
        try:
            metrics = self._evaluation.measure(self._reports.stop_or_go_on)
        except Stopped as stopped:
            self.stop_reason = stopped.reason
            return
        self._smoke = self._evaluation.smoke
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise self._not_finite(f"validation: the {name} is {value}")
        self.run = self.run.model_copy(update={"needs_evaluation": False, "metrics": metrics})
        self._note(metrics)
        value, best = metrics[self._best_metric], self.run.best
        if best is None or value < best.value:
            found = Best(step=self.run.step, value=value, metrics=metrics)
            self.run = self.run.model_copy(update={"best": found})

    def _note(self, values: Mapping[str, float]) -> None:
        entry = Entry(step=self.run.step, values=values)
        self.run = self.run.model_copy(update={"history": (*self.run.history, entry)})

    def _save(self, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
        """Write a checkpoint and commit it."""
        folder = self._directory / f"draft-{name_of(self.run.step)}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / STATE_FOLDER).mkdir(parents=True)
        self._tuned.save(folder)
        save_state(folder / STATE_FOLDER, optimizer, scheduler, self.run)
        files = describe_files(folder)
        manifest = Manifest(
            step=self.run.step,
            checkpoint=digest_of(files),
            files=files,
            plan=self._plan,
            metrics=self.run.metrics,
            smoke=self._smoke,
            versions=self._versions,
        )
        best_step = None if self.run.best is None else self.run.best.step
        uri = self._checkpoints.commit(folder, manifest, best_step)
        self._checkpoints.prune(best_step)
        shutil.rmtree(folder)
        self._reports.committed(self.run.step, uri)


def set_numbers(optimizer: Any, scheduler: Any, plan: Plan) -> None:
    """Set the plan's learning rate and weight decay, at the scheduler's step; a resumed run may ask for other ones."""
    scheduler.base_lrs = [plan.learning_rate] * len(scheduler.base_lrs)
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = plan.learning_rate
        group["lr"] = plan.learning_rate * factor(scheduler.last_epoch)
        if group["weight_decay"]:
            group["weight_decay"] = plan.weight_decay
