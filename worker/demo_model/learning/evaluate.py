"""How often a checkpoint is right, per kind of question: `python -m worker.demo_model.learning.evaluate`.

Exact match of greedy answers on held-out scenes, through the real path of `answering.py`. Prints a table; `--json`
writes the same numbers with a few wrong answers of each kind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from worker.demo_model import CHECKPOINT
from worker.demo_model.learning.answering import Answerer
from worker.demo_model.learning.exam import CLIP_FILE_ACTIONS, KINDS, Item, batches, clip_file_exam, exam

SHOWN_ERRORS = 3
SAMPLED_FRAMES = (2, 4, 6, 8, 12, 16)


@dataclass(frozen=True, slots=True)
class Mistake:
    """A wrong answer."""

    question: str
    given: str
    true: str


@dataclass(frozen=True, slots=True)
class Score:
    """The result of one kind."""

    kind: str
    num_items: int
    num_right: int
    mistakes: tuple[Mistake, ...]

    @property
    def percent(self) -> float:
        """Exact match in percent."""
        return 100 * self.num_right / self.num_items


def score(answerer: Answerer, kind: str, items: Sequence[Item], batch_size: int) -> Score:
    """Ask all items of one kind and count the exact matches."""
    given = [answer for batch in batches(items, batch_size) for answer in answerer.answer(batch)]
    mistakes = tuple(
        Mistake(_last_question(item), answer, item.answer)
        for item, answer in zip(items, given, strict=True)
        if answer != item.answer
    )
    return Score(kind, len(items), len(items) - len(mistakes), mistakes[:SHOWN_ERRORS])


def clip_file_scores(answerer: Answerer, num: int, seed: int, batch_size: int) -> Iterable[Score]:
    """Scores of clips read back from compressed files, per container and number of sampled frames."""
    for container in ("mp4", "avi"):
        for num_frames in SAMPLED_FRAMES:
            for kind in CLIP_FILE_ACTIONS:
                items = list(clip_file_exam(kind, num, seed, num_frames, container))
                yield score(answerer, f"{kind}, {container}, {num_frames} frames", items, batch_size)


def _last_question(item: Item) -> str:
    content = item.messages[-1]["content"]
    assert isinstance(content, list)
    return str(content[-1]["text"])


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of exact matches."""
    args = _parse(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    answerer = Answerer.load(args.checkpoint)
    sys.stdout.write(f"{answerer.num_parameters / 1e6:.2f} M parameters, seed {args.seed}\n\n")
    sys.stdout.write(f"{'kind of question':<32}{'n':>5}{'right %':>9}\n")
    scores = []
    for result in _scores(answerer, args):
        scores.append(result)
        sys.stdout.write(f"{result.kind:<32}{result.num_items:>5}{result.percent:>9.1f}\n")
        sys.stdout.flush()
    if args.json:
        report = {"checkpoint": args.checkpoint.name, "seed": args.seed, "scores": [asdict(s) for s in scores]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _scores(answerer: Answerer, args: argparse.Namespace) -> Iterable[Score]:
    if args.clip_files:
        yield from clip_file_scores(answerer, args.n, args.seed, args.batch_size)
        return
    for kind in args.kinds:
        yield score(answerer, kind, exam(kind, args.n, args.seed), args.batch_size)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.demo_model.learning.evaluate", description=main.__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--n", type=int, default=100, help="questions per kind")
    parser.add_argument("--seed", type=int, default=20_301)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--clip-files", action="store_true", help="clips through MP4 and AVI files instead")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the numbers and some mistakes to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
