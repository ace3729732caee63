"""The demo's three jobs: what is drawn, what is asked, and what is true."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from api_stub.client import Client
from api_stub.contract.job import TaskName
from api_stub.demo.over_http import HttpJob
from api_stub.devstack import Stack, StackFailed
from api_stub.devstack.worker_program import worker_command
from api_stub.handle import JobHandle

SEED = 7
DRAW_S = 60.0
LABELS = {TaskName.CAPTION: "caption", TaskName.VQA: "image question", TaskName.VIDEO_QA: "video question"}


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
            return client.caption(uri, prompt=self.text, model=model)
        if self.task is TaskName.VQA:
            return client.vqa(uri, question=self.text, model=model)
        return client.video_qa(uri, question=self.text, model=model)


class _Question(BaseModel):
    task: str
    text: str
    answer: str


class _Drawing(BaseModel):
    path: Path
    questions: tuple[_Question, ...]


class _Drawings(BaseModel):
    drawings: tuple[_Drawing, ...]


def draw(stack: Stack, seed: int = SEED) -> tuple[DemoTask, ...]:
    """Have a picture and a clip drawn and return a caption, a question about each. Raises StackFailed."""
    program = worker_command("worker.demo_model.draw")
    output = stack.run_child(
        "draw", [*program, "--out", str(stack.directory / "pictures"), "--seed", str(seed)], DRAW_S
    )
    try:
        drawings = _Drawings.model_validate_json(output).drawings
    except ValidationError as error:
        raise StackFailed(f"the drawing program printed something else than drawings: {error}") from error
    return tuple(_first(drawings, task) for task in TaskName)


def _first(drawings: tuple[_Drawing, ...], task: TaskName) -> DemoTask:
    name = task.removeprefix("visionq.")
    for drawing in drawings:
        for question in drawing.questions:
            if question.task == name:
                return DemoTask(task=task, path=drawing.path, text=question.text, truth=question.answer)
    raise StackFailed(f"the drawing program drew nothing for a {name}")
