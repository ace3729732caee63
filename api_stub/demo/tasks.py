"""The demo's three jobs: what is drawn, what is asked, and what is true.

One of them is handed in and followed over HTTP, with the standard library alone.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from api_stub.client.client import Client
from api_stub.client.handle import JobHandle
from api_stub.contract.event import Event, FinalEvent, parse_event
from api_stub.contract.job import TaskName
from api_stub.demo.drawings import DRAW_S, Drawing, command_for, drawings_of
from api_stub.devstack import Stack, StackFailed
from api_stub.errors import VisionqError

SUBMIT_S = 30.0

SEED = 7
LABELS = {TaskName.CAPTION: "caption", TaskName.VQA: "image question", TaskName.VIDEO_QA: "video question"}


class GatewayFailed(VisionqError):
    """Raised when the gateway refused the demo's job or did not carry it to its end."""

    code = "gateway_failed"


@dataclass(frozen=True, slots=True)
class HttpJob:
    """A job that the gateway took. `events` is what `JobHandle.events` is."""

    url: str
    id: str

    @classmethod
    def submit(cls, url: str, fields: Mapping[str, object]) -> HttpJob:
        """Hand a job in to the gateway at `url`. Raises GatewayFailed."""
        body = json.dumps(fields)
        try:
            with closing(_connection(url, SUBMIT_S)) as connection:
                connection.request("POST", "/v1/jobs", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                reply = json.loads(answer.read())
        except (OSError, HTTPException, ValueError) as error:
            raise GatewayFailed(f"the gateway at {url} took no job: {type(error).__name__}") from error
        if "job_id" not in reply:
            raise GatewayFailed(f"the gateway refused the job: {reply.get('detail', answer.status)}")
        return cls(url, str(reply["job_id"]))

    def events(self, after: int = 0, timeout: float | None = None) -> Generator[Event, None, None]:
        """Yield the job's events. Raises GatewayFailed, TimeoutError when not even a heartbeat comes in time."""
        try:
            with closing(_connection(self.url, timeout)) as connection:
                connection.request("GET", f"/v1/jobs/{self.id}/events?after={after}")
                yield from _events(connection.getresponse())
        except TimeoutError:
            raise
        except (OSError, HTTPException, ValueError) as error:
            raise GatewayFailed(f"the stream of job {self.id} broke: {type(error).__name__}") from error


def _events(answer: HTTPResponse) -> Generator[Event, None, None]:
    for line in answer:
        if line.startswith(b"data: "):
            event = parse_event(line.removeprefix(b"data: "))
            yield event
            if isinstance(event, FinalEvent):
                return
    raise GatewayFailed(f"the gateway ended a stream before its job, status {answer.status}")


def _connection(url: str, timeout_s: float | None) -> HTTPConnection:
    address = urlsplit(url)
    return HTTPConnection(address.hostname or "", address.port, timeout=timeout_s)


class DemoTask(BaseModel):
    """A job to be and its true answer. `text` is the prompt or the question."""

    model_config = ConfigDict(frozen=True)

    task: TaskName
    path: Path
    text: str
    truth: str

    @property
    def label(self) -> str:
        """What a person calls the job."""
        return LABELS[self.task]

    @property
    def is_over_http(self) -> bool:
        """Tell whether this job takes the gateway, where there is one, and not Redis."""
        return self.task is TaskName.VQA

    def submit_http(self, url: str, uri: str, model: str) -> HttpJob:
        """Hand the job in to the gateway at `url`. Raises GatewayFailed."""
        asked = "prompt" if self.task is TaskName.CAPTION else "question"
        return HttpJob.submit(url, {"task": str(self.task), "media": [uri], asked: self.text, "model": model})

    def submit(self, client: Client, uri: str, model: str) -> JobHandle:
        """Hand the job in. Raises as `Client.submit` does."""
        if self.task is TaskName.CAPTION:
            return client.caption(uri, prompt=self.text or None, model=model)
        if self.task is TaskName.VQA:
            return client.vqa(uri, question=self.text, model=model)
        return client.video_qa(uri, question=self.text, model=model)


def draw(stack: Stack, seed: int = SEED, *, captions_only: bool = False) -> tuple[DemoTask, ...]:
    """Have a picture and a clip drawn and return a caption, a question about each. Raises StackFailed.

    `captions_only`: the caption alone and without a prompt, as a captioner takes a prompt as its caption's beginning.
    """
    drawings = drawings_of(stack.run_child("draw", command_for(stack.directory / "pictures", seed), DRAW_S))
    if captions_only:
        return (_first(drawings, TaskName.CAPTION).model_copy(update={"text": ""}),)
    return tuple(_first(drawings, task) for task in LABELS)


def _first(drawings: tuple[Drawing, ...], task: TaskName) -> DemoTask:
    name = task.removeprefix("visionq.")
    for drawing in drawings:
        for question in drawing.questions:
            if question.task == name:
                return DemoTask(task=task, path=drawing.path, text=question.text, truth=question.answer)
    raise StackFailed(f"the drawing program drew nothing for a {name}")
