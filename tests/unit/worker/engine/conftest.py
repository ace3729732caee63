"""Fixtures of the engine's tests: loaded tiny models, once per run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.tiny.jobs import TinyModel


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], TinyModel]:
    """Return a function from a family's name to its loaded tiny model."""

    @cache
    def load(name: str) -> TinyModel:
        return TinyModel(name, tiny_checkpoint(name))

    return load


@pytest.fixture
def idefics2(tiny_model: Callable[[str], TinyModel]) -> TinyModel:
    """The family that most tests need."""
    return tiny_model("idefics2")
