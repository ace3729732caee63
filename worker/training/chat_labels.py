"""Labels of conversations, from any family's own chat template.

Learnt are the assistant's turns: all that follows a generation prompt, up to and with the end token, which is what
`generate` would have to write. Where that lies is found out by rendering the conversation with marks (noncharacters)
around the assistant's texts; they pass through the processor, which replaces placeholders by the tokens of pictures,
and are removed before the tokenizer. What every single example must show:

- without its marks the prompt is the plain one, and as many control tokens are in it as with harmless texts;
- it begins with what the template renders of the turns before and the generation prompt, white space aside;
- the assistant's text is followed by a token that ends generation;
- the ids begin with those of each of these beginnings alone: no token reaches over a border.

Otherwise UnsafeTemplate.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from api_stub.contract.conversation import MediaPart, Role, TextPart, Turn
from worker.errors import InvalidRequest
from worker.media.types import DecodedImage, DecodedMedia
from worker.models.capabilities import Capabilities, probe
from worker.models.context import max_context
from worker.prompting.chat import ChatTurn, Conversation, Placeholder, spread
from worker.prompting.processors import Processors
from worker.prompting.templated import TemplatedPrompts, shape_of
from worker.training.batch import IGNORED, Batch, Row, UnsafeTemplate, check_length, join_rows
from worker.training.example import Example

START, END = "\ufdd1", "\ufdd2"
_TRIAL_URI: Final = "s3://trial/noise"
_SHAPES_REMEMBERED: Final = 512


@dataclass(frozen=True, slots=True)
class _Unloaded:
    """A processor without a model."""

    processor: ProcessorMixin
    tokenizer: PreTrainedTokenizerBase
    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class _Learnt:
    """What one assistant's turn adds to the prompt: characters before its text, the text, and those up to its end."""

    before: str
    after: str


