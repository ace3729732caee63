"""The bounds of an engine: what it is given at its making and never changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from worker.models.generation_defaults import GenerationDefaults
from worker.models.inputs import LoadedAdapter

MEBIBYTE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_num_seqs: requests that run together. max_num_batched_tokens: tokens fed in one step, prompts and decodes
    together; only a prompt that cannot be read in chunks may exceed it, and is then the only prompt of its step.

    Raises ValueError when the decodes alone would use the budget up.
    """

    max_num_seqs: int
    max_num_batched_tokens: int

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens of {self.max_num_batched_tokens} leaves nothing for prompts beside "
                f"max_num_seqs of {self.max_num_seqs}"
            )


@dataclass(frozen=True, slots=True)
class PagedConfig:
    """Sizes of a paged back end.

    block_size: tokens of a block. num_blocks: 0 takes what `max_num_seqs` full requests need, on a GPU at most
    `memory_fraction` of the memory that is free. reads_whole, reuses_prefixes: see `PagedRunner`.
    tries_kernels: look for better attention code than SDPA.
    records: replay recorded decode steps on a GPU; None does where attention has a kernel, which reads no more than it
        must.
    """

    block_size: int = 16
    num_blocks: int = 0
    memory_fraction: float = 0.9
    reads_whole: bool = False
    reuses_prefixes: bool = True
    tries_kernels: bool = True
    records: bool | None = None


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Bounds of the vision stage.

    cache_bytes: features kept between requests.
    max_pictures: pictures that the tower sees in one step, however many wait, so that decodes go on between them.
    """

    cache_bytes: int = 256 * MEBIBYTE
    max_pictures: int = 8


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Bounds of one engine.

    max_num_seqs: requests that decode together.
    max_model_len: tokens of prompt and answer together; the length of a KV row.
    max_num_batched_tokens: tokens fed in one step, see `SchedulerLimits`.
    paged: sizes of a paged KV back end; None, or a model that is not suited, takes rows.
    runs_ahead: see `EngineCore`; None does on a GPU, which would wait for Python otherwise.
    vision: bounds of the vision tower and of what is kept of it; None takes the defaults.
    generation: parameters that a request leaves open; None reads it from the model's generation config.
    adapters: LoRA adapters that requests may name. checkpoint: digest of the base's weights, for keys of caches.
    """

    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int = 512
    paged: PagedConfig | None = None
    runs_ahead: bool | None = None
    vision: VisionConfig | None = None
    generation: GenerationDefaults | None = None
    adapters: Sequence[LoadedAdapter] = ()
    checkpoint: str = ""
