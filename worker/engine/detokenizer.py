"""Turns a request's tokens into text as they come, in time proportional to their number.

Tokens go through three stages: `TextStream` (tokens → whole characters), stripping of leading white space, and
`StopStrings` (holds back what may become a stop string). All text that came out, joined, equals
`tokenizer.decode(ids, skip_special_tokens=True)` without its leading white space, cut at the first stop string.

A checkpoint's stop strings are looked for as `generate` does: white space and special tokens count, and the end of
the prompt may begin one. `StopStrings` comes before the stripping then, and sees the text of special tokens too.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

#: An unfinished UTF-8 character is at most three bytes long; more tokens than that are not one.
MAX_HELD_TOKENS = 4
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StopStrings:
    """Cuts a text at the first of some strings. Text that may still become one is held back.

    before: what came before the text; its end may begin a stop string, which then has all of the text before its end.
    """

    def __init__(self, stop: tuple[str, ...], before: str = "") -> None:
        self._stop = stop
        self._held = before[len(before) - max((_overlap(before, each) for each in stop), default=0) :]
        self._num_before = len(self._held)
        self.is_found = False

    def push(self, text: str) -> str:
        """Add text; return what is certain to come before any stop string."""
        if not self._stop:
            return text
        text = self._held + text
        # The one complete first wins, so that the cut does not depend on how tokens group characters.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_found = True
            self._held = ""
            _, at = min(found)
            return self._own(text[:at])
        certain = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[certain:]
        return self._own(text[:certain])

    def flush(self) -> str:
        """Return what was held back: no more text comes."""
        held, self._held = self._held, ""
        return self._own(held)

    def _own(self, text: str) -> str:
        """Return `text` without what of it came before."""
        num_foreign = min(self._num_before, len(text))
        self._num_before -= num_foreign
        return text[num_foreign:]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream(Protocol):
    """Makes text of tokens, whole characters only. What is left half at `flush` becomes U+FFFD, as in `decode`."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of a request.

    offset: code points before `text`. num_tokens: tokens that it stands for. is_stopped: a stop string was found.
    """

    text: str
    offset: int
    num_tokens: int
    is_stopped: bool


class Detokenizer:
    """Makes the text of one request. Give it every token in order; after `is_last` or `end` it takes no more.

    raw: `stream`, when `stops` is to see all of its text, before white space and special tokens are taken away.
    offset: code points returned so far.
    """

    def __init__(
        self, stream: TextStream, stops: StopStrings, *, keeps_leading_space: bool, raw: RawStream | None = None
    ) -> None:
        self._stream = stream
        self._stops = stops
        self._is_at_start = not keeps_leading_space
        self._raw = raw
        self.offset = 0
        self._num_held = 0

    def push(self, token_id: int, *, is_last: bool = False) -> TextDelta | None:
        """Add a token; return a delta when there is text to show, a stop string was found or the token is the last."""
        text = self._stream.push(token_id)
        return self._emit(text + self._stream.flush() if is_last else text, is_last=is_last)

    def end(self) -> TextDelta | None:
        """Add the model's end token, which has no text; return what was held back."""
        return self._emit(self._stream.flush(), is_last=True)

    def _emit(self, text: str, *, is_last: bool) -> TextDelta | None:
        self._num_held += 1
        text = self._stops.push(self._stripped(text) if self._raw is None else text)
        is_stopped = self._stops.is_found
        if is_last and not is_stopped:
            text += self._stops.flush()
        if self._raw is not None:
            text = self._stripped(self._raw.shown(text))
        if not (text or is_last or is_stopped):
            return None
        delta = TextDelta(text, self.offset, self._num_held, is_stopped)
        self.offset += len(text)
        self._num_held = 0
        return delta

    def _stripped(self, text: str) -> str:
        if self._is_at_start:
            text = text.lstrip()
            self._is_at_start = not text
        return text


