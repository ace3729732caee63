"""transformers' Trainer with our order of examples, our seeds and our loss; nothing of it is drawn as the run goes on.

The trainer steps; what happens between two steps (progress, evaluation, checkpoints, stopping) is `loop`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from worker.training.manifest import Plan
from worker.training.sampler import Batches, step_seed


def make_trainer(
    model: Any, plan: Plan, batches: Batches, callback: TrainerCallback, directory: Path, device: torch.device
) -> PlannedTrainer:
    """Return a trainer of the plan. It keeps no files of its own; `directory` must be one that may be written."""
    is_on_gpu = device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        max_steps=plan.max_steps,
        per_device_train_batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        optim="adamw_torch",
        seed=plan.seed,
        bf16=is_on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not is_on_gpu,
        use_cache=bool(getattr(model.config, "use_cache", True)),  # the trainer writes it into the config
        ignore_data_skip=True,  # the batches begin at the right step themselves
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return PlannedTrainer(model, arguments, batches, callback, plan.seed)


class PlannedTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """A trainer whose every step is a function of the seed and the step.

    step_loss: mean loss per learnt token of the step that was made last.
    """

    def __init__(
        self, model: Any, arguments: TrainingArguments, batches: Batches, callback: TrainerCallback, seed: int
    ) -> None:
        super().__init__(model=model, args=arguments, callbacks=[callback])
        self.remove_callback(PrinterCallback)
        self._batches = batches
        self._seed = seed
        self._part = 0
        self.step_loss: Tensor | None = None
        # `compute_loss` divides by the learnt tokens of the whole step.
        self.loss_is_scaled_for_ga = True

    def get_train_dataloader(self) -> Batches:
        """Return the run's batches."""
        return self._batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Mapping[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[Mapping[str, Tensor]], Tensor]:
        """Return the batches of one step and the number of tokens that are learnt in them."""
        samples = list(islice(epoch_iterator, num_batches))
        self._part, self.step_loss = 0, None
        return samples, torch.as_tensor(sum(num_learnt(sample) for sample in samples), device=device)

    def training_step(
        self, model: Any, inputs: Mapping[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Make one part of a step. Dropout and the like depend on the seed, the step and the part."""
        set_seed(step_seed(self._seed, self.state.global_step, self._part))
        self._part += 1
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = loss if self.step_loss is None else self.step_loss + loss
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this part's share of the step's mean loss per learnt token.

        Models divide by the tokens of their own batch; not all of them would take the number of the whole step.
        """
        outputs = model(**inputs)
        share = 1.0 if num_items_in_batch is None else num_learnt(inputs) / num_items_in_batch
        loss = outputs.loss * share
        return (loss, outputs) if return_outputs else loss


def num_learnt(inputs: Mapping[str, Tensor]) -> int:
    """Return the number of tokens whose prediction is learnt: the first token of a row is predicted by none."""
    return int((inputs["labels"][:, 1:] != -100).sum())
