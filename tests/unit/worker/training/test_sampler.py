"""Which example comes when: a function of the seed and the step, whoever asks and from where on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import pytest
import torch
from torch import Tensor

from worker.training.sampler import Batches, Key, keys, step_seed


def listed(batch: Sequence[Key]) -> Mapping[str, Tensor]:
    """A batch that tells its keys."""
    return {"keys": torch.tensor([[key.epoch, key.index] for key in batch])}


def batches(first_batch: int = 0, num_threads: int = 0) -> list[list[list[int]]]:
    """Batches of 4 of 10 examples, in 2.8 epochs."""
    loader = Batches(
        listed, num_examples=10, seed=3, batch_size=4, num_batches=7, first_batch=first_batch, num_threads=num_threads
    )
    assert len(loader) == 7
    return [batch["keys"].tolist() for batch in loader]


def test_every_epoch_has_each_example_once_in_an_order_of_its_own() -> None:
    drawn = list(islice(keys(10, seed=3), 30))
    epochs = [[key.index for key in drawn if key.epoch == epoch] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(islice(keys(10, seed=4), 10)) != drawn[:10]


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("first_batch", [0, 3, 6])
def test_a_resumed_run_sees_the_batches_that_are_left(first_batch: int, num_threads: int) -> None:
    assert batches(first_batch, num_threads) == batches()[first_batch:]


def test_an_error_of_a_loader_thread_reaches_the_trainer() -> None:
    def fail(batch: Sequence[Key]) -> Mapping[str, Tensor]:
        raise RuntimeError("broken picture")

    loader = Batches(fail, num_examples=10, seed=0, batch_size=4, num_batches=3, num_threads=2)
    with pytest.raises(RuntimeError, match="broken picture"):
        list(loader)


def test_every_part_of_every_step_has_a_seed_of_its_own() -> None:
    seeds = [step_seed(seed, step, part) for seed in range(3) for step in range(20) for part in range(2)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
