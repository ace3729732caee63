"""Chooses attention code for a device by trying what is there: right answers first, then the least time.

On a CPU it is SDPA. On CUDA decode steps have flash-attn's paged kernel and our own in Triton to choose from, prefill
chunks flash-attn's and torch's variable-length kernels. What is not installed, refuses or differs from SDPA is out;
SDPA itself serves where nothing else does. The trials are small problems whose answers are SDPA's; their blocks lie
backwards in memory, so code that ignored the block table would be found out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Final

import torch
from torch import Tensor

from worker.engine.attention.kernels import SDPA, Kernels, flash_attn, flash_decode, flash_prefill, torch_prefill
from worker.engine.attention.paged import Call, DecodeRows, FlatStep, PrefillSeq
from worker.engine.kv_cache.blocks import LayerShape, PagedKV

#: How far answers may lie from SDPA's, of numbers around 1.
TOLERANCE: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: Rows of the decode step and tokens that the longest sees; tokens of the prefill chunks and of what they end.
_NUM_ROWS: Final = 16
_NUM_ENTRIES: Final = 1024
_CHUNKS: Final = ((96, 96), (160, 704))
_WINDOW: Final = 80

logger = logging.getLogger(__name__)

#: flash-attn 2 takes paged keys in blocks of multiples of this (its README, "flash_attn_with_kvcache").
FLASH_BLOCK_SIZE: Final = 256
#: Runs that are timed.
_NUM_RUNS: Final = 20


@dataclass(frozen=True, slots=True)
class Trial:
    """One attention call with an answer that is known. `attend` runs it with the kernels given."""

    attend: Callable[[Kernels], Tensor]
    expected: Tensor
    tolerance: float

    def is_passed(self, kernels: Kernels) -> bool:
        """Whether the kernels give the expected answer. Raises what they raise."""
        error = (self.attend(kernels) - self.expected).abs().max()
        return bool(error <= self.tolerance)


def decode_trials(shape: LayerShape, num_heads: int, block_size: int) -> list[Trial]:
    """Return trials of decode rows of many lengths, without and with a window."""
    width = -(-_NUM_ENTRIES // block_size)
    kv, draw = _filled(shape, _NUM_ROWS * width + 1, block_size)
    table = torch.arange(_NUM_ROWS * width, 0, -1, device=shape.device).view(_NUM_ROWS, width)
    lengths = torch.linspace(1, _NUM_ENTRIES, _NUM_ROWS).long().to(shape.device)
    rows = DecodeRows(table.int(), lengths.int())
    newest = (lengths - 1)[:, None]
    slot_mapping = (table.gather(1, newest // block_size) * block_size + newest % block_size)[:, 0]
    return _trials(
        kv, shape, draw(_NUM_ROWS, num_heads, shape.key_dim), lambda k: FlatStep(kv, slot_mapping, rows, kernels=k)
    )


def prefill_trials(shape: LayerShape, num_heads: int, block_size: int) -> list[Trial]:
    """Return trials of prefill chunks of two prompts, one from its beginning, one that goes on."""
    widths = [-(-context_len // block_size) for _, context_len in _CHUNKS]
    kv, draw = _filled(shape, sum(widths) + 1, block_size)
    blocks = torch.arange(sum(widths), 0, -1, device=shape.device).split_with_sizes(widths)
    prefill_seqs = [
        PrefillSeq(count, context_len, each) for (count, context_len), each in zip(_CHUNKS, blocks, strict=True)
    ]
    slot_mapping = torch.cat([_last_slot_mapping(seq, block_size) for seq in prefill_seqs])
    query = draw(sum(count for count, _ in _CHUNKS), num_heads, shape.key_dim)
    return _trials(kv, shape, query, lambda k: FlatStep(kv, slot_mapping, prefill_seqs=prefill_seqs, kernels=k))


def _trials(kv: PagedKV, shape: LayerShape, query: Tensor, step: Callable[[Kernels], FlatStep]) -> list[Trial]:
    """Let steps attend with and without a window; the newest keys and values are written first, as always."""
    flat = (query.shape[0], shape.num_heads)
    generator = torch.Generator().manual_seed(1)
    key, value = (
        torch.randn(*flat, dim, generator=generator).to(shape.device, shape.dtype).transpose(0, 1)[None]
        for dim in (shape.key_dim, shape.value_dim)
    )

    def attend(kernels: Kernels, window: int | None) -> Tensor:
        call = Call(torch.nn.Identity(), None, None, window)
        return step(kernels).attend(0, query.transpose(0, 1)[None], key, value, call).float()

    return [
        Trial(lambda kernels, w=window: attend(kernels, w), attend(SDPA, window), TOLERANCE[shape.dtype])  # type: ignore[misc]
        for window in (None, _WINDOW)
    ]


def _filled(shape: LayerShape, num_blocks: int, block_size: int) -> tuple[PagedKV, Callable[..., Tensor]]:
    """Return one layer of noise and what draws more of it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(shape.device, shape.dtype)

    kv = PagedKV({0: shape}, num_blocks, block_size)
    num_slots = num_blocks * block_size
    slot_mapping = torch.arange(num_slots, device=shape.device)
    kv.write(
        0,
        draw(num_slots, shape.num_heads, shape.key_dim),
        draw(num_slots, shape.num_heads, shape.value_dim),
        slot_mapping,
    )
    return kv, draw


