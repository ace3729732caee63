"""Which families a test takes in `make test`: one of each kind. Those that are built alike wait for `make check`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

#: A resampler, a projector, pictures that see both ways, queries, rows only, capped scores, tiles.
ONE_OF_EACH_KIND = ("idefics2", "llava", "gemma3", "blip2", "git", "paligemma2", "llava-next")


def each_kind(names: Iterable[Any], *, always: Collection[Any] = ONE_OF_EACH_KIND) -> list[Any]:
    """Parameters of a test; those that are not `always` run are marked `check`."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.check) for name in names]
