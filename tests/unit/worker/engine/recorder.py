"""What a CUDA graph does, on a CPU: a step's operators are noted once and repeated on the very same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Results without contents: what was there stays.
EMPTY = {"aten::empty.memory_format", "aten::empty_strided", "aten::new_empty", "aten::empty_like"}
#: A graph cannot be recorded when a number is wanted on the host.
WAITING = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in WAITING, func.name()
        result = func(*args, **(kwargs or {}))
        if func.name() not in EMPTY:
            self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            _copy(func(*args, **kwargs), result)


def _copy(new: Any, old: Any) -> None:
    """Put new contents where the recording had them; views and results in place are there already."""
    if isinstance(old, Tensor):
        if old.numel() and new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
            old.copy_(new)
    elif isinstance(old, (list, tuple)):
        for each_new, each_old in zip(new, old, strict=True):
            _copy(each_new, each_old)


class TapeRecorder:
    """A `Recorder` of the graphs' tests. num_recorded, num_replayed: how often it was used."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_recorded += 1
        with _Tape() as tape:
            output = step()

        def replay() -> Tensor:
            self.num_replayed += 1
            # A replay that did nothing would be noticed.
            output.fill_(torch.nan)
            tape.replay()
            return output

        return replay
