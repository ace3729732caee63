"""One loaded model and one prompt builder per family for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from worker.models.loader import LoadedModel, load
from worker.prompting.prepare import PromptBuilder
from worker.settings import WorkerSettings


@pytest.fixture(scope="session")
def loaded_family(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    """Return a function from a family's name to its loaded tiny model."""

    @cache
    def loaded(name: str) -> LoadedModel:
        return load(WorkerSettings(model=str(tiny_checkpoint(name))))

    return loaded


@pytest.fixture(scope="session")
def builder_of(loaded_family: Callable[[str], LoadedModel]) -> Callable[[str], PromptBuilder]:
    """Return a function from a family's name to its prompt builder."""

    @cache
    def builder(name: str) -> PromptBuilder:
        return PromptBuilder(loaded_family(name))

    return builder
