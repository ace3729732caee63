"""Draws a data set to teach the captioner with: `python -m worker.demo_model.learning.captioner.german --out DIR`.

Pictures of 200 × 200 and `metadata.jsonl`, one row each: `file_name`, `text` (a German caption with places) and `split`
(nine in ten `train`, the rest `validation`). The same seed draws the same data set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from worker.demo_model.draw import write_picture
from worker.demo_model.learning.captioner.captions import german
from worker.demo_model.scenes import make_scene

METADATA = "metadata.jsonl"
VALIDATION_EVERY = 10


def draw_data_set(folder: Path, count: int, seed: int) -> None:
    """Write the pictures and their rows into a folder, which is made when missing. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(f"{seed} german")
    with (folder / METADATA).open("w", encoding="utf-8") as file:
        for number in range(count):
            scene, name = make_scene(rng), f"scene-{number:05d}.png"
            write_picture(folder / name, scene)
            split = "validation" if number % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train"
            row = {"file_name": name, "text": german(scene), "split": split}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw a data set of German captions."""
    parser = argparse.ArgumentParser(
        prog="python -m worker.demo_model.learning.captioner.german", description=main.__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder, made when missing")
    parser.add_argument("--count", type=int, default=2000, help="pictures, a tenth of them for validation")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    draw_data_set(args.out, args.count, args.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
