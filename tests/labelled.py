"""Conversations written out by hand, token by token, with what is to be learnt of them, for the tests of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Final

from torch import Tensor

from tests.unit.worker.prompting.conversations import IMAGE, assistant, image, user
from worker.media.types import DecodedMedia
from worker.models.generation_defaults import eos_token_ids
from worker.models.loader import LoadedModel
from worker.training.batch import IGNORED, Row
from worker.training.example import Example
from worker.training.labels import Encoder, encoder_for


class Learnt(str):
    """A piece of a prompt that is to be learnt."""

    __slots__ = ()


FAKE: Final = "<fake_token_around_image>"
IMAGES: Final = "<image>" * 4
TILE: Final = FAKE + "<row_{}_col_{}>" + IMAGES
WHOLE: Final = f"\n\n{FAKE}<global-img>{IMAGES}{FAKE}"
SQUARE: Final = (
    f"{TILE.format(1, 1)}{TILE.format(1, 2)}\n{TILE.format(2, 1)}{TILE.format(2, 2)}{WHOLE}"  # 48×48 in tiles of 32
)
WIDE: Final = f"{TILE.format(1, 1)}{TILE.format(1, 2)}{WHOLE}"  # 64×32
SOFT: Final = "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n"
SYSTEM: Final = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
END: Final = "<end_of_utterance>"


def _idefics(first: str, second: str) -> tuple[str, ...]:
    return (
        f"User:{first}What is it?{END}\nAssistant:",
        Learnt(f" A pink cat.{END}"),
        f"\nUser: And{second}here?{END}\nAssistant:",
        Learnt(f" Two dogs.{END}"),
        "\n",
    )


def _chatml(first: str, second: str) -> tuple[str, ...]:
    return (
        f"<|im_start|>user\n{first}What is it?<|im_end|>\n<|im_start|>assistant\n",
        Learnt("A pink cat.<|im_end|>"),
        f"\n<|im_start|>user\n{second}here?<|im_end|>\n<|im_start|>assistant\n",
        Learnt("Two dogs.<|im_end|>"),
        "\n",
    )


def _qwen(num_tokens: int) -> str:
    return f"<|vision_start|>{'<|image_pad|>' * num_tokens}<|vision_end|>"


#: `TURNS` about a picture of 48×48 and one of 64×32, as each family's processor writes them for its tokenizer.
BY_HAND: Final[Mapping[str, tuple[str, ...]]] = {
    "idefics2": ("<s>", *_idefics(f"{FAKE}{IMAGES}{FAKE} ", f"{FAKE}{IMAGES}{FAKE} ")),
    "idefics3": ("<|begin_of_text|>", *_idefics(SQUARE, WIDE)),
    "smolvlm": ("<|im_start|>", *_idefics(SQUARE, WIDE)),
    # The template puts a turn's pictures before its texts.
    "llava": _chatml("<image>" * 16, "<image>" * 16 + "And"),
    "qwen2.5-vl": (SYSTEM, *_chatml(_qwen(9), f"And{_qwen(8)}")),
    "gemma3": (
        f"<bos><start_of_turn>user\n{SOFT}What is it?<end_of_turn>\n<start_of_turn>model\n",
        Learnt("A pink cat.<end_of_turn>"),
        f"\n<start_of_turn>user\nAnd{SOFT}here?<end_of_turn>\n<start_of_turn>model\n",
        Learnt("Two dogs.<end_of_turn>"),
        "\n",
    ),
}
TURNS: Final = (
    user(IMAGE, "What is it?"), assistant("A pink cat."), user("And", IMAGE, "here?"), assistant("Two dogs.")
)  # fmt: skip
EXAMPLE: Final = Example(1, ("a.png", "b.png"), messages=TURNS)
CAPTIONED: Final = Example(2, ("a.png",), texts=("A red car.",))
TEXT_ONLY: Final = Example(3, (), messages=(user("Hello?"), assistant("Hi there.")))


@cache
def media() -> tuple[DecodedMedia, ...]:
    """Return the pictures of `EXAMPLE`."""
    return (image(1), image(2, 64, 32))


def encoder_of(loaded: LoadedModel) -> Encoder:
    """Return the encoder of a loaded model."""
    ends = eos_token_ids(loaded.model, loaded.tokenizer)
    return encoder_for(loaded.processor, loaded.model.config, eos_token_ids=ends)


def rows_of(encoder: Encoder) -> list[Row]:
    """Return a row with two pictures, one with a caption and one without pictures."""
    return [
        encoder.row(EXAMPLE, None, media()),
        encoder.row(CAPTIONED, CAPTIONED.texts[0], media()[:1]),
        encoder.row(TEXT_ONLY, None, ()),
    ]


def assert_is(row: Row, pieces: Sequence[str], loaded: LoadedModel) -> None:
    """Compare a row's ids and labels with pieces of text, each of which is tokenised alone."""
    ids, labels = list[int](), list[int]()
    for piece in pieces:
        tokens: list[int] = loaded.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if isinstance(piece, Learnt) else [IGNORED] * len(tokens)
    assert loaded.tokenizer.decode(row.tensors["input_ids"][0]) == "".join(pieces)
    assert row.tensors["input_ids"].tolist() == [ids]
    assert row.labels.tolist() == [labels]


def loss(loaded: LoadedModel, tensors: Mapping[str, Tensor], labels: Tensor) -> tuple[float, int]:
    """Return the model's loss, a mean over the learnt tokens, and their number; the first token is never learnt."""
    result = loaded.model(**tensors, labels=labels, use_cache=False)
    return float(result.loss), int((labels[:, 1:] != IGNORED).sum())
