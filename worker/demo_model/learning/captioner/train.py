"""Trains the captioner: `python -m worker.demo_model.learning.captioner.train --out DIR --minutes 30`.

The tower starts as the shipped chat model's and learns on crowded scenes what lies where (`--see-minutes`); then the
text layers learn to caption (`--minutes`), the tower frozen unless `--vision-lr-share` says otherwise. Writes a
half-precision checkpoint that the Auto classes load, every few minutes and at the end, and prints JSON lines.
`--init DIR` continues from a checkpoint.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from transformers.utils import logging as transformers_logging

from worker.demo_model.learning.captioner.caption_loss import caption_loss, pack
from worker.demo_model.learning.captioner.student import Student
from worker.demo_model.learning.captioner.supervision import offset_error, seeing_loss
from worker.demo_model.learning.optimizer import Optimizer, one_cycle
from worker.demo_model.learning.progress import Budget, Progress, print_report
from worker.demo_model.learning.supervision import targets
from worker.demo_model.scenes import make_dense_scene, make_scene

SEE_WARMUP, CAPTION_WARMUP = 0.1, 0.06
VALIDATION_SEED, VALIDATION_SCENES = 987_654, 120
SEE_MINUTES = 4.0
SPELT_EVERY = 12
#: Weights of one, two and three things per scene: at the start, and later.
EASY_NUM_THINGS, NUM_THINGS = (80, 20, 0), (25, 45, 30)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of both phases."""

    see_lr: float = 1.5e-3
    see_batch: int = 64
    caption_lr: float = 2e-3
    caption_batch: int = 48
    vision_lr_share: float = 0.0
    vision_loss_weight: float = 0.3
    easy_until: float = 0.3


def learn_to_see(student: Student, recipe: Recipe, rng: Random, progress: Progress) -> None:
    """Train the tower on crowded scenes until the budget is spent."""
    optimizer = Optimizer(student.model, student.heads, recipe.see_lr, vision_lr_share=1.0, trains_text=False)
    while progress.fraction < 1:
        scenes = [make_dense_scene(rng) for _ in range(recipe.see_batch)]
        seen, truth = student.see(scenes, rng), targets(scenes)
        result = seeing_loss(student.heads, seen, truth)
        optimizer.step(result.loss, one_cycle(progress.fraction, SEE_WARMUP))
        with torch.no_grad():
            error = offset_error(student.heads, seen, truth)
        progress.add(loss=result.loss.item(), objects=result.object_accuracy, offset_error=error)


def learn_to_caption(
    student: Student, recipe: Recipe, rng: Random, progress: Progress, checkpoint: Callable[[], None], every_s: float
) -> None:
    """Train on captions of new scenes until the budget is spent; now and then validate and call `checkpoint`."""
    optimizer = Optimizer(student.model, student.heads, recipe.caption_lr, vision_lr_share=recipe.vision_lr_share)
    last, is_frozen = time.monotonic(), recipe.vision_lr_share == 0
    while progress.fraction < 1:
        # Long rows of letters have steps of their own: beside them all others would be padded.
        is_spelt = progress.step % SPELT_EVERY == SPELT_EVERY - 1
        num = recipe.caption_batch // (4 if is_spelt else 1)
        scenes = [make_scene(rng, _num_things(rng, progress.fraction, recipe.easy_until)) for _ in range(num)]
        say = student.spelt if is_spelt else student.captions
        rows = pack([say(scene) for scene in scenes], student.processor.tokenizer.pad_token_id)
        with torch.no_grad() if is_frozen else nullcontext():
            seen = student.see(scenes, rng)
        loss, _ = caption_loss(student.model, seen, rows)
        numbers, total = {"spelt_loss" if is_spelt else "loss": loss.item()}, loss
        if not is_frozen:
            result = seeing_loss(student.heads, seen, targets(scenes))
            total = loss + recipe.vision_loss_weight * result.loss
            numbers |= {"vision_loss": result.loss.item(), "objects": result.object_accuracy}
        optimizer.step(total, one_cycle(progress.fraction, CAPTION_WARMUP))
        progress.add(**numbers)
        if time.monotonic() - last > every_s:
            checkpoint()
            progress.say(teacher_forced=validate(student))
            last = time.monotonic()


