"""Any entry at all through a worker's receiving code: each has one end, and none raises."""

from __future__ import annotations

import random

import pytest

from tests.fuzz_entries import entries, entry, receive


def test_twenty_thousand_odd_entries_have_one_end_each(redis_url: str) -> None:
    outcomes = receive(redis_url, 20_000, seed=1, notes=False)
    assert outcomes.total() == 20_000
    assert {"refused", "unreadable", "no_id", "doorbell", "job"} <= outcomes.keys()


def test_messages_that_redis_notes_as_held_are_let_go_of(redis_url: str, redis_client: object) -> None:
    assert receive(redis_url, 500, seed=2).total() == 500
    assert not redis_client.exists("unacked", "unacked_index")  # type: ignore[attr-defined]


def test_a_seed_always_means_the_same_entries() -> None:
    first = entries(7)
    draw = random.Random(7)
    assert [next(first) for _ in range(200)] == [entry(draw) for _ in range(200)]


@pytest.mark.parametrize("fault", [ZeroDivisionError, KeyError])
def test_the_check_itself_finds_an_entry_that_breaks_the_receiver(
    fault: type[Exception], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise fault

    monkeypatch.setattr("tests.fuzz_entries.read_message", broken)
    with pytest.raises(AssertionError):
        receive(redis_url, 100, seed=1, notes=False)
