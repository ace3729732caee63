"""What a loaded checkpoint supports, found out once at boot.

In: a processor and a model config. Out: one frozen `Capabilities`. Knows no jobs and no media.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedConfig, ProcessorMixin

from worker.models.templates import Captioner, ChatTemplate, captioner_of

FALLBACK_CAPTION_PROMPT = "Describe this image."
#: Attributes in which processors keep their placeholder tokens.
_TOKEN_NAMES: Mapping[str, Sequence[str]] = {"image": ("image_token", "boi_token"), "video": ("video_token",)}

#: A template is a program: what jinja2 and transformers raise, and what its expressions may.
_RENDERING_ERRORS = (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError)

#: The text of a trial conversation, and a further field of its parts that must not be rendered.
_WORDS, _HIDDEN = "quux", "xyzzy"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one checkpoint supports.

    has_chat_template: conversations can be rendered.
    has_system_role: the template accepts a system turn.
    image_token: the token of one image part in the rendered prompt; None: the template renders no images.
    video_token: the same for one video part; None: the model takes no clips, which are given as their frames.
    can_mix_media: images and clips can be in one prompt; False: clips beside images are given as their frames.
    can_mix_lengths: clips of different numbers of frames can be in one prompt.
    default_caption_prompt: the prompt of a caption job without one; empty: pixels only.
    captioner: the prompt format of a model without a chat template; None: it has one, or its family is not known.
    template_source: where the chat template came from; empty: there is none, or it is not used.
    given_template: the operator's template, which overrides any other of the processor.
    takes_parts: the template takes a turn as a list of parts; False: it takes plain text only, so no media.
    """

    has_chat_template: bool
    has_system_role: bool
    image_token: str | None
    video_token: str | None
    can_mix_media: bool
    can_mix_lengths: bool
    default_caption_prompt: str
    captioner: Captioner | None = None
    template_source: str = ""
    given_template: str | None = None
    takes_parts: bool = True

    @property
    def native_video(self) -> bool:
        """Whether the model takes a clip as a clip, with the times of its frames where the family uses them."""
        return self.video_token is not None


def probe(processor: ProcessorMixin, config: PreTrainedConfig, template: ChatTemplate | None = None) -> Capabilities:
    """Find out what a processor and a config support: render a few conversations, process a few frames, run no model.

    `template` is what `settle_template` set on the processor. Raises ValueError for a template that drops text.
    """
    given = template.text if template is not None and template.is_given else None
    render = _Renderer(processor, given)
    captioner = captioner_of(processor)
    has_chat_template = getattr(processor, "chat_template", None) is not None
    image_token = _media_token(render, "image") if has_chat_template else None
    if captioner is not None and image_token is None and given is None:
        # It is a language model's, saved with a processor that has a prompt format of its own.
        has_chat_template = False
    takes_parts = not has_chat_template or _takes_parts(render)
    takes_clips = has_chat_template and _takes_clips(processor, 2)
    if has_chat_template:
        captioner = None
    fallback = FALLBACK_CAPTION_PROMPT if captioner is None else captioner.default_prompt
    return Capabilities(
        has_chat_template=has_chat_template,
        has_system_role=has_chat_template and render([_turn("system", "x"), _turn("user", "x")]) is not None,
        image_token=image_token if has_chat_template and takes_parts else None,
        video_token=_media_token(render, "video") if takes_clips and takes_parts else None,
        can_mix_media=takes_clips and not _shared_tensors(processor),
        can_mix_lengths=takes_clips and _takes_clips(processor, 2, 4),
        default_caption_prompt=getattr(config, "default_caption_prompt", None) or fallback,
        captioner=captioner,
        template_source=template.source if template is not None and has_chat_template else "",
        given_template=given,
        takes_parts=takes_parts,
    )


def _takes_parts(render: _Renderer) -> bool:
    """Return whether the template takes a turn as a list of parts: it renders their text, and nothing else of them.

    Templates of language models expect text: of a list they render its Python representation, or nothing. Raises
    ValueError when a turn of plain text is not rendered either.
    """
    shown = render([_turn("user", _WORDS)])
    if shown is not None and _WORDS in shown.casefold() and _HIDDEN not in shown.casefold():
        return True
    shown = render([{"role": "user", "content": _WORDS}])
    if shown is None or _WORDS not in shown.casefold():
        raise ValueError("the chat template does not show what a user says")
    return False


def _takes_clips(processor: ProcessorMixin, *num_frames: int) -> bool:
    """Whether the video processor takes clips of these lengths; some cannot stack different ones (LLaVA-OneVision)."""
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
    """Return the names of tensors that images and clips share: one would silently replace the other (SmolVLM)."""
    return set(processor.image_processor.model_input_names) & set(processor.video_processor.model_input_names)


def _media_token(render: _Renderer, kind: str) -> str | None:
    """Return the token whose count grows by one with a part of this kind; the processor's own name for it first.

    A placeholder need not be in the vocabulary: SmolVLM's `<video>` is a word until the processor replaces it.
    """
    without = render([_turn("user", "x")])
    with_part = render([_turn("user", "x", kind)])
    if without is None or with_part is None:
        return None
    named = [getattr(render.processor, name, None) for name in _TOKEN_NAMES[kind]]
    candidates = [*named, *sorted(render.processor.tokenizer.get_added_vocab(), key=len, reverse=True)]
    return next((token for token in candidates if token and _grows_by_one(str(token), without, with_part)), None)


def _grows_by_one(token: str, without: str, with_part: str) -> bool:
    return with_part.count(token) == without.count(token) + 1


def _turn(role: str, text: str, *kinds: str) -> Mapping[str, object]:
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": text, "note": _HIDDEN}]
    return {"role": role, "content": content}


@dataclass(frozen=True, slots=True)
class _Renderer:
    """Renders with the processor's template, or with `template`; returns None when the template fails."""

    processor: ProcessorMixin
    template: str | None

    def __call__(self, messages: Sequence[Mapping[str, object]]) -> str | None:
        try:
            return str(
                self.processor.apply_chat_template(
                    list(messages), chat_template=self.template, add_generation_prompt=True
                )
            )
        except _RENDERING_ERRORS:
            return None
