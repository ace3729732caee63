"""From what a job asks for to the plan of its run, and whether a checkpoint belongs to that plan."""

from __future__ import annotations

import math
from typing import TypeVar

from transformers import ProcessorMixin

from api_stub.contract.finetune import FinetuneMethod, FinetuneOptions, FinetuneRecipe, Finetuning
from worker.training.checkpoints import Found
from worker.training.manifest import KEPT_FIELDS, Plan
from worker.training.progress import TrainingRefused
from worker.training.recipe import Recipe
from worker.training.recipes.captioner import CAPTIONER
from worker.training.recipes.chat import CHAT

Number = TypeVar("Number", int, float)


def choose_recipe(job: Finetuning, processor: ProcessorMixin) -> Recipe:
    """Return the recipe of the job; `auto`: chat for a model with a chat template."""
    if job.recipe is FinetuneRecipe.AUTO:
        return CAPTIONER if processor.chat_template is None else CHAT
    return CAPTIONER if job.recipe is FinetuneRecipe.CAPTIONER else CHAT


def seed_of(options: FinetuneOptions) -> int:
    """Return the run's seed: of the split, the order, the captions drawn, the adapter's first weights and dropout."""
    return 0 if options.seed is None else options.seed


def make_plan(job: Finetuning, recipe: Recipe, *, base_digest: str, data: str, num_examples: int) -> Plan:
    """Fill in the recipe's numbers where the job leaves them open."""
    options = job.options
    batch_size = options.batch_size or recipe.batch_size
    accumulation = options.gradient_accumulation or recipe.gradient_accumulation
    epochs = options.epochs or recipe.epochs
    max_steps = options.max_steps or math.ceil(epochs * num_examples / (batch_size * accumulation))
    automatic_warmup = min(recipe.warmup_steps, int(max_steps * recipe.warmup_share))
    has_adapter = job.method is not FinetuneMethod.FULL
    rank = options.lora_rank or recipe.lora_rank
    return Plan(
        base=job.base,
        base_digest=base_digest,
        data=data,
        method=job.method,
        recipe=recipe.name,
        seed=seed_of(options),
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation=accumulation,
        learning_rate=options.learning_rate or recipe.learning_rate[job.method],
        warmup_steps=_or(options.warmup_steps, automatic_warmup),
        weight_decay=_or(options.weight_decay, recipe.weight_decay),
        max_grad_norm=options.max_grad_norm or recipe.max_grad_norm,
        gradient_checkpointing=bool(options.gradient_checkpointing),
        freeze_vision=bool(options.freeze_vision),
        eval_every=options.eval_every or recipe.eval_every,
        eval_examples=options.eval_examples or recipe.eval_examples,
        max_new_tokens=options.max_new_tokens or recipe.max_new_tokens,
        lora_rank=rank if has_adapter else None,
        lora_alpha=(options.lora_alpha or 2.0 * rank) if has_adapter else None,
        lora_dropout=_or(options.lora_dropout, recipe.lora_dropout) if has_adapter else None,
    )


def require_same_run(plan: Plan, found: Found, *, is_asked_for: bool) -> None:
    """Raise TrainingRefused when a checkpoint is not of this plan.

    is_asked_for: `resume` was given: then the numbers of the optimizer and the length may be others, but not the data,
    the base and what is trained.
    """
    there = found.manifest.plan
    names = KEPT_FIELDS if is_asked_for else tuple(Plan.model_fields)
    differences = plan.differences(there, names)
    if not differences:
        return
    advice = "" if is_asked_for else "; use another output, or resume to go on with these weights"
    raise TrainingRefused(f"{found.uri} belongs to another run ({'; '.join(differences)}){advice}")


def _or(given: Number | None, otherwise: Number) -> Number:
    return otherwise if given is None else given
