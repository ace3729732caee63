"""The state of a run beside its weights, written and read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from worker.training.progress import TrainingRefused
from worker.training.state import Best, Entry, RunState, load_run, load_state, save_state

RUN = RunState(
    step=3,
    best=Best(step=2, value=0.1, metrics={"wer": 0.1}),
    metrics={"wer": 0.3},
    history=(Entry(step=1, values={"loss": 2}),),
)


class Training:
    """Some steps on a layer of fixed data."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.data = torch.randn(8, 4)
        self.optimizer = torch.optim.AdamW(
            [{"params": [self.model.weight], "weight_decay": 0.1}, {"params": [self.model.bias]}], lr=0.1
        )
        rate: Callable[[int], float] = lambda step: 1 / (1 + step)  # noqa: E731
        self.scheduler = LambdaLR(self.optimizer, rate)

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.optimizer.zero_grad()
            self.model(self.data).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()


def test_training_goes_on_bit_by_bit_as_if_it_had_never_ended(tmp_path: Path) -> None:
    undisturbed, first, second = Training(), Training(), Training()
    undisturbed.steps(6)
    first.steps(3)
    save_state(tmp_path, first.optimizer, first.scheduler, RUN)
    second.model.load_state_dict(first.model.state_dict())
    load_state(tmp_path, second.optimizer, second.scheduler)
    second.steps(3)
    for name, weights in undisturbed.model.state_dict().items():
        assert torch.equal(weights, second.model.state_dict()[name])
    assert load_run(tmp_path) == RUN


def test_the_state_holds_no_pickles(tmp_path: Path) -> None:
    training = Training()
    training.steps(1)
    save_state(tmp_path, training.optimizer, training.scheduler, RUN)
    suffixes = sorted(path.suffix for path in tmp_path.iterdir())
    assert suffixes == [".json", ".json", ".json", ".safetensors"]
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    training, other = Training(), Training()
    training.steps(1)
    save_state(tmp_path, training.optimizer, training.scheduler, RUN)
    other.optimizer = torch.optim.AdamW(other.model.parameters())
    with pytest.raises(TrainingRefused, match="does not belong"):
        load_state(tmp_path, other.optimizer, other.scheduler)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(TrainingRefused, match=r"run\.json"):
        load_run(tmp_path)
