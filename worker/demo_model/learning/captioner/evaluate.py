"""How well a captioner describes held-out scenes: `python -m worker.demo_model.learning.captioner.evaluate`.

Word error rate (case kept, white space normalised) and exact matches of greedy captions, through the stock processor
and `generate`. Prints a table; `--kinds german` measures a checkpoint that was taught German.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from worker.demo_model import CAPTIONER
from worker.demo_model.learning.captioner.captions import PLACES_BEGINNING, german, places
from worker.demo_model.questions import caption
from worker.demo_model.scenes import Pixels, Scene, draw, make_scene
from worker.training.scores import Answered, Scores, normalise
from worker.training.scores import score as score_answers

MAX_NEW_TOKENS = 200
SHOWN_MISTAKES = 3


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of caption: the beginning that is given, and the truth about a scene."""

    beginning: str
    truth: Callable[[Scene], str]


KINDS = {"caption": Kind("", caption), "places": Kind(PLACES_BEGINNING, places), "german": Kind("", german)}


@dataclass(frozen=True, slots=True)
class Captioner:
    """A loaded checkpoint. `processor` and `model` are stock transformers objects, which carry no types."""

    processor: Any
    model: Any

    @classmethod
    def load(cls, checkpoint: Path, dtype: torch.dtype = torch.float32) -> Captioner:
        """Load a directory; `dtype` because half precision is slower on a CPU. Raises OSError when it is none."""
        processor = AutoProcessor.from_pretrained(checkpoint)
        return cls(processor, AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).eval())

    @torch.inference_mode()
    def describe(self, pictures: Sequence[Pixels], beginning: str = "") -> list[str]:
        """Greedy captions of one batch, in order, without their beginning."""
        tokenizer = self.processor.tokenizer
        given = [tokenizer.bos_token_id, *tokenizer(beginning, add_special_tokens=False).input_ids]
        ids = torch.tensor([given] * len(pictures))
        images = [Image.fromarray(pixels) for pixels in pictures]
        pixels = self.processor.image_processor(images, return_tensors="pt").pixel_values
        output = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
            max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
        )  # fmt: skip
        return [text.strip() for text in tokenizer.batch_decode(output[:, len(given) :], skip_special_tokens=True)]


@dataclass(frozen=True, slots=True)
class Result:
    """The scores of one kind, and pairs of a wrong caption and the truth."""

    scores: Scores
    mistakes: tuple[tuple[str, str], ...]


def held_out(num: int, seed: int) -> list[Scene]:
    """Scenes that training, whose generator has another kind of seed, does not draw."""
    rng = Random(f"{seed} captions")
    return [make_scene(rng) for _ in range(num)]


def score(captioner: Captioner, kind: Kind, scenes: Sequence[Scene], batch_size: int) -> Result:
    """Describe all scenes, drawn at 200 × 200 without training's variations."""
    truths = [kind.truth(scene) for scene in scenes]
    given: list[str] = []
    for start in range(0, len(scenes), batch_size):
        given += captioner.describe([draw(scene) for scene in scenes[start : start + batch_size]], kind.beginning)
    pairs = list(zip(given, truths, strict=True))
    mistakes = tuple((text, truth) for text, truth in pairs if normalise(text) != truth)
    return Result(score_answers(Answered(text, (truth,)) for text, truth in pairs).overall, mistakes[:SHOWN_MISTAKES])


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of word error rates and exact matches."""
    args = _parse(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    captioner = Captioner.load(args.checkpoint)
    scenes = held_out(args.n, args.seed)
    sys.stdout.write(f"{'kind':<12}{'n':>5}{'WER':>9}{'exact %':>9}\n")
    for name in args.kinds:
        result = score(captioner, KINDS[name], scenes, args.batch_size)
        sys.stdout.write(f"{name:<12}{args.n:>5}{result.scores.wer:>9.3f}{100 * result.scores.exact_match:>9.1f}\n")
        for given, true in result.mistakes:
            sys.stdout.write(f"  {given!r} instead of {true!r}\n")
        sys.stdout.flush()
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m worker.demo_model.learning.captioner.evaluate", description=main.__doc__
    )
    parser.add_argument("--checkpoint", type=Path, default=CAPTIONER)
    parser.add_argument("--n", type=int, default=200, help="scenes")
    parser.add_argument("--seed", type=int, default=20_301)
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["caption", "places"], help="default: all but german"
    )
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
