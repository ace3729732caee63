"""Fixtures of the vision environment: the same as elsewhere, over more families. Without torchvision nothing runs."""

from __future__ import annotations

from importlib.util import find_spec

from tests.unit.worker.conftest import one_thread
from tests.unit.worker.prompting.conftest import builder_of, loaded_family

__all__ = ["builder_of", "loaded_family", "one_thread"]

if find_spec("torchvision") is None:
    collect_ignore_glob = ["test_*.py"]
