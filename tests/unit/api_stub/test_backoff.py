"""Pauses grow from the first to the longest, and jitter only shortens them."""

from __future__ import annotations

import pytest

from api_stub.ledger.backoff import Backoff


def test_pauses_double_up_to_the_longest() -> None:
    assert [Backoff(first_s=2.0, max_s=60.0).delay_s(n) for n in range(1, 8)] == [2, 4, 8, 16, 32, 60, 60]
    assert [Backoff(first_s=1.0, max_s=5.0, factor=3).delay_s(n) for n in (1, 2, 3)] == [1, 3, 5]


def test_a_long_outage_overflows_nothing() -> None:
    assert Backoff(first_s=0.05, max_s=1.0).delay_s(10**6) == 1.0


@pytest.mark.parametrize(("num_failures", "longest_s"), [(1, 2.0), (2, 4.0), (10, 60.0)])
def test_equal_jitter_draws_from_the_upper_half(num_failures: int, longest_s: float) -> None:
    pauses = {Backoff(first_s=2.0, max_s=60.0, jitter=0.5).delay_s(num_failures) for _ in range(50)}
    assert longest_s / 2 <= min(pauses) < max(pauses) <= longest_s
