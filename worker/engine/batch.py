"""What one step feeds to the model and what comes back: the words that scheduler, core and runners share.

Also snapshots of what the engine's caches have spared so far; any thread may take and keep them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from worker.engine.pictures import Picture
from worker.engine.request import GenerationRequest, Request


@dataclass(frozen=True, slots=True)
class VisionStats:
    """Counts since boot of the vision-embedding cache and the tower behind it, and what is held now.

    hits, misses: pictures asked for; a hit is one that the tower did not have to see again.
    num_entries, num_bytes: pictures kept and the memory their features take.
    num_encoded, num_tower_calls: pictures that the tower saw, and in how many calls.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    num_entries: int = 0
    num_bytes: int = 0
    num_encoded: int = 0
    num_tower_calls: int = 0


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """Prompt tokens looked up among those that earlier prompts left, and those that were there, since boot."""

    num_queried_tokens: int = 0
    num_reused_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` tokens of a request, from `request.num_cached_tokens` on."""

    request: Request
    num_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """One token each of B requests; a padding row has nothing cached and a table of null blocks.

    ids, positions: of the newest tokens, [B]. num_cached: entries cached before them, [B]. block_table: [B, W].
    slots: of the adapters that the rows belong to, [B]; None: all rows are the base's.
    """

    ids: Tensor
    positions: Tensor
    num_cached: Tensor
    block_table: Tensor
    slots: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """The next tokens of one prompt. embeds: [n, hidden]; positions: [n] or [axes, n]; slot_mapping: [n].

    blocks, context_len: see `PrefillSeq`. slot: of the prompt's adapter.

    is_last: the prompt ends here, so the logits of the last token are wanted.
    """

    embeds: Tensor
    positions: Tensor
    slot_mapping: Tensor
    blocks: Tensor
    context_len: int
    is_last: bool
    slot: int = 0


class DecodeForward(Protocol):
    """Runs a decode step: a forward of the model, or a recorded one."""

    def decode(self, inputs: DecodeInputs) -> Tensor:
        """Return logits [B, V]."""


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a step made.

    requests, logits: those that get a token now and the logits [B, V] for it, in the same order; None without any.
    failed: requests whose own prompt could not be read, and why.
    """

    requests: Sequence[Request] = ()
    logits: Tensor | None = None
    failed: Sequence[tuple[Request, Exception]] = field(default_factory=list)


class Runner(Protocol):
    """Runs the model and keeps the keys and values: all that the rest of the engine knows of a KV back end.

    Engine thread only, under `torch.inference_mode`; the snapshots may be taken from any thread.

    kv_backend: "slots" or "paged".
    why_not_paged: why it is slots although paged was asked for.
    can_resume: a request that was released may be opened again and go on where it was.
    can_run_ahead: a step may feed tokens that the host does not know yet.
    """

    kv_backend: str
    why_not_paged: str | None
    can_resume: bool
    can_run_ahead: bool

    def kv_usage(self) -> float:
        """Return the share of KV space that requests hold, 0…1."""

    def prefix_stats(self) -> PrefixStats:
        """Return what earlier prompts that began alike have spared so far."""

    def vision_stats(self) -> VisionStats:
        """Return what the vision-embedding cache has spared so far."""

    def cut(self, generation: GenerationRequest) -> tuple[Picture, ...]:
        """Return the pictures of a prompt. Any thread, better another: it reads every pixel.

        Raises InvalidRequest for an adapter that is not served.
        """

    def look_ahead(self, requests: Sequence[Request]) -> None:
        """Bring pictures of requests that may start soon through the vision tower, so many as a step may.

        `requests` are waiting ones, the next first. A request that is not opened is to be released.
        """

    def can_allocate(self, num_tokens: int, num_running: int) -> bool:
        """Whether a request of `num_tokens` tokens may be opened beside `num_running` that grow."""

    def allocate(self, request: Request) -> None:
        """Take a waiting request in: room for what it has, its `num_prompt_cached` and `is_chunkable`.

        Raises NoRoom, PromptTooLong, and whatever the model raises for images it cannot read.
        """

    def append(self, request: Request) -> bool:
        """Make room for the request's newest token; False when there is none."""

    def run(self, chunks: Sequence[Chunk]) -> StepLogits:
        """Feed the chunks and count them in `num_cached_tokens`.

        Raises what the model raises for the whole batch. If nothing was counted then, it may be called again, also
        with fewer chunks.
        """

    def remember(self, requests: Sequence[Request], tokens: Tensor) -> None:
        """Keep the newest tokens [B], which are pending, for the next `run`."""

    def free(self, request: Request) -> None:
        """Give up what the request holds, if anything."""

    def reset(self) -> None:
        """Start over after a failed step; every request that took part in it has been released."""

    def free_memory(self) -> None:
        """Give back what was taken beside keys and values and is not in use."""


class NoRoom(Exception):
    """Raised when a request has to wait for others to end."""
