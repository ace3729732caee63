"""The course of the demo, from nothing to three answers and back to nothing."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from api_stub.client.client import Client
from api_stub.demo.screen import Follow, Followed, Progress, answers, invitation, next_steps, say, screen_for
from api_stub.demo.tasks import DemoTask, draw
from api_stub.devstack import Stack, StackOptions, StopSignals
from api_stub.errors import VisionqError

DEMO_MODEL, DEMO_CAPTIONER = "demo", "demo-captioner"
ANSWERS_S = 300.0
LOOK_S = 0.1


class DemoFailed(VisionqError):
    """Raised when a job got no answer, or the shipped model gave a wrong one. `str()` tells which."""

    code = "demo_failed"


def run_demo(as_json: bool = False, stay: bool = False) -> None:
    """Run the demo and leave nothing behind. Main thread only; every wait is bounded.

    With a shipped model an answer that is not the truth is a failure: for these scenes the right answers are known
    to come. A real model words things differently, so there only missing answers count. The shipped captioner answers
    no questions and gets the caption only. `as_json` prints one JSON object per job on stdout and everything else on
    stderr; `stay` keeps the stack until a signal.
    Raises DemoFailed, StackFailed, Interrupted, and what the client raises.
    """
    options = StackOptions()
    model = options.environment.get("VISIONQ_MODEL") or DEMO_MODEL
    is_demo_model = model in (DEMO_MODEL, DEMO_CAPTIONER)
    console = Console(stderr=as_json)
    with StopSignals() as signals, Stack(options, signals) as stack:
        tasks = _prepare(stack, console, captions_only=model == DEMO_CAPTIONER)
        stack.enter()
        with Client() as client:
            uris = [client.upload(task.path) for task in tasks]
            stack.wait_for_workers()
            everything = _ask(stack, signals, client, tasks, uris, console)
        if as_json:
            _print_json(everything, uris, stack.endpoints.get("VISIONQ_API_URL"))
        else:
            say(console, "")
            console.print(answers(everything, is_demo_model))
            say(console, f"\n{next_steps(is_demo_model, _program())}")
        if stay:
            say(console, f"\n{invitation(stack.endpoints, uris, _program())}")
            stack.stay()
    judge(everything, is_demo_model)


def judge(everything: Sequence[Progress], is_demo_model: bool) -> None:
    """Raise DemoFailed unless the pipeline produced every answer and the shipped model's answers are true."""
    unanswered = [progress for progress in everything if not progress.is_streamed]
    if unanswered:
        raise DemoFailed(f"not every job was answered: {_stages(unanswered)}")
    wrong = [progress for progress in everything if not progress.is_true]
    if is_demo_model and wrong:
        listed = "; ".join(f"{p.task.label}: {p.text!r} instead of {p.task.truth!r}" for p in wrong)
        raise DemoFailed(f"the shipped model gave a wrong answer: {listed}")


def _prepare(stack: Stack, console: Console, *, captions_only: bool) -> tuple[DemoTask, ...]:
    say(console, "starting Redis, S3, a worker and the gateway …")
    stack.start_servers()
    stack.start_workers()
    stack.start_gateway()
    # The pictures are drawn while the worker loads its model.
    return draw(stack, captions_only=captions_only)


def _ask(
    stack: Stack,
    signals: StopSignals,
    client: Client,
    tasks: Sequence[DemoTask],
    uris: Sequence[str],
    console: Console,
) -> list[Progress]:
    url = stack.endpoints.get("VISIONQ_API_URL")
    over_http = [task.label for task in tasks if task.is_over_http]
    way = f"the {', '.join(over_http)} over HTTP, " if url and over_http else ""
    what, about = (
        ("three jobs at once", "a picture and a clip that were")
        if len(tasks) > 1
        else ("one job", "a picture that was")
    )
    say(console, f"{what}, {way}about {about} just drawn:\n")
    handles = [_submit(stack, client, task, uri) for task, uri in zip(tasks, uris, strict=True)]
    everything = [Progress(task, handle.id) for task, handle in zip(tasks, handles, strict=True)]
    follow = Follow(handles, ANSWERS_S)
    deadline = time.monotonic() + ANSWERS_S
    with screen_for(console) as screen:
        while any(progress.ending is None for progress in everything):
            signals.check()
            stack.supervise()
            if time.monotonic() > deadline:
                raise DemoFailed(f"no answers within {ANSWERS_S:g} s: {_stages(everything)}")
            if (news := follow.take(LOOK_S)) is not None:
                index, event = news
                everything[index] = everything[index].after(event)
                screen.show(event, everything[index], everything)
    return everything


def _submit(stack: Stack, client: Client, task: DemoTask, uri: str) -> Followed:
    url = stack.endpoints.get("VISIONQ_API_URL")
    if url is not None and task.is_over_http:
        return task.submit_http(url, uri, stack.options.model_name)
    return task.submit(client, uri, stack.options.model_name)


def _print_json(everything: Sequence[Progress], uris: Sequence[str], url: str | None) -> None:
    for progress, uri in zip(everything, uris, strict=True):
        ending = progress.ending
        facts = {
            "job_id": progress.job_id,
            "task": progress.task.task,
            "way": "http" if url and progress.task.is_over_http else "redis",
            "media": uri,
            "question": progress.task.text,
            "truth": progress.task.truth,
            "is_true": progress.is_true,
            "is_streamed": progress.is_streamed,
            "status": progress.stage,
            "seconds_to_first_token": round(progress.seconds_until(progress.first_token_at), 6),
            "seconds_to_answer": round(progress.seconds_until(ending.ts if ending else None), 6),
        }
        outcome = ending.model_dump(mode="json", include={"result", "error"}) if ending else {}
        Console(soft_wrap=True).print_json(data=facts | outcome, indent=None, highlight=False)


def _stages(everything: Sequence[Progress]) -> str:
    return ", ".join(f"{progress.task.label}: {progress.stage}" for progress in everything)


def _program() -> str:
    """How this user calls `visionq`: `make demo` leaves it in an environment that is not on PATH."""
    if shutil.which("visionq") is not None:
        return "visionq"
    called = Path(sys.argv[0])
    return os.path.relpath(called) if called.is_file() else "visionq"
