"""Runs of tiny models: stopped and resumed, refused, with adapters, and by the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from api_stub.contract.finetune import FinetuneMethod, FinetuneResult, Finetuning
from tests.killed_training import make_data, make_job
from worker.cli import app
from worker.models.loader import load
from worker.settings import WorkerSettings
from worker.training.batch import UnsafeTemplate
from worker.training.dataset import DatasetBroken
from worker.training.evaluation import Evaluation
from worker.training.progress import Progress, Stopped, StopReason, TrainingRefused
from worker.training.run import Places, finetune

Checkpoints = Callable[[str], Path]
#: PEFT asks a model for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


class Attempt:
    """One attempt of a job, in a folder of its own; remembers the progress it made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.told: list[Progress] = []
        self.committed: list[int] = []

    def run(self, job: Finetuning, stop: Callable[[], StopReason | None] = lambda: None) -> FinetuneResult:
        self.directory.mkdir(parents=True)
        return finetune(
            job,
            places=Places(WorkerSettings(device="cpu", torch_threads=1), self.directory),
            progress=self.told.append,
            stop=stop,
            committed=lambda step, _: self.committed.append(step),
        )

    @property
    def losses(self) -> list[float]:
        return [progress.loss for progress in self.told if progress.loss is not None]


def files_of(output: Path, step: int) -> dict[str, str]:
    """The digests of all files of a checkpoint."""
    manifest = json.loads((output / f"checkpoint-{step}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Checkpoints) -> tuple[Finetuning, Path]:
    """A job that has ended, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    job = make_job(
        tiny_checkpoint("git"), make_data(folder / "data"), str(folder / "output"), workers=0, accumulation=2
    )
    attempt = Attempt(folder / "work")
    result = attempt.run(job)
    assert attempt.committed == [3, 6, 8]
    assert result.steps == 8
    return job, folder


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(finished: tuple[Finetuning, Path], tmp_path: Path) -> None:
    undisturbed, folder = finished
    job = undisturbed.model_copy(update={"output": str(tmp_path / "output")})
    first, second, third = (Attempt(tmp_path / f"work-{number}") for number in range(3))
    with pytest.raises(Stopped) as stopped:
        first.run(job, lambda: StopReason.CANCELLED if len(first.losses) == 5 else None)
    assert (stopped.value.reason, stopped.value.checkpoint) == (
        StopReason.CANCELLED, f"{tmp_path}/output/checkpoint-4/",
    )  # fmt: skip
    asked: list[int] = []

    def while_step_6_is_evaluated() -> StopReason | None:
        asked.append(second.told[-1].step if second.told else 0)
        return StopReason.DRAINING if asked.count(6) == 2 else None

    with pytest.raises(Stopped) as stopped:
        second.run(job, while_step_6_is_evaluated)
    assert stopped.value.checkpoint == f"{tmp_path}/output/checkpoint-6/"
    third.run(job)
    assert [attempt.told[0].step for attempt in (first, second, third)] == [1, 5, 7]
    assert files_of(tmp_path / "output", 8) == files_of(folder / "output", 8)
    left, wanted = (json.loads((place / "output" / "latest.json").read_text()) for place in (tmp_path, folder))
    assert (left["checkpoint"], left["best"]) == (wanted["checkpoint"], wanted["best"])


def test_a_run_that_has_ended_answers_without_a_step(finished: tuple[Finetuning, Path], tmp_path: Path) -> None:
    job, folder = finished
    again = Attempt(tmp_path / "work")
    result = again.run(job)
    assert again.told == []
    best = json.loads((folder / "output" / "latest.json").read_text())["best"]
    assert result.output_uri == f"{job.output}/{best}/"
    assert set(result.metrics) >= {"loss", "wer", "exact_match"}
    loaded = load(WorkerSettings(model=result.output_uri, device="cpu"))
    assert loaded.capabilities.captioner is not None


def with_options(job: Finetuning, **options: object) -> Finetuning:
    return job.model_copy(update={"options": job.options.model_copy(update=options)})


def test_checkpoints_of_another_run_are_refused(finished: tuple[Finetuning, Path], tmp_path: Path) -> None:
    job, folder = finished
    latest = (folder / "output" / "latest.json").read_text()
    with pytest.raises(TrainingRefused, match=r"belongs to another run .*learning_rate: 0\.5, there 0\.001"):
        Attempt(tmp_path / "rate").run(with_options(job, learning_rate=0.5))
    with pytest.raises(TrainingRefused, match="seed: 7, there 1"):
        Attempt(tmp_path / "seed").run(with_options(job, seed=7, resume=True))
    other = job.model_copy(update={"dataset": str(make_data(tmp_path / "data", num_examples=13))})
    with pytest.raises(TrainingRefused, match=r"data: .*, there"):
        Attempt(tmp_path / "other").run(with_options(other, resume=True))
    with pytest.raises(TrainingRefused, match="no checkpoint to resume"):
        Attempt(tmp_path / "none").run(
            with_options(job, resume=True).model_copy(update={"output": str(tmp_path / "empty")})
        )
    assert (folder / "output" / "latest.json").read_text() == latest
    longer = Attempt(tmp_path / "longer")
    named = with_options(job, resume=f"{folder}/output/checkpoint-8", max_steps=9, learning_rate=1e-4)
    result = longer.run(named.model_copy(update={"output": str(tmp_path / "output")}))
    assert longer.told[0].step == 9
    assert longer.told[0].learning_rate < 1e-4
    assert result.steps == 9


def test_what_does_not_fit_the_model_is_found_before_the_first_step(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    data = make_data(tmp_path / "data")
    rows = (data / "metadata.jsonl").read_text().splitlines()
    rows[4] = json.dumps({"file_name": "4.png", "text": "a pink cat " * 500})
    (data / "metadata.jsonl").write_text("\n".join(rows))
    attempt = Attempt(tmp_path / "work")
    with pytest.raises(DatasetBroken, match=r"metadata\.jsonl:5: .* tokens, the model's limit is"):
        attempt.run(make_job(tiny_checkpoint("git"), data, str(tmp_path / "output"), workers=0, accumulation=1))
    assert attempt.told == []
    assert not (tmp_path / "output").exists(), "another run's output stays its own"


@pytest.mark.parametrize("family", ["blip2", "paligemma"])
def test_families_whose_labels_are_not_proven_are_refused_by_name(
    tiny_checkpoint: Checkpoints, tmp_path: Path, family: str
) -> None:
    output, attempt = tmp_path / "output", Attempt(tmp_path / "work")
    data = make_data(tmp_path / "data")
    with pytest.raises(UnsafeTemplate, match=r"captions for \w+Processor are not supported: GIT's only"):
        attempt.run(make_job(tiny_checkpoint(family), data, str(output), workers=0, accumulation=1))
    assert attempt.told == []
    assert not output.exists()


def test_an_evaluation_that_is_no_number_ends_the_run_before_a_checkpoint(
    tiny_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a step that was too long: its loss was a number, and the weights that it left make none."""
    monkeypatch.setattr(Evaluation, "measure", lambda *_: {"loss": math.nan, "wer": 1.0})
    attempt, output = Attempt(tmp_path / "work"), tmp_path / "output"
    job = make_job(tiny_checkpoint("git"), make_data(tmp_path / "data"), str(output), workers=0, accumulation=1)
    with pytest.raises(TrainingRefused, match=r"step 3: validation: the loss is nan; the learning rate of \S+ is too"):
        attempt.run(job)
    assert attempt.committed == []


def chat_job(base: Path, folder: Path, method: FinetuneMethod, **options: object) -> Finetuning:
    """Two steps of 4 conversations whose answers have different lengths."""
    data = make_data(folder / "data")
    rows = [
        {
            "file_name": f"{number}.png",
            "split": "train" if number < 10 else "validation",
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a dog " * (1 + number % 5)}]},
            ],
        }
        for number in range(12)
    ]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields: dict[str, Any] = {
        "max_steps": 2, "batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-2, "eval_every": 2,
        "max_new_tokens": 2, "lora_rank": 4, **options,
    }  # fmt: skip
    return Finetuning(base=str(base), dataset=str(data), output=str(folder / "output"), method=method, options=fields)


def test_accumulated_batches_weigh_every_token_alike(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    losses = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        folder = tmp_path / f"batches-of-{batch_size}"
        folder.mkdir()
        attempt = Attempt(folder / "work")
        options = {"batch_size": batch_size, "gradient_accumulation": accumulation}
        attempt.run(chat_job(tiny_checkpoint("llava"), folder, FinetuneMethod.LORA, **options))
        losses.append(attempt.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_quantised_weights_are_never_packed_while_they_are_trained(
    tiny_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with AVX512-BF16, where bitsandbytes packs them at the first forward of an evaluation."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    packed: list[object] = []

    def pack(weight: object, quant_state: object) -> tuple[object, object]:
        packed.append(weight)
        return weight, quant_state

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", pack)
    base = tiny_checkpoint("llava")
    attempt = Attempt(tmp_path / "work")
    result = attempt.run(chat_job(base, tmp_path, FinetuneMethod.QLORA, eval_every=1))
    assert packed == []
    assert attempt.committed == [1, 2]
    assert attempt.losses[-1] < attempt.losses[0]
    folder = Path(result.output_uri)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["target_modules"] == sorted(config["target_modules"])
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jinja", ".safetensors"}


def test_the_command_trains_and_names_what_it_left(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    arguments = [
        "finetune", str(data), "--base", str(tiny_checkpoint("git")), "--output", str(tmp_path / "output"),
        "--max-steps", "1", "--batch-size", "2", "--gradient-accumulation", "1",
    ]  # fmt: skip
    ended = CliRunner(env={"VISIONQ_DEVICE": "cpu"}).invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.stdout)["output_uri"] == f"{tmp_path}/output/checkpoint-1/"
    assert "step 1/1" in ended.stderr
    (data / "3.png").write_bytes(b"no picture")
    ended = CliRunner(env={"VISIONQ_DEVICE": "cpu"}).invoke(app, arguments)
    assert ended.exit_code == 1
    assert "metadata.jsonl:4: 3.png" in ended.stderr
