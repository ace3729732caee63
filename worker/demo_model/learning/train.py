"""Trains the demo model: `python -m worker.demo_model.learning.train --out DIR --minutes 60`.

First the vision side learns what lies where (`--see-minutes`), then everything learns to answer (`--minutes`). Writes
a half-precision checkpoint that the Auto classes load, every few minutes and at the end, and prints JSON lines.
`--init DIR` continues from a checkpoint. Learning-rate schedules follow the clock, so a slower machine trains less,
not longer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from random import Random

import torch
from transformers.utils import logging as transformers_logging

from worker.demo_model.learning.conversations import EVEN, HARD
from worker.demo_model.learning.phases import Recipe, learn_to_answer, learn_to_see, validate
from worker.demo_model.learning.progress import Budget, Progress, print_report
from worker.demo_model.learning.student import Student

MIXES = {"even": EVEN, "hard": HARD}
SEE_MINUTES = 6.0


def main(argv: Sequence[str] | None = None) -> int:
    """Train from scratch, or continue from a checkpoint, and write a checkpoint."""
    args = _parse(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients are slow in software
    torch.manual_seed(args.seed)
    rng = Random(args.seed)
    student = Student.resume(args.init, rng) if args.init else Student.new()
    see_minutes = args.see_minutes if args.see_minutes is not None else 0.0 if args.init else SEE_MINUTES
    recipe = _recipe(args)

    learn_to_see(student, recipe, rng, Progress("see", Budget(see_minutes, args.see_steps), print_report))
    progress = Progress("answer", Budget(args.minutes, args.steps), print_report)
    learn_to_answer(student, recipe, rng, progress, lambda: student.save(args.out), args.save_every * 60)
    student.save(args.out)
    progress.say(teacher_forced=validate(student), saved=str(args.out))
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    chosen = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    return Recipe(**{**chosen, "answer_batch": tuple(args.answer_batch), "mix": MIXES[args.mix]})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m worker.demo_model.learning.train",
        description=main.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint to write")
    parser.add_argument("--init", type=Path, help="checkpoint to continue from")
    parser.add_argument("--minutes", type=float, default=60, help="wall clock of the answering phase")
    parser.add_argument(
        "--see-minutes", type=float, help=f"wall clock of the seeing phase; None means {SEE_MINUTES}, or 0 with --init"
    )
    parser.add_argument("--steps", type=int, help="steps of the answering phase, instead of minutes")
    parser.add_argument("--see-steps", type=int, help="steps of the seeing phase, instead of minutes")
    parser.add_argument("--mix", choices=MIXES, default="even", help="hard: more of the kinds that are learned last")
    parser.add_argument("--answer-lr", type=float, default=recipe.answer_lr)
    parser.add_argument("--see-lr", type=float, default=recipe.see_lr)
    parser.add_argument("--vision-lr-share", type=float, default=recipe.vision_lr_share,
                        help="learning rate of the vision side in the answering phase, as a share")  # fmt: skip
    parser.add_argument("--vision-loss-weight", type=float, default=recipe.vision_loss_weight)
    parser.add_argument("--see-batch", type=int, default=recipe.see_batch, help="scenes per step")
    parser.add_argument("--answer-batch", type=int, nargs=3, default=recipe.answer_batch,
                        metavar=("IMAGE", "IMAGES", "CLIP"), help="conversations per step")  # fmt: skip
    parser.add_argument("--save-every", type=float, default=5, help="minutes between saved checkpoints")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