class DetokenizerFactory:
    """Makes detokenizers for one tokenizer, sharing its tables. Engine thread only.

    checkpoint_stop: stop strings of requests that have none of their own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, checkpoint_stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._table = ByteTable(tokenizer) if ByteTable.fits(tokenizer) else None
        self._skipped = frozenset(tokenizer.all_special_ids)
        self._checkpoint_stop = checkpoint_stop
        added = tokenizer.added_tokens_decoder.items() if checkpoint_stop else ()
        self._specials = {token_id: str(token) for token_id, token in added if token.special}

    def make(
        self, stop: tuple[str, ...] | None, *, keeps_leading_space: bool, prompt_ids: Sequence[int] = ()
    ) -> Detokenizer:
        """Return a detokenizer of a new request; with `stop` None it stops where the checkpoint's stop strings end."""
        if stop is not None or not self._checkpoint_stop:
            return Detokenizer(self._stream(), StopStrings(stop or ()), keeps_leading_space=keeps_leading_space)
        raw = RawStream(self._stream(), self._stream(), self._specials)
        before = raw.read(prompt_ids[-max(map(len, self._checkpoint_stop)) :])
        stops = StopStrings(self._checkpoint_stop, before)
        return Detokenizer(raw, stops, keeps_leading_space=keeps_leading_space, raw=raw)

    def _stream(self) -> TextStream:
        return ByteStream(self._table) if self._table else WindowStream(self._tokenizer, self._skipped)


class RawStream:
    """Text of `stream` with that of special tokens in it, as it goes on from what was read.

    alone: another stream of the same kind. What it does not return of the first text, a space, is not to be shown.
    """

    def __init__(self, stream: TextStream, alone: TextStream, specials: Mapping[int, str]) -> None:
        self._stream = stream
        self._alone: TextStream | None = alone
        self._specials = specials
        self._runs: list[tuple[int, bool]] = []

    def read(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens that come before the first one that is pushed."""
        parts = [self._stream.push(token_id) + self._specials.get(token_id, "") for token_id in token_ids]
        return "".join(parts) + self._stream.flush()

    def push(self, token_id: int) -> str:
        text, special = self._stream.push(token_id), self._specials.get(token_id, "")
        num_hidden = 0
        if self._alone is not None:
            num_hidden = len(text) - len(self._alone.push(token_id))
            self._alone = None if text else self._alone
        self._runs += [(num_hidden, False), (len(text) - num_hidden, True), (len(special), False)]
        return text + special

    def flush(self) -> str:
        text = self._stream.flush()
        self._runs.append((len(text), True))
        return text

    def shown(self, text: str) -> str:
        """Return the next text that came out, without what is not to be shown."""
        parts, at = [], 0
        while at < len(text):
            length, is_shown = self._runs.pop(0)
            taken = min(length, len(text) - at)
            if taken < length:
                self._runs.insert(0, (length - taken, is_shown))
            parts.append(text[at : at + taken] if is_shown else "")
            at += taken
        return "".join(parts)


class ByteTable:
    """Bytes of each token of a byte-level BPE (GPT-2's alphabet), looked up once per token id."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._byte_of = {character: byte for byte, character in _byte_alphabet().items()}
        specials = self._backend.get_added_tokens_decoder().items()
        self._bytes: dict[int, bytes] = {token_id: b"" for token_id, token in specials if token.special}

    @staticmethod
    def fits(tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return whether the tokenizer's tokens are plain bytes, so that text is their concatenation."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return backend is not None and type(backend.decoder).__name__ == "ByteLevel"

    def __getitem__(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        is_plain = any(character not in self._byte_of for character in token)  # an added token
        return bytes(token, "utf-8") if is_plain else bytes(self._byte_of[character] for character in token)


class ByteStream:
    """Text of byte-level tokens: their bytes through an incremental UTF-8 decoder."""

    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._table[token_id])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """Text of any tokenizer: decodes a short window twice, with and without the new tokens.

    The window begins one step earlier, because tokenizers decode the first token of a text differently. Text that
    ends in U+FFFD may be half a character and waits, but not for more tokens than a character can have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._window: list[int] = []
        self._num_emitted = 0

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        is_full = len(self._window) - self._num_emitted >= MAX_HELD_TOKENS
        if text.endswith(REPLACEMENT) and not is_full:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._window)) if len(self._window) > self._num_emitted else ""

    def _advance(self, text: str) -> str:
        emitted = self._decode(self._window[: self._num_emitted])
        self._window = self._window[self._num_emitted :]
        self._num_emitted = len(self._window)
        return text[len(emitted) :]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def _byte_alphabet() -> dict[int, str]:
    """Return GPT-2's printable stand-in for each byte (Radford et al. 2019): itself, or the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
