"""Conversations as token ids with labels on the answers: the processor's output, without running the processor.

Training draws thousands of conversations a minute, so template and tokenizer are bypassed: pieces are tokenised once
and joined. A test holds the result equal to `apply_chat_template` and the processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor

from worker.demo_model.learning.conversations import Conversation, Turn
from worker.demo_model.learning.tokenizer import IMAGE_SEPARATOR, IMAGE_TOKEN
from worker.demo_model.scenes import Scene

IGNORED = -100  # the label that torch's cross entropy skips


@dataclass(frozen=True, slots=True)
class Answer:
    """Where one answer's tokens lie in its row, end of turn included."""

    kind: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right: `ids` and `labels` `[b, t]`, all scenes in row order, and each row's answers."""

    ids: Tensor
    labels: Tensor
    scenes: tuple[Scene, ...]
    answers: tuple[tuple[Answer, ...], ...]


class ChatEncoder:
    """Encodes conversations for one processor."""

    def __init__(self, processor: Any) -> None:
        tokenizer = processor.tokenizer
        separator, image = tokenizer.convert_tokens_to_ids([IMAGE_SEPARATOR, IMAGE_TOKEN])
        self.image_id: int = image
        self._end: int = tokenizer.eos_token_id
        self._pad: int = tokenizer.pad_token_id
        self._separator: int = separator
        self._image: list[int] = [separator] + [image] * processor.image_seq_len
        self._tokens = cache(lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids))

    def encode(
        self, conversation: Conversation, *, is_text_first: bool = False
    ) -> tuple[list[int], tuple[Answer, ...]]:
        """Token ids of a whole conversation and where its answers are."""
        ids: list[int] = []
        answers: list[Answer] = []
        for i, turn in enumerate(conversation):
            ids += self._tokens("\nUser:" if i else "User:")
            ids += self._content(turn, is_text_first)
            ids += [self._end, *self._tokens("\nAssistant:")]
            start = len(ids)
            ids += [*self._tokens(f" {turn.question.answer}"), self._end]
            answers.append(Answer(turn.question.kind, start, len(ids)))
        return ids, tuple(answers)

    def batch(self, conversations: Sequence[Conversation], rng: Random | None = None) -> Batch:
        """Rows of a batch; with `rng`, every seventh or so puts the text before the images."""
        rows = [self.encode(c, is_text_first=rng is not None and rng.random() < 0.15) for c in conversations]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), length), self._pad)
        labels = torch.full((len(rows), length), IGNORED)
        for i, (row, answers) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            for answer in answers:
                labels[i, answer.start : answer.stop] = ids[i, answer.start : answer.stop]
        scenes = tuple(scene for c in conversations for turn in c for scene in turn.scenes)
        return Batch(ids, labels, scenes, tuple(answers for _, answers in rows))

    def _content(self, turn: Turn, is_text_first: bool) -> list[int]:
        text = list(self._tokens(f" {turn.question.text}"))
        images = self._image * len(turn.scenes) + ([self._separator] if turn.scenes else [])
        return text + images if is_text_first else images + text
