"""The shipped chat model learns a ninth colour by LoRA, forgets nothing, and answers about it through the queue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from api_stub.contract.job import parse_job
from tests.learning.report import Report
from tests.learning.stack import ANSWER_S, Stack
from worker.demo_model.learning.exam import KINDS
from worker.demo_model.learning.ninth_colour import METADATA, draw_exam, draw_training

NUM_LESSONS, NUM_NEW, NUM_OLD = 6000, 200, 200
OPTIONS: Final[dict[str, Any]] = {
    "method": "lora",
    "max_steps": 500,
    "learning_rate": 2e-3,
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "batch_size": 24,
    "gradient_accumulation": 1,
    "warmup_steps": 20,
    "eval_every": 250,
    "loader_workers": 1,
    "seed": 1,
}
#: Percentage points that an old kind of question may lose; with 200 questions one is half a point.
MAX_LOSS: Final = 0.02


def run(stack: Stack) -> Report:
    """Fine-tune, examine before and after, and ask about the new colour through the queue."""
    report = Report("chat: a ninth colour by LoRA on the shipped model")
    lessons, exam = stack.directory / "lessons", stack.directory / "exam"
    draw_training(lessons, NUM_LESSONS, seed=1)
    draw_exam(exam, NUM_NEW, NUM_OLD, seed=20_301)
    data = stack.upload(lessons, "lessons")
    before = stack.evaluate(str(exam), "demo", torch_threads=2)
    with stack.client() as client, stack.trainer():
        job = client.finetune("demo", dataset=data, output="s3://media/training/teal/", **OPTIONS)
        trained = stack.follow(job)
    report.add("minutes of training", trained.training_s / 60)
    after = stack.evaluate(str(exam), trained.output, torch_threads=2)
    report.add("teal colour before", exact(before, "teal colour"))
    report.add("teal colour after", exact(after, "teal colour"), at_least=0.90)
    report.add("teal captions after", exact(after, "teal caption"), at_least=0.85)
    report.add("questions of each new kind", after["num_by_kind"]["teal caption"], at_least=100)
    for kind in KINDS:
        lost = exact(before, kind) - exact(after, kind)
        report.add(f"lost of {kind} ({100 * exact(before, kind):.1f} % before)", lost, at_most=MAX_LOSS + 1e-9)
    report.add("questions of each old kind", min(after["num_by_kind"][kind] for kind in KINDS), at_least=200)
    new = stack.directory / "new"
    draw_exam(new, NUM_NEW, 0, seed=20_301)
    served = right_through_the_queue(stack, new, trained.output)
    wanted = (exact(after, "teal colour") + exact(after, "teal caption")) / 2
    report.add("right through the queue, both new kinds", served)
    report.check("which is the evaluation's", abs(served - wanted) < 1e-9)
    return report


def exact(record: Any, kind: str) -> float:
    """Return the share of right answers of one kind."""
    return float(record["by_kind"][kind]["exact_match"])


def right_through_the_queue(stack: Stack, folder: Path, checkpoint: str, **settings: object) -> float:
    """Ask a worker with the checkpoint all questions of a data set; return the share of right answers."""
    data = stack.upload(folder, folder.name)
    rows = [json.loads(line) for line in (folder / METADATA).read_text(encoding="utf-8").splitlines()]
    with stack.client() as client, stack.worker(checkpoint, **settings):
        jobs = [client.submit(parse_job({"task": "visionq.vqa", "messages": _asked(row, data)})) for row in rows]
        texts = [job.result(timeout=ANSWER_S).text for job in jobs]
    answers = [row["messages"][-1]["content"][0]["text"] for row in rows]
    return sum(text == answer for text, answer in zip(texts, answers, strict=True)) / len(rows)


def _asked(row: Any, data: str) -> list[dict[str, Any]]:
    """Return a row's conversation up to the answer, with the URIs of its pictures."""
    files = iter(row["file_name"])
    return [
        {
            "role": turn["role"],
            "content": [
                {"type": "image", "uri": f"{data}{next(files)}"} if part["type"] == "image" else part
                for part in turn["content"]
            ],
        }
        for turn in row["messages"][:-1]
    ]
