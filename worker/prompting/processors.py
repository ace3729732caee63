"""The loaded processor, and a copy of it that encodes control tokens in users' text as ordinary text.

A mark (a noncharacter that Unicode reserves for a program's internal use) is put inside every literal control token
(`<image>`, `<end_of_utterance>`, …) of a user's text before rendering. So neither the processor's string replacements
nor the tokenizer's matching of added tokens finds it. The copy's tokenizer removes the mark after that matching, before
words are looked up in the vocabulary. Immutable; any thread.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from worker.models.capabilities import Capabilities

MARK = "\ufdd0"
#: Training targets; a forward that sees them computes a loss.
_NOT_FOR_INFERENCE = ("labels",)


class HasProcessor(Protocol):
    """A loaded model, or a processor without one."""

    @property
    def processor(self) -> ProcessorMixin: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def capabilities(self) -> Capabilities: ...


class Processors:
    """`plain` is the loaded processor, `marked` a copy whose tokenizer removes marks."""

    def __init__(self, loaded: HasProcessor) -> None:
        self.plain: ProcessorMixin = loaded.processor
        self.marked: ProcessorMixin = copy.copy(loaded.processor)
        self.marked.tokenizer = literal_tokenizer(loaded.tokenizer)
        self.control = ControlTokens(loaded.tokenizer, _placeholders(loaded))
        for processor in (self.plain, self.marked):
            # The first call sets the tokenizer's truncation and padding, which must not happen while other threads use
            # it.
            processor.tokenizer("", return_tensors=None)

    def control_ids(self, tensors: Mapping[str, Tensor]) -> Counter[int]:
        """Count the control tokens in a prompt's ids."""
        return Counter(token for token in tensors["input_ids"][0].tolist() if token in self.control.ids)


def _placeholders(loaded: HasProcessor) -> set[str]:
    tokens = [getattr(loaded.processor, name, None) for name in ("image_token", "video_token")]
    return {str(token) for token in (*tokens, loaded.capabilities.video_token) if token}


def tensors_of(encoded: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a processor's output that the model's forward takes."""
    return {
        name: value for name, value in encoded.items() if isinstance(value, Tensor) and name not in _NOT_FOR_INFERENCE
    }


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors, those of floating point in `dtype`."""
    return {name: value.to(dtype) if torch.is_floating_point(value) else value for name, value in tensors.items()}


class ControlTokens:
    """Finds a tokenizer's added tokens in text.

    `placeholders` are words that a processor replaces by media, whether or not the tokenizer has a token for them.
    Added tokens of white space or of a single character do not count (Gemma adds line breaks). Immutable; any thread.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, placeholders: Iterable[str] = ()) -> None:
        added = [token for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1]
        words = set(placeholders) - {token.content for token in added}
        ids = {tokenizer.convert_tokens_to_ids(token.content) for token in added}
        #: Without the unknown token, to which any rare word may be encoded.
        self.ids = frozenset(ids - {tokenizer.unk_token_id})
        replaced = [AddedToken(word, normalized=False) for word in sorted(words)]
        self._pattern = _any_of([*added, *replaced], lambda content: content)
        self._start = re.compile(f"(?=(?:{self._pattern.pattern}))(.)", re.DOTALL)
        self._normalizer = getattr(tokenizer.backend_tokenizer, "normalizer", None)
        self._normalized = _any_of((token for token in added if token.normalized), self._normalize)

    def occur_in(self, text: str) -> bool:
        """Whether the tokenizer would find a control token in `text`, also in another spelling (case, width)."""
        if self._pattern.search(text):
            return True
        return self._normalizer is not None and self._normalized.search(self._normalize(text)) is not None

    def count_in(self, prompt: str) -> Counter[str]:
        """Return how often each control token occurs in a prompt, in any spelling."""
        counts = Counter(match.group() for match in self._pattern.finditer(prompt))
        if self._normalizer is not None:
            found = self._normalized.finditer(self._normalize(prompt))
            counts.update(f"normalized {match.group()}" for match in found)
        return counts

    def mark(self, text: str) -> str:
        """Return `text` with a mark after the first character of every literal, overlapping ones included."""
        return self._start.sub(rf"\g<1>{MARK}", text)

    def _normalize(self, text: str) -> str:
        return str(self._normalizer.normalize_str(text)) if self._normalizer is not None else text


def literal_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy that removes marks after added tokens are matched and before words are looked up.

    The copy matches added tokens in their exact spelling only, so that a normalised spelling in users' text never does.
    """
    clone = copy.deepcopy(tokenizer)
    backend: Tokenizer = clone.backend_tokenizer
    for token in clone.added_tokens_decoder.values():
        if token.normalized and len(token.content.strip()) > 1:
            _match_exactly(backend, token)
    drop = pre_tokenizers.Split(_mark_as_pretokenized(backend), "removed")
    before = backend.pre_tokenizer
    backend.pre_tokenizer = drop if before is None else pre_tokenizers.Sequence([before, drop])
    return clone


def _match_exactly(backend: Tokenizer, token: AddedToken) -> None:
    exact = AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=token.special,
    )
    (backend.add_special_tokens if token.special else backend.add_tokens)([exact])


def _mark_as_pretokenized(backend: Tokenizer) -> str:
    """Return the mark in the pre-tokenizer's output: byte-level ones map every byte to a character."""
    if backend.pre_tokenizer is None:
        return MARK
    parts = backend.pre_tokenizer.pre_tokenize_str(f"a{MARK}a")
    return "".join(part for part, _ in parts).strip("aĠ▁") or MARK


def _any_of(tokens: Iterable[AddedToken], spelling: Callable[[str], str]) -> re.Pattern[str]:
    """Return a pattern of all tokens that prefers longer ones, as the tokenizer's own matching does.

    Shared beginnings are factored out: thousands of tokens such as `<unused42>` must not make `<<<<<<` slow to search.
    """
    spelled = [(spelling(token.content), token.single_word) for token in tokens]
    anywhere = {text for text, is_single_word in spelled if text and not is_single_word}
    alone = {text for text, is_single_word in spelled if text and is_single_word}
    alternatives = [_factored(anywhere)] if anywhere else []
    if alone:
        alternatives.append(rf"(?<!\w){_factored(alone)}(?!\w)")
    return re.compile("|".join(alternatives) or r"(?!)")


def _factored(words: set[str]) -> str:
    """Return a regular expression for `words` whose branches differ in their first character."""
    endings: dict[str, set[str]] = {}
    for word in words:
        if word:
            endings.setdefault(word[0], set()).add(word[1:])
    branches = [re.escape(first) + _factored(rest) for first, rest in sorted(endings.items())]
    if "" in words:
        return f"(?:{'|'.join(branches)})?" if branches else ""
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
