"""What is asked: a fixed set of requests about drawn pictures and clips, and what is to happen to each job.

Every answer is greedy, so the text of a request is the same whoever gives it and however often it is begun. What it
is, the same workers say first, before anything breaks.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from api_stub.client.client import Client
from api_stub.contract.job import TaskName
from tests.e2e.scenes import Question, stored_questions

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PRIORITIES: Final = (0, 3, 6, 6, 6, 9)
TENANTS: Final = ("", "", "red", "blue")
#: Lengths of answers: 0 is what the model makes of it, the others are under way when something breaks.
LENGTHS: Final = (0, 80, 0, 250)
ENDLESS: Final = 1200
#: Rounds in which the fault-free texts are taken; all must agree.
ROUNDS: Final = 2


class Plan(StrEnum):
    """What is to happen to a job besides being answered."""

    PLAIN = "plain"
    CANCEL_QUEUED = "cancelled at once"
    CANCEL_RUNNING = "cancelled while running"
    DEADLINE = "short deadline"
    ORPHAN = "its producer was killed"


#: Plans of a producer's jobs, dealt evenly.
MIX: Final = (*[Plan.PLAIN] * 21, Plan.CANCEL_QUEUED, Plan.CANCEL_RUNNING, Plan.CANCEL_RUNNING, Plan.DEADLINE)


@dataclass(frozen=True, slots=True)
class Request:
    """One question with its fault-free answer, which is empty until it is known."""

    name: str
    fields: dict[str, object]
    text: str = ""


@dataclass(slots=True)
class Ticket:
    """One submitted job, and what its producer and its reader saw. Times are seconds since 1970."""

    request: Request
    plan: Plan
    fields: dict[str, object]
    job_id: str
    is_submitted: bool = False
    num_submits: int = 0
    slowest_submit_s: float = 0.0
    cancel_at: float | None = None
    cancel_answer: str = ""
    num_visits: int = 0
    read_text: str | None = None
    read_code: str | None = None
    problems: list[str] = field(default_factory=list)


def stored_requests(s3: S3Client, directory: Path, num_pictures: int, num_clips: int) -> list[Request]:
    """Draw and upload the media; return the requests, without their answers."""
    options = ("--count", str(num_pictures), "--clips", str(num_clips), "--seed", "11")
    questions = stored_questions(s3, directory, *options)
    lengths = islice(cycle(LENGTHS), len(questions))
    return [_request(question, length) for question, length in zip(questions, lengths, strict=True)]


def _request(question: Question, length: int) -> Request:
    word = "prompt" if question.task == "caption" else "question"
    fields: dict[str, object] = {
        "task": TaskName[question.task.upper()].value,
        "media": [question.uri],
        word: question.text,
    }
    if length:
        fields["sampling"] = {"min_new_tokens": length, "max_new_tokens": length}
    return Request(f"{question.path.name}: {question.text} [{length or 'short'}]", fields)


def with_answers(client: Client, requests: Sequence[Request]) -> list[Request]:
    """Ask everything twice while nothing is broken, all at once; fail when the texts differ."""
    jobs = [client.submit(request.fields) for _ in range(ROUNDS) for request in requests]
    with ThreadPoolExecutor(len(jobs)) as pool:  # all wait at once: results are not kept for long in a soak
        texts = [result.text for result in pool.map(lambda job: job.result(timeout=300), jobs)]
    first, *others = (texts[start : start + len(requests)] for start in range(0, len(texts), len(requests)))
    for other in others:
        different = [r.name for r, one, two in zip(requests, first, other, strict=True) if one != two]
        assert not different, f"fault-free texts differ from round to round: {different}"
    return [Request(request.name, request.fields, text) for request, text in zip(requests, first, strict=True)]


class TicketOffice:
    """Makes tickets, all from one random number generator; the producer's thread decides nothing."""

    def __init__(self, rng: Random, requests: Sequence[Request]) -> None:
        self._rng = rng
        self.requests = requests
        self._plans: list[Plan] = []

    def ticket(self, plan: Plan | None = None) -> Ticket:
        """Return the next job, with `plan` or the next of the mix."""
        if not self._plans:
            self._plans = self._rng.sample(MIX, len(MIX))
        plan = plan or self._plans.pop()
        request = self._rng.choice(self.requests)
        job_id = str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
        fields = request.fields | {
            "priority": self._rng.choice(PRIORITIES),
            "tenant": self._rng.choice(TENANTS),
            "metadata": {"plan": plan.value},
        }
        if plan is Plan.CANCEL_RUNNING:
            fields["sampling"] = {"min_new_tokens": ENDLESS, "max_new_tokens": ENDLESS}
        elif plan is Plan.DEADLINE:
            fields |= {
                "deadline_s": self._rng.uniform(0.2, 4.0),
                "sampling": {"min_new_tokens": ENDLESS, "max_new_tokens": ENDLESS},
            }
        return Ticket(request, plan, fields, job_id)
