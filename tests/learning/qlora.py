"""QLoRA: 50 steps beside nf4 weights, stopped and resumed once, then served beside the weights that it learnt with."""

from __future__ import annotations

from statistics import fmean
from typing import Any, Final

from api_stub.client.handle import JobHandle
from api_stub.contract.event import JobProgress, Stage
from api_stub.errors import JobFailed
from tests.learning.chat import exact, right_through_the_queue
from tests.learning.report import Report
from tests.learning.stack import ANSWER_S, TRAINING_S, Stack
from worker.demo_model.learning.ninth_colour import draw_exam, draw_training

NUM_LESSONS, NUM_NEW = 600, 100
STEPS, EVERY, STOP_AT = 50, 10, 20
OPTIONS: Final[dict[str, Any]] = {
    "method": "qlora",
    "max_steps": STEPS,
    "learning_rate": 2e-3,
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "batch_size": 16,
    "gradient_accumulation": 1,
    "warmup_steps": 5,
    "eval_every": EVERY,
    "eval_examples": 50,
    "loader_workers": 1,
    "seed": 1,
}


def run(stack: Stack) -> Report:
    """Fine-tune in two attempts, and serve."""
    report = Report("qlora: the shipped model beside nf4 weights")
    lessons, exam = stack.directory / "lessons", stack.directory / "exam"
    draw_training(lessons, NUM_LESSONS, seed=1)
    draw_exam(exam, NUM_NEW, 0, seed=20_301)
    data = stack.upload(lessons, "lessons")
    with stack.client() as client, stack.trainer():
        job = client.finetune("demo", dataset=data, output="s3://media/training/qlora/", **OPTIONS)
        _stop(job)
        trained = stack.follow(client.retry(job.id))
    first = trained.progress[0].done
    report.add("first step after the resume", first, at_least=STOP_AT, at_most=STEPS - EVERY)
    report.add("steps", trained.result.steps or 0, at_least=STEPS, at_most=STEPS)
    validation = {
        event.done: event.metrics["validation_loss"]
        for event in trained.progress
        if event.metrics and "validation_loss" in event.metrics
    }
    report.notes.append(f"validation loss by step: {validation}")
    early = [loss for step, loss in _losses(job)[:3]]
    late = [loss for step, loss in trained.losses()[-3:]]
    report.add("loss of the first steps that were told", fmean(early))
    report.add("loss of the last", fmean(late), at_most=0.8 * fmean(early))
    after = stack.evaluate(str(exam), trained.output, torch_threads=2)
    wanted = (exact(after, "teal colour") + exact(after, "teal caption")) / 2
    served = right_through_the_queue(stack, exam, trained.output)
    report.add("right through the queue, both new kinds", served)
    report.check("which is the evaluation's", abs(served - wanted) < 1e-9)
    return report


def _stop(job: JobHandle) -> None:
    """Cancel the job once it is past `STOP_AT` and wait until it has stopped."""
    for event in job.events(timeout=TRAINING_S):
        if isinstance(event, JobProgress) and event.stage is Stage.TRAINING and event.done >= STOP_AT:
            job.cancel()
            break
    try:
        job.result(timeout=ANSWER_S)
    except JobFailed as stopped:
        if stopped.code == "cancelled":
            return
        raise
    raise AssertionError("the job was over before it could be stopped")


def _losses(job: JobHandle) -> list[tuple[int, float]]:
    events = job.events(timeout=ANSWER_S)
    return [
        (event.done, event.metrics["loss"])
        for event in events
        if isinstance(event, JobProgress) and event.stage is Stage.TRAINING and event.metrics
    ]
