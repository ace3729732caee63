"""The shipped captioner learns another wording and language: German captions with places, of 2 000 drawn scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from api_stub.contract.job import CaptionJob
from api_stub.contract.sampling import SamplingParams
from tests.learning.report import Report
from tests.learning.stack import ANSWER_S, Stack
from worker.demo_model.learning.captioner.german import METADATA, draw_data_set
from worker.training.scores import Answered, score

NUM_SCENES: Final = 2000
#: What the run asks of the recipe for a model that small, which has to learn every word anew.
OPTIONS: Final[dict[str, Any]] = {
    "max_steps": 1200,
    "learning_rate": 1e-3,
    "batch_size": 32,
    "gradient_accumulation": 1,
    "eval_every": 600,
    "freeze_vision": True,
    "loader_workers": 1,
    "seed": 1,
}


def run(stack: Stack) -> Report:
    """Fine-tune, evaluate before and after, and ask the same pictures through the queue."""
    report = Report(f"captioner: demo-captioner on {NUM_SCENES} scenes with German captions")
    folder = stack.directory / "german"
    draw_data_set(folder, NUM_SCENES, seed=1)
    data = stack.upload(folder, "german")
    before = stack.evaluate(data, "demo-captioner", torch_threads=2)
    report.add("WER before", before["scores"]["wer"], at_least=0.8)
    with stack.client() as client, stack.trainer():
        job = client.finetune("demo-captioner", dataset=data, output="s3://media/training/german/", **OPTIONS)
        trained = stack.follow(job)
    report.add("minutes of training", trained.training_s / 60, at_most=15)
    after = stack.evaluate(data, trained.output, torch_threads=2)
    report.add("examples evaluated", after["num_examples"], at_least=200)
    report.add("WER after", after["scores"]["wer"], at_most=0.10)
    report.add("exact after", after["scores"]["exact_match"])
    report.check(
        "the record names the checkpoint of the job's result", after["checkpoint"] == trained.result.checkpoint
    )
    wer = _wer_through_the_queue(stack, folder, data, trained.output)
    report.add("WER through the queue", wer, at_most=0.10)
    report.check("which is the evaluation's", abs(wer - after["scores"]["wer"]) < 1e-9)
    report.notes += [
        f"loss {loss:.4f} at step {step}" for step, loss in trained.losses()[:: len(trained.losses()) // 8]
    ]
    report.notes += [f"wrong: {one['answer']!r}, right: {one['references']!r}" for one in after["mistakes"][:5]]
    return report


def _wer_through_the_queue(stack: Stack, folder: Path, data: str, checkpoint: str) -> float:
    rows = [json.loads(line) for line in (folder / METADATA).read_text(encoding="utf-8").splitlines()]
    asked = [row for row in rows if row["split"] == "validation"]
    with stack.client() as client, stack.worker(checkpoint):
        long = SamplingParams(max_new_tokens=128)  # a byte-level tokenizer makes long captions
        jobs = [client.submit(CaptionJob(media=(f"{data}{row['file_name']}",), sampling=long)) for row in asked]
        texts = [job.result(timeout=ANSWER_S).text for job in jobs]
    return score(Answered(text, (row["text"],)) for text, row in zip(texts, asked, strict=True)).overall.wer
