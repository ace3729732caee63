"""The two phases of training: learn to see with direct supervision, then learn to answer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from worker.demo_model.learning.answering_loss import AnswerLoss, answer_loss, see
from worker.demo_model.learning.conversations import (
    EVEN,
    Mix,
    clip_conversation,
    greeting,
    image_conversation,
    images_conversation,
)
from worker.demo_model.learning.encoding import Batch, ChatEncoder
from worker.demo_model.learning.optimizer import Optimizer, one_cycle
from worker.demo_model.learning.progress import Progress
from worker.demo_model.learning.student import Student
from worker.demo_model.learning.supervision import VisionLoss, targets, vision_loss
from worker.demo_model.scenes import make_dense_scene

SEE_WARMUP, ANSWER_WARMUP = 0.15, 0.12
GREETING_SHARE = 0.03
# Rows about one image, several images, a clip: the answers to the latter two are longer, and easier to average down.
GROUP_WEIGHTS = (1.0, 0.8, 0.9)
VALIDATION_SEED, VALIDATION_BATCHES, VALIDATION_SIZES = 987_654, 2, (40, 16, 20)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of both phases; the defaults are what the shipped checkpoint was trained with (README.md)."""

    see_lr: float = 3e-3
    see_batch: int = 64
    answer_lr: float = 1.8e-3
    answer_batch: tuple[int, int, int] = (18, 9, 6)
    vision_lr_share: float = 0.15
    vision_loss_weight: float = 0.3
    mix: Mix = EVEN


@dataclass(frozen=True, slots=True)
class JointLoss:
    """The loss of one step over three groups of conversations."""

    answers: Tensor
    vision: VisionLoss
    groups: tuple[AnswerLoss, ...]


def learn_to_see(student: Student, recipe: Recipe, rng: Random, progress: Progress) -> None:
    """Train vision tower and connector on crowded scenes until the budget is spent."""
    optimizer = Optimizer(student.model, student.heads, recipe.see_lr, vision_lr_share=1.0, trains_text=False)
    while progress.fraction < 1:
        scenes = [make_dense_scene(rng) for _ in range(recipe.see_batch)]
        result = vision_loss(student.heads, see(student.model, scenes, rng), targets(scenes))
        optimizer.step(result.loss, one_cycle(progress.fraction, SEE_WARMUP))
        progress.add(loss=result.loss.item(), objects=result.object_accuracy)


def learn_to_answer(
    student: Student,
    recipe: Recipe,
    rng: Random,
    progress: Progress,
    checkpoint: Callable[[], None],
    checkpoint_every_s: float,
) -> None:
    """Train everything on conversations until the budget is spent; now and then validate and call `checkpoint`."""
    optimizer = Optimizer(student.model, student.heads, recipe.answer_lr, vision_lr_share=recipe.vision_lr_share)
    last = time.monotonic()
    while progress.fraction < 1:
        batches = draw_batches(student.encoder, rng, recipe.answer_batch, recipe.mix)
        result = joint_loss(student, batches, rng)
        total = result.answers + recipe.vision_loss_weight * result.vision.loss
        optimizer.step(total, one_cycle(progress.fraction, ANSWER_WARMUP))
        progress.add(
            loss=result.answers.item(), vision_loss=result.vision.loss.item(), objects=result.vision.object_accuracy
        )
        if time.monotonic() - last > checkpoint_every_s:
            checkpoint()
            progress.say(teacher_forced=validate(student))
            last = time.monotonic()


def draw_batches(encoder: ChatEncoder, rng: Random, sizes: tuple[int, int, int], mix: Mix) -> tuple[Batch, ...]:
    """New conversations: about one image (a few without any), about several, about a clip."""
    num_single, num_multi, num_clips = sizes
    single = [
        greeting(rng) if rng.random() < GREETING_SHARE else image_conversation(rng, mix=mix) for _ in range(num_single)
    ]
    multi = [images_conversation(rng, mix=mix) for _ in range(num_multi)]
    clips = [clip_conversation(rng, mix=mix) for _ in range(num_clips)]
    return tuple(encoder.batch(group, rng) for group in (single, multi, clips))


def joint_loss(student: Student, batches: tuple[Batch, ...], rng: Random) -> JointLoss:
    """Run the vision side once over the pictures of all groups, the language model once per group."""
    scenes = [scene for batch in batches for scene in batch.scenes]
    features = see(student.model, scenes, rng)
    latents = torch.split(features.latents, [len(batch.scenes) for batch in batches])
    groups = tuple(
        answer_loss(student.model, student.encoder.image_id, batch, part)
        for batch, part in zip(batches, latents, strict=True)
    )
    weighted = [weight * group.loss for weight, group in zip(GROUP_WEIGHTS, groups, strict=True)]
    return JointLoss(torch.stack(weighted).sum(), vision_loss(student.heads, features, targets(scenes)), groups)


def validate(student: Student) -> dict[str, float]:
    """Teacher-forced exact match in percent, per kind, on scenes that training never draws."""
    rng = Random(VALIDATION_SEED)
    matches: dict[str, list[bool]] = defaultdict(list)
    student.model.eval()
    with torch.no_grad():
        for _ in range(VALIDATION_BATCHES):
            batches = draw_batches(student.encoder, rng, VALIDATION_SIZES, EVEN)
            result = joint_loss(student, batches, rng)
            for batch, group in zip(batches, result.groups, strict=True):
                for kind, is_right in group.matches(batch):
                    matches[kind].append(is_right)
    student.model.train()
    return {kind: round(100 * sum(right) / len(right), 1) for kind, right in sorted(matches.items())}
