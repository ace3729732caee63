"""Decode steps recorded once per batch size and replayed, so that a step costs one launch and no Python.

A recorded step reads its inputs from memory that stays where it is: rows are copied there, the rest is filled with
padding rows, which write to the null block. What records is handed in; on a GPU it is `CudaGraphRecorder`.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from worker.engine.batch import DecodeInputs
from worker.engine.kv_cache.blocks import NULL_BLOCK
from worker.engine.runner.paged import FlatForward

logger = logging.getLogger(__name__)

#: Runs before a recording: kernels are compiled and libraries take their workspaces in them.
_NUM_WARM_UPS = 2


class Recorder(Protocol):
    """Turns a step into one that can be repeated."""

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return what repeats `step` on the memory it used, and returns the same tensor with new contents."""


class CudaGraphRecorder:
    """Records CUDA graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run the step on a side stream until it is warm, then capture it."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_NUM_WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile. A recording that fails leaves its stream current: the outer block
        # takes care of that.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            output = step()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes to record, ascending: few enough to record at boot, padding at most doubles a step."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1025, 64)]
    return [*(size for size in steps if size < max_num_seqs), max_num_seqs]


class DecodeGraphs:
    """Decode steps of one `FlatForward`, recorded for some batch sizes. Engine thread only.

    sizes: ascending; larger batches run as they are. table_width: blocks of the longest request. Blocks of keys and
    values must be where they will stay.
    """

    def __init__(
        self, forward: FlatForward, sizes: Sequence[int], table_width: int, device: torch.device, recorder: Recorder
    ) -> None:
        self._forward = forward
        self._sizes = list(sizes)
        self._recorder = recorder
        # Ids, positions, cached entries and slots of `DecodeInputs`.
        self._numbers = torch.zeros(4, self._sizes[-1], dtype=torch.long, device=device)
        self._table = torch.full((self._sizes[-1], table_width), NULL_BLOCK, dtype=torch.long, device=device)
        #: By the number of rows and whether adapters take part.
        self._steps: dict[tuple[int, bool], Callable[[], Tensor]] = {}
        self._num_axes = 0

    def record(self) -> None:
        """Record every size, the largest first: the smaller ones fit into the memory it needed.

        Where there are adapters, each is recorded with and without them.
        """
        started_at = time.monotonic()
        self._numbers.zero_()
        self._table.fill_(NULL_BLOCK)
        self._steps.clear()
        self._num_axes = self._forward.num_axes
        kinds = (True, False) if self._forward.adapters is not None else (False,)
        logits = self._forward.decode(self._inputs(self._sizes[-1], has_adapters=kinds[0])).clone()
        for size in reversed(self._sizes):
            for has_adapters in kinds:
                step = self._step(size, logits[:size], has_adapters=has_adapters)
                self._steps[size, has_adapters] = self._recorder(step)
        facts = {"action": "engine.record", "num_graphs": len(self._steps), "record_s": time.monotonic() - started_at}
        logger.info("decode steps recorded", extra=facts)

    def decode(self, inputs: DecodeInputs) -> Tensor:
        """Return logits [B, V], valid until the next call. Nothing waits for the device but a first recording."""
        num_rows = inputs.ids.shape[0]
        at = bisect.bisect_left(self._sizes, num_rows)
        if at == len(self._sizes):
            return self._forward.decode(inputs)
        if self._num_axes != self._forward.num_axes:
            # A recorded step keeps the number of axes that its positions had.
            self._record_again()
        size = self._sizes[at]
        step = self._steps.get((size, inputs.slots is not None))
        if step is None:
            return self._forward.decode(inputs)
        self._load(inputs, size)
        return step()[:num_rows]

    def _record_again(self) -> None:
        """Record while requests run; they do not depend on it."""
        try:
            self.record()
        except RuntimeError:
            # What was recorded before it is good. If the device is lost, the next step raises.
            logger.warning("decode steps cannot be recorded", extra={"action": "engine.record"}, exc_info=True)

    def _step(self, size: int, logits: Tensor, *, has_adapters: bool) -> Callable[[], Tensor]:
        """Return the step of that many rows. All sizes write to the same `logits`, which can be large."""
        inputs = self._inputs(size, has_adapters=has_adapters)
        return lambda: logits.copy_(self._forward.decode(inputs))

    def _inputs(self, size: int, *, has_adapters: bool) -> DecodeInputs:
        ids, positions, num_cached, slots = self._numbers[:, :size]
        return DecodeInputs(ids, positions, num_cached, self._table[:size], slots if has_adapters else None)

    def _load(self, inputs: DecodeInputs, size: int) -> None:
        """Copy the rows in; make the rest padding, and what is left of the table null blocks."""
        num_rows, width = inputs.block_table.shape
        for row, given in zip(
            self._numbers, (inputs.ids, inputs.positions, inputs.num_cached, inputs.slots), strict=True
        ):
            if given is not None:
                row[:num_rows] = given
        self._numbers[:, num_rows:size] = 0
        self._table[:num_rows, :width] = inputs.block_table
        self._table[:num_rows, width:] = NULL_BLOCK
        self._table[num_rows:size] = NULL_BLOCK
