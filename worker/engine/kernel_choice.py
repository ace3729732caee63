"""Chooses attention code for a device by trying what is there: right answers first, then the least time.

On a CPU it is SDPA. On CUDA decode steps have flash-attn's paged kernel and our own in Triton to choose from, pieces of
prompts flash-attn's and torch's variable-length kernels. What is not installed, refuses or differs from SDPA is out;
SDPA itself serves where nothing else does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Final

import torch

from worker.engine.flash import flash_attn, flash_decode, flash_pieces, torch_pieces
from worker.engine.kernel_trials import Trial, decode_trials, piece_trials
from worker.engine.kernels import SDPA, Kernels
from worker.engine.kv_paged import LayerShape

logger = logging.getLogger(__name__)

#: flash-attn 2 takes paged keys in blocks of multiples of this (its README, "flash_attn_with_kvcache").
FLASH_BLOCK_SIZE: Final = 256
#: Runs that are timed.
_NUM_RUNS: Final = 20


def choose_kernels(layout: Mapping[int, LayerShape], num_heads: int, block_size: int) -> Kernels:
    """Return the best attention code for layers of these shapes on their device; `num_heads` of queries."""
    shapes = set(layout.values())
    devices = {shape.device for shape in shapes}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        # Layers on several GPUs: a kernel is launched on the current one.
        return SDPA
    sample = max(shapes, key=lambda shape: shape.num_bytes)
    decode = best("decode", decode_candidates(block_size), decode_trials(sample, num_heads, block_size), device_seconds)
    pieces = best("pieces", piece_candidates(), piece_trials(sample, num_heads, block_size), device_seconds)
    return Kernels(decode.decode, pieces.pieces)


def decode_candidates(block_size: int) -> Mapping[str, Kernels]:
    """Return what is installed for decode steps."""
    candidates = {}
    if find_spec("triton") is not None:
        candidates["triton"] = Kernels(decode=import_module("worker.engine.triton_decode").triton_decode)
    flash = flash_attn()
    if flash is not None and block_size % FLASH_BLOCK_SIZE == 0:
        candidates["flash-attn"] = Kernels(decode=flash_decode(flash))
    return candidates


def piece_candidates() -> Mapping[str, Kernels]:
    """Return what is installed for pieces of prompts."""
    candidates = {"torch-varlen": Kernels(pieces=torch_pieces)}
    flash = flash_attn()
    if flash is not None:
        candidates["flash-attn"] = Kernels(pieces=flash_pieces(flash))
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