class ChatEncoder:
    """Encodes conversations, and captions as answers to `caption_prompt`, for one model with a chat template.

    eos_token_ids: the tokens at which generation stops, as serving reads them.
    caption_prompt: None takes the one of caption jobs without a prompt.
    Raises UnsafeTemplate when the labels of a plain conversation cannot be derived.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        config: PreTrainedConfig,
        *,
        eos_token_ids: Collection[int],
        caption_prompt: str | None = None,
    ) -> None:
        try:
            can = probe(processor, config)
        except ValueError as error:
            raise UnsafeTemplate(str(error)) from error
        tokenizer = processor.tokenizer
        if not can.has_chat_template:
            raise UnsafeTemplate(f"{type(processor).__name__} has no chat template")
        processors = Processors(_Unloaded(processor, tokenizer, can))
        self.max_length = max_context(config) or tokenizer.model_max_length
        self._processor, self._tokenizer = processor, tokenizer
        self._control, self._can = processors.control, can
        self._prompts = TemplatedPrompts(processors, can, config, tokenizer.bos_token)
        self._caption_prompt = can.default_caption_prompt if caption_prompt is None else caption_prompt
        added = tokenizer.added_tokens_decoder
        ends = [str(added[token].content) for token in eos_token_ids if token in added]
        self._ends = tuple(sorted(ends, key=len, reverse=True))
        self._counts = lru_cache(maxsize=_SHAPES_REMEMBERED)(self._count_of_shape)
        self._pad_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self._has_row_per_example = self._try_out()

    def row(self, example: Example, text: str | None, media: Sequence[DecodedMedia]) -> Row:
        """Encode one example; as in `Encoder`."""
        return self._encode(self._turns(example, text), media)

    def join(self, rows: Sequence[Row]) -> Batch:
        """Return the rows as one batch; as in `Encoder`."""
        return join_rows(rows, self._pad_id, has_row_per_example=self._has_row_per_example)

    def _turns(self, example: Example, text: str | None) -> tuple[Turn, ...]:
        if example.messages is not None:
            return example.messages
        assert text is not None, "an example without messages has captions"
        shown = tuple(MediaPart(uri=_TRIAL_URI) for _ in example.files)
        asked = (TextPart(text=self._caption_prompt),) if self._caption_prompt else ()
        return (
            Turn(role=Role.USER, content=(*shown, *asked)),
            Turn(role=Role.ASSISTANT, content=(TextPart(text=text),)),
        )

    def _encode(self, turns: Sequence[Turn], media: Sequence[DecodedMedia]) -> Row:
        conversation, shown = spread(turns, media, keep_clips=self._prompts.keeps_clips(media))
        self._check_texts(conversation)
        learnt = self._learnt(conversation, plain := self._prompts.render_plain(conversation, is_complete=True))
        if self._control.count_in(plain) != self._counts(shape_of(conversation)):
            raise InvalidRequest("messages: the text cannot be told apart from the model's control tokens")
        recorder = _Recorder(self._tokenizer)
        processor = copy.copy(self._processor)
        processor.tokenizer = recorder
        marked = self._prompts.render_plain(_marked(conversation), is_complete=True)
        tensors = self._prompts.process(processor, marked, shown, {})
        ids: Tensor = tensors["input_ids"]
        labels = torch.full_like(ids, IGNORED)
        for start, stop in recorder.ranges(learnt, ids[0].tolist()):
            labels[0, start:stop] = ids[0, start:stop]
            if any(token in self._control.ids for token in ids[0, start : stop - 1].tolist()):
                raise UnsafeTemplate("the assistant's turn has control tokens in it")
        check_length(ids.shape[1], self.max_length)
        return Row(tensors, labels)

    def _check_texts(self, conversation: Conversation) -> None:
        for text in conversation.texts:
            if self._control.occur_in(text) or START in text or END in text:
                raise InvalidRequest(f"the text has a control token of the model in it: {text[:80]!r}")
        if conversation.count(Placeholder.IMAGE) and self._can.image_token is None:
            raise InvalidRequest("this model's chat template shows no pictures")

    def _learnt(self, conversation: Conversation, plain: str) -> list[_Learnt]:
        """Return what is learnt of each assistant's turn, in order. Raises UnsafeTemplate."""
        marked = self._prompts.render_plain(_marked(conversation), is_complete=True)
        if _unmarked(marked) != plain:
            raise UnsafeTemplate("the chat template changes what an assistant says")
        spans = _spans(marked)
        answers = [number for number, turn in enumerate(conversation.turns) if turn.role is Role.ASSISTANT]
        if len(spans) != len(answers):
            raise UnsafeTemplate(f"the chat template shows {len(spans)} of {len(answers)} assistant's turns")
        learnt = []
        for number, (start, stop) in zip(answers, spans, strict=True):
            asked = self._prompts.render_plain(Conversation(conversation.turns[:number]))
            if not plain.startswith(asked) or plain[len(asked) : start].strip():
                raise UnsafeTemplate("an assistant's turn does not begin as the chat template's generation prompt says")
            learnt.append(_Learnt(plain[len(asked) : start], self._end_of_turn(plain[stop:])))
        return learnt

    def _end_of_turn(self, rest: str) -> str:
        """Return what follows an assistant's text, up to and with the end token."""
        word = rest.lstrip()
        end = next((end for end in self._ends if word.startswith(end)), None)
        if end is None:
            ends = ", ".join(self._ends) or "no token"
            raise UnsafeTemplate(
                f"the chat template ends an assistant's turn with {word[:20]!r}; generation stops at {ends}"
            )
        return f"{rest[: len(rest) - len(word)]}{end}"

    def _count_of_shape(self, shape: Conversation) -> Any:
        counts = self._control.count_in(self._prompts.render_plain(shape, is_complete=True))
        for placeholder, token in (
            (Placeholder.IMAGE, self._can.image_token),
            (Placeholder.VIDEO, self._can.video_token),
        ):
            if token is not None and counts[token] != shape.count(placeholder):
                shown = f"{counts[token]} of {shape.count(placeholder)} {placeholder.value}s"
                raise InvalidRequest(f"the model's chat template shows {shown}")
        return counts

    def _try_out(self) -> bool:
        """Encode a conversation with two pictures; return whether its pixels' first dimension is the example."""
        noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
        media = [DecodedImage(Image.fromarray(noise))] * (2 if self._can.image_token is not None else 0)
        turns = [
            Turn(role=Role.USER, content=(*(MediaPart(uri=_TRIAL_URI) for _ in media), TextPart(text="a question"))),
            Turn(role=Role.ASSISTANT, content=(TextPart(text="an answer"),)),
        ]
        again = [turn.model_copy(update={"content": (TextPart(text="more"),)}) for turn in turns]
        pixels = self._encode([*turns, *again], media).tensors.get("pixel_values")
        return pixels is not None and pixels.shape[0] == 1


