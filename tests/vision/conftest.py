"""Fixtures of the vision environment: the same as elsewhere, over more families. Without torchvision nothing runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.unit.worker.engine.conftest import one_thread
from tests.unit.worker.prompting.conftest import builder_of, loaded_family

__all__ = ["builder_of", "loaded_family", "one_thread"]

if find_spec("torchvision") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a family's name to the folder of its tiny checkpoint, built once per run."""
    from tests.tiny.families import FAMILIES, build
    from tests.tiny.torchvision_families import build_with_video

    @cache
    def checkpoint(name: str) -> Path:
        return (build if name in FAMILIES else build_with_video)(name, tmp_path_factory.mktemp(f"tiny-{name}"))

    return checkpoint