def _last_slot_mapping(seq: PrefillSeq, block_size: int) -> Tensor:
    entries = torch.arange(seq.context_len - seq.num_tokens, seq.context_len, device=seq.blocks.device)
    return seq.blocks[entries // block_size] * block_size + entries % block_size


def choose_kernels(layout: Mapping[int, LayerShape], num_heads: int, block_size: int) -> Kernels:
    """Return the best attention code for layers of these shapes on their device; `num_heads` of queries."""
    shapes = set(layout.values())
    devices = {shape.device for shape in shapes}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        # Layers on several GPUs: a kernel is launched on the current one.
        return SDPA
    sample = max(shapes, key=lambda shape: shape.num_bytes)
    decode = best("decode", decode_candidates(block_size), decode_trials(sample, num_heads, block_size), device_seconds)
    prefill = best("prefill", prefill_candidates(), prefill_trials(sample, num_heads, block_size), device_seconds)
    return Kernels(decode.decode, prefill.prefill)


def decode_candidates(block_size: int) -> Mapping[str, Kernels]:
    """Return what is installed for decode steps."""
    candidates = {}
    if find_spec("triton") is not None:
        candidates["triton"] = Kernels(decode=import_module("worker.engine.attention.triton").triton_decode)
    flash = flash_attn()
    if flash is not None and block_size % FLASH_BLOCK_SIZE == 0:
        candidates["flash-attn"] = Kernels(decode=flash_decode(flash))
    return candidates


def prefill_candidates() -> Mapping[str, Kernels]:
    """Return what is installed for prefill chunks."""
    candidates = {"torch-varlen": Kernels(prefill=torch_prefill)}
    flash = flash_attn()
    if flash is not None:
        candidates["flash-attn"] = Kernels(prefill=flash_prefill(flash))
    return candidates


def best(
    what: str,
    candidates: Mapping[str, Kernels],
    trials: Sequence[Trial],
    seconds: Callable[[Callable[[], object]], float],
) -> Kernels:
    """Return the candidate that passes all trials and needs least `seconds` for the first, SDPA when none passes."""
    times: dict[str, float] = {}
    fates: list[str] = []
    for name, kernels in candidates.items():
        try:
            if all(trial.is_passed(kernels) for trial in trials):
                times[name] = seconds(partial(trials[0].attend, kernels))
                fates.append(f"{name}: {times[name] * 1e6:.0f} us")
            else:
                fates.append(f"{name}: differs")
        except torch.AcceleratorError:
            # The device is lost; whoever starts the engine must know.
            raise
        except Exception as error:
            logger.warning(
                "attention kernel refused", extra={"action": "engine.kernels", "kernel": name}, exc_info=True
            )
            fates.append(f"{name}: {type(error).__name__}")
    chosen = min(times, key=lambda name: times[name], default=None)
    facts = {"action": "engine.kernels", "step": what, "kernel": chosen or "sdpa", "tried": ", ".join(fates)}
    logger.info("attention kernel chosen", extra=facts)
    return candidates[chosen] if chosen else SDPA


def device_seconds(run: Callable[[], object]) -> float:
    """Return what a run takes on the CUDA device, the mean of some after a first."""
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(_NUM_RUNS):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / _NUM_RUNS
