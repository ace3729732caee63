"""Short ways to write turns, media, and what transformers itself makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import ProcessorMixin

from api_stub.contract.conversation import ImagePart, MediaPart, Role, TextPart, Turn, VideoPart
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
    processor: ProcessorMixin, turns: Sequence[Turn], media: Sequence[DecodedMedia], *, keep_clips: bool = False
) -> dict[str, torch.Tensor]:
    """Return what `apply_chat_template(..., tokenize=True)` makes of the conversation, clips as frames or whole."""
    waiting = iter(media)
    messages = []
    for turn in turns:
        content: list[dict[str, object]] = []
        for part in turn.content:
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
                continue
            medium = next(waiting)
            if isinstance(medium, DecodedClip) and keep_clips:
                content.append({"type": "video", "video": list(medium.frames)})
            else:
                content.extend({"type": "image", "image": frame} for frame in frames_of(medium))
        messages.append({"role": turn.role.value, "content": content})
    is_continuation = turns[-1].role is Role.ASSISTANT
    clips = [medium for medium in media if isinstance(medium, DecodedClip)] if keep_clips else []
    video = {"do_sample_frames": False, "video_metadata": [metadata_of(clip) for clip in clips]} if clips else {}
    encoded = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=not is_continuation,
        continue_final_message=is_continuation,
        processor_kwargs=video,
    )
    return {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}


def metadata_of(clip: DecodedClip) -> dict[str, object]:
    """Return upstream's description of a clip of one frame per second, every frame of which was sampled."""
    return {
        "total_num_frames": len(clip.frames),
        "fps": 1.0,
        "duration": float(len(clip.frames)),
        "frames_indices": list(range(len(clip.frames))),
    }


def frames_of(medium: DecodedMedia) -> tuple[Image.Image, ...]:
    """Return the pictures of a medium in time order."""
    return medium.frames if isinstance(medium, DecodedClip) else (medium.pixels,)
