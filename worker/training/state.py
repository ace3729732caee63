"""The state of a run beside its weights, as safetensors and JSON: optimizer, scheduler, place in the run, history.

There is no state of random generators: every random choice is a function of the seed and the step (`sampler`). Nothing
is pickled, so a checkpoint holds no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from api_stub.contract.wire import ReadModel
from worker.training.progress import TrainingRefused

_OPTIMIZER_TENSORS: Final = "optimizer.safetensors"
_OPTIMIZER: Final = "optimizer.json"
_SCHEDULER: Final = "scheduler.json"
RUN: Final = "run.json"


class Entry(ReadModel):
    """What one step, or the evaluation after it, has measured; a curve's point."""

    step: int
    values: Mapping[str, float]


class Best(ReadModel):
    """The best evaluation: after which step, the value by which it is the best, and all its figures."""

    step: int
    value: float
    metrics: Mapping[str, float]


class RunState(ReadModel):
    """Where a run is. `needs_evaluation`: the evaluation that is due at this step has not been made."""

    step: int = 0
    best: Best | None = None
    needs_evaluation: bool = False
    metrics: Mapping[str, float] = Field(default_factory=dict)
    history: tuple[Entry, ...] = ()


def save_state(folder: Path, optimizer: Optimizer, scheduler: LRScheduler, run: RunState) -> None:
    """Write the state into a folder, which must exist."""
    tensors, plain = _split(optimizer.state_dict())
    save_file(tensors, folder / _OPTIMIZER_TENSORS)
    _write(folder / _OPTIMIZER, plain)
    _write(folder / _SCHEDULER, scheduler.state_dict())
    (folder / RUN).write_text(run.to_json(), encoding="utf-8")


def load_run(folder: Path) -> RunState:
    """Read where the run is. Raises TrainingRefused."""
    try:
        return RunState.model_validate_json((folder / RUN).read_bytes())
    except (OSError, ValidationError) as error:
        raise TrainingRefused(f"{folder / RUN}: not the state of a training run") from error


def load_state(folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Put the state of a folder into optimizer and scheduler, made for the same plan. Raises TrainingRefused."""
    try:
        tensors = load_file(folder / _OPTIMIZER_TENSORS)
        plain = json.loads((folder / _OPTIMIZER).read_text(encoding="utf-8"))
        of_scheduler = json.loads((folder / _SCHEDULER).read_text(encoding="utf-8"))
        optimizer.load_state_dict(_joined(tensors, plain))
        scheduler.load_state_dict(of_scheduler)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TrainingRefused(f"{folder}: the optimizer's state does not belong to this run") from error


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate the tensors, named `parameter.slot`, from the numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, slots in state["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{slot}"] = value.detach().contiguous()
            else:
                numbers.setdefault(str(parameter), {})[slot] = value
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def _joined(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `_split`. JSON has no tuples, and AdamW wants its `betas` as one."""
    slots: dict[int, dict[str, Any]] = {int(parameter): dict(own) for parameter, own in plain["numbers"].items()}
    for name, tensor in tensors.items():
        parameter, _, slot = name.partition(".")
        slots.setdefault(int(parameter), {})[slot] = tensor
    groups = [
        {name: tuple(value) if name == "betas" else value for name, value in group.items()}
        for group in plain["param_groups"]
    ]
    return {"state": slots, "param_groups": groups}


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
