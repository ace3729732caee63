"""A picture of a sample of a data set: people look at their data before they train on them.

In: a data set. Out: one picture, a grid of examples with their lines, splits and texts. Draws on the processor only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Final

from PIL import Image, ImageDraw, ImageFont, ImageOps

from api_stub.contract.conversation import TextPart
from worker.media.types import DecodedClip, DecodedMedia
from worker.training.dataset import Dataset, Example, Split

COLUMNS: Final = 4
CELL_WIDTH, PICTURE_HEIGHT, TEXT_HEIGHT, GAP = 280, 200, 110, 10
#: Frames shown of a clip, pictures of an example.
MOST_PICTURES: Final = 4
FONT, FONT_SIZE, LINE_HEIGHT = "DejaVuSans.ttf", 12, 15
_BACKGROUND, _PAPER, _INK, _FAINT = (236, 236, 236), (255, 255, 255), (20, 20, 20), (110, 110, 110)


def contact_sheet(dataset: Dataset, number: int, seed: int) -> Image.Image:
    """Draw `number` examples, or all if there are fewer, in the order of their lines; other seeds, other examples."""
    splits: tuple[Split, ...] = ("train", "validation", "test")
    every = [(split, example) for split in splits for example in dataset.split(split)]
    chosen = sorted(Random(seed).sample(every, min(number, len(every))), key=lambda one: one[1].line)
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    height = PICTURE_HEIGHT + TEXT_HEIGHT
    size = (columns * (CELL_WIDTH + GAP) + GAP, rows * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, _BACKGROUND)
    for place, (split, example) in enumerate(chosen):
        cell = _cell(example, split, dataset.media(example))
        sheet.paste(cell, (GAP + place % columns * (CELL_WIDTH + GAP), GAP + place // columns * (height + GAP)))
    return sheet


def _cell(example: Example, split: Split, media: Sequence[DecodedMedia]) -> Image.Image:
    cell = Image.new("RGB", (CELL_WIDTH, PICTURE_HEIGHT + TEXT_HEIGHT), _PAPER)
    pictures = _sample([picture for medium in media for picture in _pictures(medium)])
    for place, picture in enumerate(pictures):
        width = CELL_WIDTH // len(pictures)
        shown = ImageOps.contain(picture, (width - 4, PICTURE_HEIGHT - 4))
        cell.paste(shown, (place * width + (width - shown.width) // 2, (PICTURE_HEIGHT - shown.height) // 2))
    font = _font()
    pen = ImageDraw.Draw(cell)
    heading = f"line {example.line} · {split}" + (f" · {example.kind}" if example.kind else "")
    pen.text((4, PICTURE_HEIGHT), heading, _FAINT, font)
    most_lines = TEXT_HEIGHT // LINE_HEIGHT - 1
    for number, line in enumerate(_wrapped(_text(example), font, most_lines), 1):
        pen.text((4, PICTURE_HEIGHT + number * LINE_HEIGHT), line, _INK, font)
    return cell


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font of many scripts: the machine's or matplotlib's, else Pillow's, which has ASCII only."""
    found = find_spec("matplotlib")
    folders = (found.submodule_search_locations or []) if found is not None else []
    for file in (FONT, *(str(Path(folder, "mpl-data", "fonts", "ttf", FONT)) for folder in folders)):
        try:
            return ImageFont.truetype(file, FONT_SIZE)
        except OSError:
            continue
    return ImageFont.load_default(FONT_SIZE)


def _pictures(medium: DecodedMedia) -> Sequence[Image.Image]:
    return _sample(medium.frames) if isinstance(medium, DecodedClip) else (medium.pixels,)


def _sample(pictures: Sequence[Image.Image]) -> Sequence[Image.Image]:
    step = max(1, -(-len(pictures) // MOST_PICTURES))
    return pictures[::step]


def _text(example: Example) -> str:
    if example.messages is None:
        return " / ".join(example.texts)
    spoken = (
        (turn.role.value, " ".join(part.text for part in turn.content if isinstance(part, TextPart)))
        for turn in example.messages
    )
    return "\n".join(f"{role}: {text}" for role, text in spoken)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, most_lines: int) -> list[str]:
    """Break a text into lines that fit a cell; the last one says that there is more."""
    lines = [""]
    # Whole pages would be measured letter by letter, and never shown.
    for letter in text[: 200 * most_lines]:
        line = lines[-1] + letter
        if letter == "\n" or font.getlength(line) > CELL_WIDTH - 8:
            before, _, word = (lines[-1], "", "") if letter in " \n" else lines[-1].rpartition(" ")
            lines[-1:] = [before, word + letter.strip()] if before else [lines[-1], letter.strip()]
        else:
            lines[-1] = line
        if len(lines) > most_lines:
            return [*lines[: most_lines - 1], f"{lines[most_lines - 1][:-1]}…"]
    return lines
