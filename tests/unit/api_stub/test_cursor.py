"""Which events a reader forwards, which text it yields, how long it waits: without any Redis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import Event, JobCompleted, JobFailedEvent, JobStarted, OutputDelta
from api_stub.contract.job import TaskName
from api_stub.contract.result import FinishReason, Result, Timings, Usage
from api_stub.cursor import FIRST_CONNECT_S, RECONNECT_S, RESUBSCRIBE_S, EventCursor, ReadTimeouts, TextCursor
from api_stub.errors import JobFailed, StoreUnavailable, StreamRestarted


def started(seq: int, attempt: int = 1) -> JobStarted:
    return JobStarted(job_id="a", seq=seq, attempt=attempt, ts=1.0, worker="w", model="default")


def delta(seq: int, text: str, offset: int, attempt: int = 1) -> OutputDelta:
    return OutputDelta(job_id="a", seq=seq, attempt=attempt, ts=1.0, text=text, offset=offset, num_tokens=1)


def completed(seq: int, text: str, attempt: int = 1) -> JobCompleted:
    result = Result(
        job_id="a", task=TaskName.VQA, model="default", text=text, finish_reason=FinishReason.STOP,
        usage=Usage(), timings=Timings(), attempt=attempt,
    )  # fmt: skip
    return JobCompleted(job_id="a", seq=seq, attempt=attempt, ts=1.0, result=result)


STREAM: tuple[Event, ...] = (started(1), *(delta(2 + i, "x", i) for i in range(8)), completed(10, "x" * 8))


@given(st.lists(st.integers(0, len(STREAM) - 1), max_size=30))
def test_any_order_of_deliveries_forwards_each_event_once_and_in_order(deliveries: list[int]) -> None:
    cursor = EventCursor()
    forwarded: list[Event] = []
    for event in (STREAM[index] for index in (*deliveries, len(STREAM) - 1)):
        if cursor.is_finished:
            break
        replay = STREAM[cursor.last_seq :] if cursor.is_gap(event) else (event,)
        forwarded += [kept for candidate in replay for kept in cursor.take(candidate)]
    assert forwarded == list(STREAM)
    assert cursor.is_finished


def test_events_of_an_older_attempt_are_dropped() -> None:
    cursor = EventCursor()
    events = (started(1), started(2, attempt=2), delta(3, "late", 0, attempt=1), delta(4, "x", 0, attempt=2))
    assert [event.seq for given in events for event in cursor.take(given)] == [1, 2, 4]


def test_a_reader_that_begins_behind_the_final_event_is_finished_and_gets_nothing() -> None:
    cursor = EventCursor(after=10)
    assert cursor.take(STREAM[-1]) == ()
    assert cursor.is_finished


def test_a_final_event_is_forwarded_even_when_redis_counts_from_an_earlier_seq_again() -> None:
    cursor = EventCursor()
    for event in STREAM[:9]:
        cursor.take(event)
    assert cursor.take(completed(5, "xxx")) == (completed(5, "xxx"),)


def texts(*events: Event) -> list[str]:
    cursor = TextCursor()
    return [piece for event in events if (piece := cursor.take(event))]


def test_the_result_brings_what_the_deltas_did_not() -> None:
    assert texts(completed(2, "all at once")) == ["all at once"]
    assert texts(delta(1, "ab", 0), completed(2, "abc")) == ["ab", "c"]
    assert texts(delta(1, "ab", 0), completed(2, "ab")) == ["ab"]


def test_a_hole_in_the_deltas_is_mended_by_the_result() -> None:
    assert texts(delta(1, "ab", 0), delta(3, "ef", 4), completed(4, "abcdef")) == ["ab", "cdef"]


def test_offsets_count_code_points() -> None:
    assert texts(delta(1, "é🟥", 0), delta(2, "n", 2), completed(3, "é🟥n")) == ["é🟥", "n"]


def test_a_new_attempt_with_the_same_text_yields_only_what_is_new() -> None:
    again = (started(4, 2), delta(5, "a", 0, 2), delta(6, "bcd", 1, 2), completed(7, "abcd", 2))
    assert texts(delta(2, "ab", 0), delta(3, "c", 2), *again) == ["ab", "c", "d"]


@pytest.mark.parametrize(
    "later",
    [
        (delta(5, "aX", 0, 2),),
        (delta(5, "a", 0, 2), delta(6, "Xb", 1, 2)),
        (delta(5, "a", 0, 2), completed(6, "a", 2)),
        (completed(5, "", 2),),
    ],
)
def test_a_new_attempt_with_another_text_restarts_the_stream(later: tuple[Event, ...]) -> None:
    with pytest.raises(StreamRestarted):
        texts(delta(2, "ab", 0), started(4, 2), *later)


def test_a_failure_is_raised_with_its_code() -> None:
    error = ErrorInfo.of(ErrorCode.EXPIRED, "too late")
    with pytest.raises(JobFailed) as failure:
        texts(JobFailedEvent(job_id="a", seq=2, attempt=1, ts=1.0, error=error))
    assert (failure.value.code, failure.value.message, failure.value.retryable) == ("expired", "too late", True)


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_silence_counts_from_the_last_thing_heard() -> None:
    clock = Clock()
    timeouts = ReadTimeouts(2.0, clock)
    clock.now += 1.5
    assert timeouts.wait_s() == pytest.approx(0.5)
    timeouts.heard()
    assert timeouts.wait_s() == pytest.approx(2.0)
    clock.now += 2.0
    with pytest.raises(TimeoutError, match=r"2\.0 s"):
        timeouts.wait_s()


def test_patience_without_a_timeout_still_looks_anew_after_a_while() -> None:
    clock = Clock()
    timeouts = ReadTimeouts(None, clock)
    clock.now += 10_000
    assert timeouts.wait_s() == RESUBSCRIBE_S


@pytest.mark.parametrize("has_connected", [False, True])
def test_a_dead_redis_is_retried_for_a_bounded_time_with_growing_pauses(has_connected: bool) -> None:
    clock = Clock()
    timeouts = ReadTimeouts(None, clock)
    if has_connected:
        timeouts.connected()
        clock.now += 1000.0
    begin = clock.now
    pauses: list[float] = []

    def retry_for_ever() -> None:
        while True:
            pauses.append(timeouts.pause_s(ConnectionError()))
            clock.now += pauses[-1]

    with pytest.raises(StoreUnavailable, match="ConnectionError"):
        retry_for_ever()
    limit = RECONNECT_S if has_connected else FIRST_CONNECT_S
    assert limit - 1.0 <= clock.now - begin <= limit
    assert pauses == sorted(pauses)
    assert pauses[-1] <= 1.0


def test_the_callers_timeout_bounds_the_retries_too() -> None:
    clock = Clock()
    timeouts = ReadTimeouts(1.0, clock)
    timeouts.connected()
    assert timeouts.pause_s(ConnectionError()) < 0.9
    clock.now += 0.95
    with pytest.raises(StoreUnavailable):
        timeouts.pause_s(ConnectionError())
