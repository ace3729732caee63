"""What a loaded processor and model can do, found out by asking them once at boot.

In: a processor and a model config. Out: one frozen `Capabilities`. Knows no jobs and no media.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedConfig, ProcessorMixin

from worker.models.captioner import Captioner, captioner_of

FALLBACK_CAPTION_PROMPT = "Describe this image."
#: Attributes by which processors name their placeholders.
_TOKEN_NAMES: Mapping[str, Sequence[str]] = {"image": ("image_token", "boi_token"), "video": ("video_token",)}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Facts about one checkpoint.

    has_chat_template: conversations can be rendered.
    has_system_role: the template accepts a system turn.
    image_token: the token that one image part becomes in the rendered prompt; None: the template shows no images.
    video_token: the same of one video part; None: the model takes no clips, they are shown as their frames.
    can_mix_media: images and clips can stand in one prompt; False: clips beside images are shown as their frames.
    can_mix_lengths: so can clips of different numbers of frames.
    default_caption_prompt: what a caption job without a prompt asks; empty: pixels alone.
    captioner: how a model without a chat template is asked; None: it has one, or its family is not known.
    """

    has_chat_template: bool
    has_system_role: bool
    image_token: str | None
    video_token: str | None
    can_mix_media: bool
    can_mix_lengths: bool
    default_caption_prompt: str
    captioner: Captioner | None = None

    @property
    def native_video(self) -> bool:
        """Whether the model gets a clip as a clip, with the times of its frames where the family uses them."""
        return self.video_token is not None


def probe(processor: ProcessorMixin, config: PreTrainedConfig) -> Capabilities:
    """Ask processor and config what they can do. Renders a few conversations, shows a few frames, runs no model."""
    has_chat_template = getattr(processor, "chat_template", None) is not None
    takes_clips = has_chat_template and _takes_clips(processor, 2)
    captioner = None if has_chat_template else captioner_of(processor)
    fallback = FALLBACK_CAPTION_PROMPT if captioner is None else captioner.default_prompt
    return Capabilities(
        has_chat_template=has_chat_template,
        has_system_role=has_chat_template and _has_system_role(processor),
        image_token=_media_token(processor, "image") if has_chat_template else None,
        video_token=_media_token(processor, "video") if takes_clips else None,
        can_mix_media=takes_clips and not _shared_tensors(processor),
        can_mix_lengths=takes_clips and _takes_clips(processor, 2, 4),
        default_caption_prompt=getattr(config, "default_caption_prompt", None) or fallback,
        captioner=captioner,
    )


def _has_system_role(processor: ProcessorMixin) -> bool:
    return _render(processor, [_turn("system", "x"), _turn("user", "x")]) is not None


def _takes_clips(processor: ProcessorMixin, *num_frames: int) -> bool:
    """Give the video processor clips of these lengths; some cannot stack clips that differ (LLaVA-OneVision)."""
    video_processor = getattr(processor, "video_processor", None)
    if video_processor is None:
        return False
    clips = [np.zeros((length, 32, 32, 3), np.uint8) for length in num_frames]
    try:
        video_processor(clips, do_sample_frames=False, return_tensors="pt")
    except (ValueError, TypeError, RuntimeError, AttributeError):
        return False
    return True


def _shared_tensors(processor: ProcessorMixin) -> set[str]:
    """Return the tensors that images and clips both claim: one would silently replace the other (SmolVLM)."""
    return set(processor.image_processor.model_input_names) & set(processor.video_processor.model_input_names)


def _media_token(processor: ProcessorMixin, kind: str) -> str | None:
    """Return the token whose count grows by one with a part of this kind; the processor's own name for it first.

    A placeholder need not be in the vocabulary: SmolVLM's `<video>` is a word until the processor replaces it.
    """
    without = _render(processor, [_turn("user", "x")])
    with_part = _render(processor, [_turn("user", "x", kind)])
    if without is None or with_part is None:
        return None
    named = [getattr(processor, name, None) for name in _TOKEN_NAMES[kind]]
    candidates = [*named, *sorted(processor.tokenizer.get_added_vocab(), key=len, reverse=True)]
    return next((token for token in candidates if token and _grows_by_one(str(token), without, with_part)), None)


def _grows_by_one(token: str, without: str, with_part: str) -> bool:
    return with_part.count(token) == without.count(token) + 1


def _turn(role: str, text: str, *kinds: str) -> Mapping[str, object]:
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]
    return {"role": role, "content": content}


def _render(processor: ProcessorMixin, messages: Sequence[Mapping[str, object]]) -> str | None:
    try:
        return str(processor.apply_chat_template(list(messages), add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError):
        return None
