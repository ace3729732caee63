"""What transformers' Trainer leaves is served as it is; the pickles beside the weights are never opened."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from worker.errors import CannotStart
from worker.models.loader import load
from worker.settings import WorkerSettings

#: The names that Trainer gives, and weights as older versions left them.
PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The folder that must not appear."""
    return tmp_path / "a-pickle-was-executed"


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, trap: Path) -> Path:
    """A folder as Trainer leaves it, with a trap in every pickle."""
    folder = Path(shutil.copytree(tiny_checkpoint("llava"), tmp_path / "checkpoint-500"))
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Trap(trap)))
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_a_trainers_checkpoint_is_served_and_its_pickles_are_not_opened(checkpoint: Path, trap: Path) -> None:
    assert load(WorkerSettings(model=str(checkpoint))).model.config.model_type == "llava"
    assert not trap.exists()


def test_a_trainers_checkpoint_of_pickled_weights_is_refused(checkpoint: Path, trap: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CannotStart, match="its weights cannot be loaded"):
        load(WorkerSettings(model=str(checkpoint)))
    assert not trap.exists()


def test_the_trap_works(checkpoint: Path, trap: Path) -> None:
    pickle.loads((checkpoint / "optimizer.pt").read_bytes())
    assert trap.is_dir()


def test_the_folder_of_a_whole_run_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "latest.json").write_text("{}")
    with pytest.raises(CannotStart, match=r"no config\.json in .*name one of the folders checkpoint-N"):
        load(WorkerSettings(model=str(tmp_path)))
