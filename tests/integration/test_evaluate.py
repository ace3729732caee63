"""`visionq-worker evaluate` on drawn scenes: true answers score as true, and the record says how they were made."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from worker.cli import app
from worker.demo_model.draw import write_picture
from worker.demo_model.questions import ask_count, caption
from worker.demo_model.scenes import make_scene
from worker.models.digests import folder_digest
from worker.models.source import SHIPPED
from worker.training.curves import points
from worker.training.state import Entry, RunState

NUM_SCENES = 6
WRONG = "no scene is described like this"
RUN = RunState(
    step=4,
    history=(
        Entry(step=1, values={"loss": 3.0, "learning_rate": 1e-3}),
        Entry(step=2, values={"loss": 2.0, "learning_rate": 5e-4}),
        Entry(step=2, values={"loss": 2.5, "wer": 0.5}),
    ),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with their caption and a question each; the first caption is not true."""
    folder, rng = tmp_path_factory.mktemp("scenes"), Random(5)
    rows: list[dict[str, Any]] = []
    for number in range(NUM_SCENES):
        scene, name = make_scene(rng, 2), f"{number}.png"
        write_picture(folder / name, scene)
        asked = ask_count(rng, scene)
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked.text}]},
            {"role": "assistant", "content": asked.answer},
        ]
        rows.append({"file_name": name, "text": caption(scene) if number else WRONG})
        rows.append({"file_name": name, "messages": turns, "kind": "count"})
    lines = [json.dumps(row | {"split": "validation"}) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_true_answers_score_as_true_and_a_wrong_reference_is_named(data: Path) -> None:
    done = evaluate(data, "--json", "--max-new-tokens", 48)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    total = 2 * NUM_SCENES
    assert record["num_examples"] == total
    assert [mistake["line"] for mistake in record["mistakes"]] == [1]
    assert record["mistakes"][0]["references"] == [WRONG]
    assert record["scores"]["exact_match"] == pytest.approx((total - 1) / total)
    assert 0 < record["scores"]["wer"] < 1
    assert record["by_kind"] == {"count": {"wer": 0.0, "rouge_l": 1.0, "exact_match": 1.0}}
    assert record["num_by_kind"] == {"count": NUM_SCENES}
    assert record["checkpoint"] == folder_digest(SHIPPED["demo"])
    assert record["settings"]["max_new_tokens"] == 48
    assert record["prompt"]
    assert record["versions"]["transformers"]
    assert "base" not in record or record["base"] is None


def test_the_table_has_a_row_per_kind(data: Path) -> None:
    done = evaluate(data, "--max-examples", 3)
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[1:]}
    assert rows["n"] == ["wer", "rouge_l", "exact_match"]
    assert rows["all"][0] == "3"
    assert rows["count"] == ["1", "0.0000", "1.0000", "1.0000"]


def test_the_curves_are_those_of_the_run_that_left_the_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    for file in SHIPPED["demo"].iterdir():
        (checkpoint / file.name).symlink_to(file)
    picture = tmp_path / "curves.png"
    arguments = (data, "--model", checkpoint, "--max-examples", 1, "--plot", picture)
    refused = evaluate(*arguments)
    assert refused.exit_code == 1
    assert f"{checkpoint}: no state/run.json" in refused.stderr
    (checkpoint / "state").mkdir()
    (checkpoint / "state" / "run.json").write_text(RUN.to_json())
    done = evaluate(*arguments)
    assert done.exit_code == 0, done.output
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > drawn.height > 0


def test_training_and_validation_are_told_apart() -> None:
    assert points(RUN.history, "loss", of_training=True) == ([1, 2], [3.0, 2.0])
    assert points(RUN.history, "loss", of_training=False) == ([2], [2.5])
    assert points(RUN.history, "wer", of_training=True) == ([], [])


def test_a_broken_data_set_is_reported_with_its_lines_before_the_model_is_asked(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x", "split": "validation"}\n{')
    done = evaluate(tmp_path)
    assert done.exit_code == 1
    assert "metadata.jsonl:1: gone.png: " in done.stderr
    assert "metadata.jsonl:2: " in done.stderr


def test_an_example_that_the_model_cannot_be_asked_is_named_by_its_line(tmp_path: Path, data: Path) -> None:
    (tmp_path / "0.png").symlink_to(data / "0.png")
    turns = [{"role": "user", "content": "word " * 3000}, {"role": "assistant", "content": "x"}]
    row = {"file_name": "0.png", "messages": turns, "split": "validation"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    done = evaluate(tmp_path)
    assert done.exit_code == 1
    assert "metadata.jsonl: lines 1: prompt of" in done.stderr
