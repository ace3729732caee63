"""The prompt format of a checkpoint: its chat template or, if it has none, its family's convention.

`settle_template`: in, a loaded processor and its place; out, a `ChatTemplate`, also set on the processor. The
operator's template comes first, then the files of transformers' `ProcessorMixin.get_processor_dict` in their order,
then the tokenizer's template. An invalid template is CannotStart.

`captioner_of`: how GIT, BLIP-2 and PaliGemma, which have no template, take pictures and at most one text. Knows no
turns and no jobs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from PIL import Image
from transformers import Blip2Processor, GitProcessor, PaliGemmaProcessor, ProcessorMixin
from transformers.utils import cached_file
from transformers.utils.chat_template_utils import render_jinja_template

from worker.errors import CannotStart
from worker.settings import WorkerSettings

Encode = Callable[[ProcessorMixin, Sequence[Image.Image], str], Mapping[str, Any]]

#: Usual templates have a few kilobytes.
MAX_TEMPLATE_BYTES: Final = 1024 * 1024
VARIABLE: Final = "VISIONQ_CHAT_TEMPLATE"
#: transformers' name of the template that is used by default.
_DEFAULT: Final = "default"
_IN_PROCESSOR: Final = ("processor_config.json", "chat_template.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Captioner:
    """The prompt format of a family without a chat template.

    family: its name, for messages.
    takes_questions: it answers questions; the others only continue a caption that the text begins.
    max_images: pictures per prompt; None: any number from 1.
    default_prompt: the text of a caption without a prompt; empty: none.
    encode: `(processor, pictures, text)` to the forward's arguments, batch 1. Raises ValueError for invalid input.
    """

    family: str
    takes_questions: bool
    max_images: int | None
    default_prompt: str
    encode: Encode


def captioner_of(processor: ProcessorMixin) -> Captioner | None:
    """Return the prompt format of the processor's family; None for other families."""
    return next((captioner for kind, captioner in _CAPTIONERS.items() if isinstance(processor, kind)), None)


def _encode_git(processor: ProcessorMixin, pictures: Sequence[Image.Image], text: str) -> Mapping[str, Any]:
    """The text is the beginning of the caption: after the start token, without the end token of BERT's tokenizer.

    Without a text this equals the start of `generate` with pixels only.
    """
    tokenizer = processor.tokenizer
    start = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    words = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    input_ids = torch.tensor([[start, *words]])
    pixels = processor.image_processor(list(pictures), return_tensors="pt")
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pixels}


def _encode_blip2(processor: ProcessorMixin, pictures: Sequence[Image.Image], text: str) -> Mapping[str, Any]:
    encoded: Mapping[str, Any] = processor(images=list(pictures), text=text, return_tensors="pt")
    return encoded


def _encode_paligemma(processor: ProcessorMixin, pictures: Sequence[Image.Image], text: str) -> Mapping[str, Any]:
    """Image tokens, then the text as prefix; the processor itself adds BOS and the closing line break."""
    prompt = processor.image_token * len(pictures) + text
    encoded: Mapping[str, Any] = processor(images=list(pictures), text=prompt, return_tensors="pt")
    return encoded


_CAPTIONERS: Mapping[type[ProcessorMixin], Captioner] = {
    GitProcessor: Captioner("GIT", False, 1, "", _encode_git),
    Blip2Processor: Captioner("BLIP-2", False, 1, "", _encode_blip2),
    PaliGemmaProcessor: Captioner("PaliGemma", True, None, "caption en", _encode_paligemma),
}


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """One Jinja template.

    source: the file it came from, for messages.
    is_given: it is the operator's, and replaces every other template of the processor.
    """

    text: str
    source: str
    is_given: bool = False


def settle_template(settings: WorkerSettings, processor: ProcessorMixin, source: str | Path) -> ChatTemplate | None:
    """Choose the template, set it on the processor and return it; None: there is none. Raises CannotStart.

    A family with a prompt format of its own uses a template of its processor, not of its tokenizer: that is the
    language model's, which has no pictures.
    """
    template = _given(settings.chat_template) if settings.chat_template is not None else None
    if template is None:
        template = _named(settings, getattr(processor, "chat_template", None), lambda: _place(settings, source))
    if template is None and captioner_of(processor) is None:
        own = getattr(processor.tokenizer, "chat_template", None)
        template = _named(settings, own, lambda: "tokenizer_config.json")
    processor.chat_template = None if template is None else template.text
    return template


def _given(path: Path) -> ChatTemplate:
    """Read the operator's file."""
    path = path.expanduser()
    if not path.is_file():
        raise CannotStart(f"{VARIABLE}={path}: there is no such file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEMPLATE_BYTES + 1)
        if len(content) > MAX_TEMPLATE_BYTES:
            num_bytes = path.stat().st_size
            raise CannotStart(f"{VARIABLE}={path}: {num_bytes} bytes, the limit is {MAX_TEMPLATE_BYTES}")
        # A byte order mark, which some editors write, would become part of every prompt.
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise CannotStart(f"{VARIABLE}={path}: cannot be read: {error.strerror or type(error).__name__}") from error
    except UnicodeDecodeError as error:
        raise CannotStart(f"{VARIABLE}={path}: not UTF-8 (byte {error.start})") from error
    if not text.strip():
        raise CannotStart(f"{VARIABLE}={path}: the file is empty")
    _check(f"{VARIABLE}={path}", text)
    return ChatTemplate(text, f"{VARIABLE}={path}", is_given=True)


def _named(settings: WorkerSettings, found: object, place: Callable[[], str]) -> ChatTemplate | None:
    """Return what transformers would render with: the template, or the one named `default` of several.

    found: text, `{name: text}`, or a list of `{"name": …, "template": …}` as older files hold it.
    """
    if not found:
        return None
    where = f"VISIONQ_MODEL={settings.model}: the chat template in {place()}"
    if isinstance(found, Sequence) and not isinstance(found, str):
        entries = [entry for entry in found if isinstance(entry, Mapping) and {"name", "template"} <= entry.keys()]
        found = {str(entry["name"]): entry["template"] for entry in entries} if len(entries) == len(found) else None
    if isinstance(found, Mapping):
        if _DEFAULT not in found:
            raise CannotStart(
                f"{where}: there are {', '.join(sorted(map(str, found)))} and none is named {_DEFAULT}; "
                f"write the one to use into a file and name it in {VARIABLE}"
            )
        found = found[_DEFAULT]
    if not isinstance(found, str):
        raise CannotStart(f"{where}: it is neither text nor a set of named texts")
    if not found.strip():
        return None
    _check(where, found)
    return ChatTemplate(found, place())


def _check(where: str, text: str) -> None:
    """Compile it as transformers does, with its filters and its blocks; no conversation is rendered yet."""
    try:
        render_jinja_template(conversations=[], chat_template=text)
    except TemplateSyntaxError as error:
        raise CannotStart(f"{where}: not a Jinja template: line {error.lineno}: {error.message}") from error
    except (TemplateError, ValueError, SyntaxError, OverflowError, RecursionError) as error:
        raise CannotStart(f"{where}: not a Jinja template: {error}") from error


def _place(settings: WorkerSettings, source: str | Path) -> str:
    """Return the file of the processor that transformers took the template from; the first that has one."""
    for name in _IN_PROCESSOR:
        file = cached_file(
            str(source),
            name,
            revision=settings.model_revision or None,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is not None and (name != "processor_config.json" or _has_template(Path(file))):
            return name
    return "additional_chat_templates"


def _has_template(file: Path) -> bool:
    return json.loads(file.read_text(encoding="utf-8")).get("chat_template") is not None
