"""A checkpoint's manifest has questions that these weights answered right, and serving asks them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from api_stub.contract.finetune import FinetuneOptions, Finetuning
from tests.unit.worker.training.test_run import Attempt
from worker.bootstrap import engine_config, prompt_builder
from worker.demo_model.learning.captioner.german import METADATA, draw_data_set
from worker.engine.engine import Engine
from worker.errors import CannotStart
from worker.evaluate import EvaluationOptions, evaluate
from worker.lifecycle.smoke import ask
from worker.models.loader import load
from worker.models.manifest import read_checked
from worker.settings import WorkerSettings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped captioner after one step so small that it says what it said, which the data set calls right."""
    folder = tmp_path_factory.mktemp("smoke")
    data, settings = folder / "data", WorkerSettings(model="demo-captioner", device="cpu", torch_threads=1)
    draw_data_set(data, 30, seed=3)
    said = {wrong.line: wrong.answer for wrong in evaluate(settings, str(data), EvaluationOptions()).mistakes}
    assert len(said) >= 3, "its captions are English, those of the data set German"
    lines = (data / METADATA).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) | ({"text": said[i]} if i in said else {}) for i, line in enumerate(lines, start=1)]
    (data / METADATA).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    options = FinetuneOptions(max_steps=1, learning_rate=1e-9, batch_size=1, gradient_accumulation=1, loader_workers=0)
    job = Finetuning(base="demo-captioner", dataset=str(data), output=str(folder / "out"), options=options)
    Attempt(folder / "work").run(job)
    return folder / "out" / "checkpoint-1"


def test_serving_asks_the_questions_that_training_left(checkpoint: Path) -> None:
    questions = read_checked("it", checkpoint).smoke
    assert 3 <= len(questions) <= 4
    settings = WorkerSettings(model=str(checkpoint), device="cpu", torch_threads=1)
    loaded = load(settings)
    prompts = prompt_builder(settings, loaded)
    engine = Engine(loaded.model, loaded.tokenizer, engine_config(settings, loaded))
    engine.start()
    try:
        ask(engine, prompts, questions)
        wrong = questions[1].model_copy(update={"answers": ("Ein Haus",)})
        with pytest.raises(CannotStart, match=r"question 2 is answered '.+', right is 'Ein Haus'"):
            ask(engine, prompts, (questions[0], wrong))
    finally:
        engine.stop(10)


def test_a_file_that_is_not_the_manifests_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    read_checked("it", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CannotStart, match=r"VISIONQ_MODEL=it: config.json is not the file .* digests differ"):
        read_checked("it", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(CannotStart, match=r"model\.safetensors is missing"):
        read_checked("it", tmp_path)
