"""The table of memory in docs/real-model.md is computed, and its way of counting is the worker's."""

from __future__ import annotations

from tests.model_memory import BYTES_PER_WEIGHT, PAGE, with_table
from worker.models import quantization


def test_the_table_of_memory_is_what_the_shapes_say() -> None:
    text = PAGE.read_text("utf-8")
    assert with_table(text) == text, "run: python -m tests.model_memory --write"


def test_weights_are_counted_as_the_worker_counts_them() -> None:
    assert BYTES_PER_WEIGHT == quantization._BYTES_PER_WEIGHT
