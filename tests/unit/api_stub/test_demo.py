"""What the demo makes of a job's events, and what it shows and decides at the end."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import (
    Event,
    JobCompleted,
    JobFailedEvent,
    JobProgress,
    JobQueued,
    JobRetrying,
    JobStarted,
    OutputDelta,
    RetryReason,
    Stage,
)
from api_stub.contract.job import TaskName
from api_stub.contract.result import FinishReason, Result, Timings, Usage
from api_stub.demo.run import DemoFailed, judge
from api_stub.demo.screen import Progress, answers, screen_for
from api_stub.demo.tasks import DemoTask

TASK = DemoTask(task=TaskName.VQA, path=Path("a.png"), text="What colour is the circle?", truth="dark green")


def event(kind: type[Event], seq: int, **fields: object) -> Event:
    return kind.model_validate({"v": 1, "job_id": "j", "seq": seq, "attempt": 1, "ts": 100.0 + seq} | fields)


def completed(text: str, seq: int = 9) -> Event:
    result = Result(
        job_id="j", task=TaskName.VQA, model="default", text=text, finish_reason=FinishReason.STOP,
        usage=Usage(), timings=Timings(), attempt=1,
    )  # fmt: skip
    return event(JobCompleted, seq, result=result)


def answered(*pieces: str, result: str) -> Progress:
    return play(
        event(JobQueued, 1, model="default", priority=6),
        event(JobStarted, 2, worker="w", model="default"),
        event(JobProgress, 3, stage=Stage.FETCHING, done=0, total=1),
        *(event(OutputDelta, 4 + i, text=piece, offset=0, num_tokens=1) for i, piece in enumerate(pieces)),
        completed(result),
    )


def play(*events: Event) -> Progress:
    progress = Progress(TASK, "j")
    for each in events:
        progress = progress.after(each)
    return progress


def test_times_count_from_the_submit_by_the_events_own_clock() -> None:
    progress = answered("dark", " green", result="dark green")
    assert progress.seconds_until(progress.started_at) == 1
    assert progress.seconds_until(progress.first_token_at) == 3
    assert progress.is_streamed
    assert progress.is_true


def test_a_new_attempt_drops_the_old_text() -> None:
    progress = play(
        event(JobQueued, 1, model="default", priority=6),
        event(JobStarted, 2, worker="w", model="default"),
        event(OutputDelta, 3, text="dar", offset=0, num_tokens=1),
        event(JobRetrying, 4, reason=RetryReason.LOST),
        event(JobStarted, 5, worker="w", model="default"),
        event(OutputDelta, 6, text="dark green", offset=0, num_tokens=1),
        completed("dark green"),
    )
    assert progress.is_streamed
    assert progress.seconds_until(progress.first_token_at) == 5


def test_case_and_a_full_stop_do_not_make_an_answer_wrong() -> None:
    assert answered("Dark green.", result="Dark green.").is_true
    assert not answered("green", result="green").is_true


def test_text_that_was_not_streamed_is_no_answer() -> None:
    with pytest.raises(DemoFailed, match="not every job was answered: image question: completed"):
        judge([answered("dark", result="dark green")], is_demo_model=False)


def test_a_failed_job_fails_the_demo() -> None:
    error = ErrorInfo.of(ErrorCode.MEDIA_CORRUPT, "no picture")
    failed = play(event(JobQueued, 1, model="default", priority=6), event(JobFailedEvent, 2, error=error))
    with pytest.raises(DemoFailed, match="image question: failed"):
        judge([failed], is_demo_model=False)


def test_a_wrong_answer_counts_only_against_the_shipped_model() -> None:
    wrong = answered("red", result="red")
    judge([wrong], is_demo_model=False)
    with pytest.raises(DemoFailed, match="'red' instead of 'dark green'"):
        judge([wrong], is_demo_model=True)
    judge([answered("dark green", result="dark green")], is_demo_model=True)


def test_a_terminal_shows_the_jobs_side_by_side() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    first, second = answered("dark green", result="dark green"), Progress(TASK, "k", stage="prefill")
    with screen_for(console) as screen:
        screen.show(completed("dark green"), first, [first, second])
    assert any("completed" in line and "prefill" in line for line in out.getvalue().splitlines())


def test_a_pipe_shows_a_stage_once_and_every_piece_of_text() -> None:
    out = io.StringIO()
    progress = Progress(TASK, "j")
    with screen_for(Console(file=out)) as screen:
        for each in (
            event(JobProgress, 1, stage=Stage.FETCHING, done=0, total=2),
            event(JobProgress, 2, stage=Stage.FETCHING, done=1, total=2),
            event(OutputDelta, 3, text=" [bold]", offset=0, num_tokens=1),
        ):
            progress = progress.after(each)
            screen.show(each, progress, [progress])
    assert out.getvalue() == "image question  [fetching]\nimage question  … [bold]\n"


def test_answers_stand_next_to_the_truth() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(answers([answered("red", result="red")], is_demo_model=True))
    assert [line.split() for line in out.getvalue().splitlines()][1:3] == [
        ["answer", "red"],
        ["drawn", "dark", "green"],
    ]
    assert "queued 1000 ms, first token after 3000 ms, answered after 8000 ms" in out.getvalue()