def _num_things(rng: Random, fraction: float, easy_until: float) -> int:
    """Mostly one thing at first: what a thing is called comes before which of several is meant."""
    share = min(1.0, fraction / easy_until) if easy_until else 1.0
    weights = [easy + share * (usual - easy) for easy, usual in zip(EASY_NUM_THINGS, NUM_THINGS, strict=True)]
    return rng.choices((1, 2, 3), weights)[0]


@torch.no_grad()
def validate(student: Student) -> dict[str, float]:
    """Teacher-forced exact match in percent of both kinds of captions, on scenes that training never draws."""
    rng = Random(VALIDATION_SEED)
    scenes = [make_scene(rng) for _ in range(VALIDATION_SCENES)]
    rows = pack([student.captions(scene) for scene in scenes], student.processor.tokenizer.pad_token_id)
    _, is_right = caption_loss(student.model, student.see(scenes, rng), rows)
    kinds = {"plain": rows.owner == 1, "places": rows.owner == 2}
    return {kind: 100 * (is_right | ~where).all(1).float().mean().item() for kind, where in kinds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or continue from a checkpoint, and write a checkpoint."""
    args = _parse(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients are slow in software
    torch.manual_seed(args.seed)
    rng = Random(args.seed)
    student = Student.resume(args.init, rng) if args.init else Student.new(rng)
    see_minutes = args.see_minutes if args.see_minutes is not None else 0.0 if args.init else SEE_MINUTES
    recipe = Recipe(**{name: getattr(args, name) for name in Recipe.__dataclass_fields__})

    learn_to_see(student, recipe, rng, Progress("see", Budget(see_minutes, args.see_steps), print_report))
    if args.init is None:
        student.aim_projection(rng)
    student.save(args.out)
    progress = Progress("caption", Budget(args.minutes, args.steps), print_report)
    learn_to_caption(student, recipe, rng, progress, lambda: student.save(args.out), args.save_every * 60)
    student.save(args.out)
    progress.say(teacher_forced=validate(student), saved=str(args.out))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m worker.demo_model.learning.captioner.train",
        description=main.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint to write")
    parser.add_argument("--init", type=Path, help="checkpoint to continue from")
    parser.add_argument("--minutes", type=float, default=30, help="wall clock of the captioning phase")
    parser.add_argument(
        "--see-minutes", type=float, help=f"wall clock of the seeing phase; None means {SEE_MINUTES}, or 0 with --init"
    )
    parser.add_argument("--steps", type=int, help="steps of the captioning phase, instead of minutes")
    parser.add_argument("--see-steps", type=int, help="steps of the seeing phase, instead of minutes")
    parser.add_argument("--see-lr", type=float, default=recipe.see_lr)
    parser.add_argument("--caption-lr", type=float, default=recipe.caption_lr)
    parser.add_argument("--vision-lr-share", type=float, default=recipe.vision_lr_share,
                        help="learning rate of the tower in the captioning phase, as a share; 0: frozen")  # fmt: skip
    parser.add_argument("--vision-loss-weight", type=float, default=recipe.vision_loss_weight)
    parser.add_argument("--see-batch", type=int, default=recipe.see_batch, help="scenes per step")
    parser.add_argument("--caption-batch", type=int, default=recipe.caption_batch, help="scenes per step")
    parser.add_argument("--easy-until", type=float, default=recipe.easy_until,
                        help="share of the captioning phase with easier scenes than held-out ones")  # fmt: skip
    parser.add_argument("--save-every", type=float, default=3, help="minutes between saved checkpoints")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
