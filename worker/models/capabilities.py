"""What a loaded processor and model can do, found out by asking them once at boot.

In: a processor and a model config. Out: one frozen `Capabilities`. Knows no jobs and no media.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedConfig, ProcessorMixin

from worker.models.captioner import Captioner, captioner_of

FALLBACK_CAPTION_PROMPT = "Describe this image."


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Facts about one checkpoint.

    has_chat_template: conversations can be rendered.
    has_system_role: the template accepts a system turn.
    image_token: the token that one image part becomes in the rendered prompt; None: the template shows no images.
    native_video: the processor takes whole clips; False: clips are shown as their frames.
    default_caption_prompt: what a caption job without a prompt asks; empty: pixels alone.
    captioner: how a model without a chat template is asked; None: it has one, or its family is not known.
    """

    has_chat_template: bool
    has_system_role: bool
    image_token: str | None
    native_video: bool
    default_caption_prompt: str
    captioner: Captioner | None = None


def probe(processor: ProcessorMixin, config: PreTrainedConfig) -> Capabilities:
    """Ask processor and config what they can do. Renders three tiny conversations, runs no model."""
    has_chat_template = getattr(processor, "chat_template", None) is not None
    captioner = None if has_chat_template else captioner_of(processor)
    fallback = FALLBACK_CAPTION_PROMPT if captioner is None else captioner.default_prompt
    return Capabilities(
        has_chat_template=has_chat_template,
        has_system_role=has_chat_template and _has_system_role(processor),
        image_token=_image_token(processor) if has_chat_template else None,
        native_video=getattr(processor, "video_processor", None) is not None,
        default_caption_prompt=getattr(config, "default_caption_prompt", None) or fallback,
        captioner=captioner,
    )


def _has_system_role(processor: ProcessorMixin) -> bool:
    return _render(processor, [_turn("system", "x"), _turn("user", "x")]) is not None


def _image_token(processor: ProcessorMixin) -> str | None:
    """Return the added token whose count grows by one with an image part; the processor's own name for it first."""
    without = _render(processor, [_turn("user", "x")])
    with_image = _render(processor, [_turn("user", "x", num_images=1)])
    if without is None or with_image is None:
        return None
    grown = [
        token for token in processor.tokenizer.get_added_vocab() if with_image.count(token) == without.count(token) + 1
    ]
    named = [getattr(processor, name, None) for name in ("image_token", "boi_token")]
    return next((token for token in [*named, *sorted(grown, key=len, reverse=True)] if token in grown), None)


def _turn(role: str, text: str, num_images: int = 0) -> Mapping[str, object]:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    return {"role": role, "content": content}


def _render(processor: ProcessorMixin, messages: Sequence[Mapping[str, object]]) -> str | None:
    try:
        return str(processor.apply_chat_template(list(messages), add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError):
        return None
