"""Short ways to write turns, media, and what transformers itself makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import ProcessorMixin

from api_stub.contract.job import ImagePart, MediaPart, Role, TextPart, Turn, VideoPart
from tests.tiny.families import picture
from worker.media.types import DecodedClip, DecodedImage, DecodedMedia

IMAGE = ImagePart(uri="s3://media/scene.png")
VIDEO = VideoPart(uri="s3://media/clip.mp4")
MEDIUM = MediaPart(uri="s3://media/something")

Part = str | ImagePart | VideoPart | MediaPart


def says(role: Role, *parts: Part) -> Turn:
    """Return a turn of these parts."""
    return Turn(role=role, content=tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts))


def user(*parts: Part) -> Turn:
    """Return a user's turn."""
    return says(Role.USER, *parts)


def assistant(*parts: Part) -> Turn:
    """Return an assistant's turn."""
    return says(Role.ASSISTANT, *parts)


def system(*parts: Part) -> Turn:
    """Return a system turn."""
    return says(Role.SYSTEM, *parts)


def image(seed: int, width: int = 48, height: int = 48) -> DecodedImage:
    """Return a decoded still of noise."""
    return DecodedImage(picture(seed, width, height))


def clip(seed: int, num_frames: int) -> DecodedClip:
    """Return a decoded clip whose frames all differ."""
    frames = tuple(picture(1000 * seed + index) for index in range(num_frames))
    return DecodedClip(frames, tuple(float(index) for index in range(num_frames)), float(num_frames), 1.0)


def upstream(
    processor: ProcessorMixin, turns: Sequence[Turn], media: Sequence[DecodedMedia]
) -> dict[str, torch.Tensor]:
    """Return what `apply_chat_template(..., tokenize=True)` makes of the conversation, clips as frames."""
    waiting = iter(media)
    messages = []
    for turn in turns:
        content: list[dict[str, object]] = []
        for part in turn.content:
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
            else:
                content.extend({"type": "image", "image": frame} for frame in frames_of(next(waiting)))
        messages.append({"role": turn.role.value, "content": content})
    is_continuation = turns[-1].role is Role.ASSISTANT
    encoded = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=not is_continuation,
        continue_final_message=is_continuation,
    )
    return {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}


def frames_of(medium: DecodedMedia) -> tuple[Image.Image, ...]:
    """Return the pictures of a medium in time order."""
    return medium.frames if isinstance(medium, DecodedClip) else (medium.pixels,)