class _Recorder:
    """Stands for a tokenizer in a copy of a processor: removes marks from the text and remembers their places."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._text, self._spans = "", list[tuple[int, int]]()
        self._adds_special_tokens = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str | Sequence[str], **options: Any) -> Any:
        marked = text if isinstance(text, str) else "".join(text)
        if START not in marked:
            return self._tokenizer(text, **options)
        self._text, self._spans = _unmarked(marked), _spans(marked)
        self._adds_special_tokens = options.get("add_special_tokens", True)
        return self._tokenizer(self._text if isinstance(text, str) else [self._text], **options)

    def ranges(self, learnt: Sequence[_Learnt], ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return the places of the learnt tokens in `ids`. Raises UnsafeTemplate when a token reaches over a border."""
        if len(learnt) != len(self._spans):
            raise UnsafeTemplate("the processor changes what an assistant says")
        found = []
        for part, (start, stop) in zip(learnt, self._spans, strict=True):
            first, last = start - len(part.before), stop + len(part.after)
            if self._text[first:start] != part.before or self._text[stop:last] != part.after:
                raise UnsafeTemplate("the processor changes the text around an assistant's turn")
            found.append((self._num_tokens(first, ids), self._num_tokens(last, ids)))
        return found

    def _num_tokens(self, place: int, ids: Sequence[int]) -> int:
        """Return the number of tokens before a place in the text."""
        options = {"add_special_tokens": self._adds_special_tokens}
        before: list[int] = self._tokenizer(self._text[:place], **options)["input_ids"]
        if list(ids[: len(before)]) != before:
            raise UnsafeTemplate("a token reaches over the border of an assistant's turn")
        return len(before)


def _marked(conversation: Conversation) -> Conversation:
    """Enclose the text of each assistant's turn in marks, its outer white space aside, which a template may trim."""
    return Conversation(
        tuple(_marked_turn(turn) if turn.role is Role.ASSISTANT else turn for turn in conversation.turns)
    )


def _marked_turn(turn: ChatTurn) -> ChatTurn:
    texts = [str(part) for part in turn.parts]
    filled = [number for number, text in enumerate(texts) if text.strip()]
    if not filled:
        raise InvalidRequest("an assistant's turn has no text")
    first, last = filled[0], filled[-1]
    texts[first] = _lead(texts[first]) + START + texts[first].lstrip()
    texts[last] = texts[last].rstrip() + END + texts[last][len(texts[last].rstrip()) :]
    return replace(turn, parts=tuple(texts))


def _lead(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _unmarked(text: str) -> str:
    return text.replace(START, "").replace(END, "")


def _spans(marked: str) -> list[tuple[int, int]]:
    """Return where the marked texts lie in the text without marks. Raises UnsafeTemplate for marks that do not pair."""
    starts = [place for place, letter in enumerate(marked) if letter == START]
    ends = [place for place, letter in enumerate(marked) if letter == END]
    if len(starts) != len(ends):
        raise UnsafeTemplate("the chat template shows an assistant's turn in part")
    pairs = list(zip(starts, ends, strict=True))
    if any(end < start for start, end in pairs) or any(after[0] < before[1] for before, after in pairwise(pairs)):
        raise UnsafeTemplate("the chat template shows the assistant's turns in another order")
    return [(start - 2 * number, end - 2 * number - 1) for number, (start, end) in enumerate(pairs)]
