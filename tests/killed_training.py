"""Fine-tuning runs undisturbed, and the same runs killed three times: `python -m tests.killed_training DIRECTORY RUN…`.

A run is `PLACE:WORKERS:ACCUMULATION:KIND`: `folder` or `s3` (at AWS_ENDPOINT_URL_S3), the loader threads of the run
that is killed (the other one has none), the forwards of a step, and what learns how: `full`, `lora` with dropout, or
the same with `checkpointing` of the activations. Every attempt is a process of its own with a folder of its own, as on
another worker; they share the output alone. Prints one JSON object for each run: the weights' digests, how each attempt
ended, and the first step that each made.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from api_stub.contract.finetune import FinetuneMethod, FinetuneOptions, Finetuning
from tests.tiny.every_family import build_any
from worker.settings import WorkerSettings
from worker.training.manifest import LATEST
from worker.training.objects import FolderObjects, S3Objects, open_objects, training_client
from worker.training.progress import Progress
from worker.training.run import Places, finetune

BUCKET = "killed-training"
#: A child takes seconds, on a machine that is busy with other tests some tens of them.
HANGS_S = 120
WORDS = ("a red circle", "a pink cat", "two cats sleep", "a blue square", "one dog waits", "people in a picture")


def make_data(folder: Path, num_examples: int = 12) -> Path:
    """Noise with three captions each; several captions, so that one is drawn per epoch."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(num_examples):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(folder / f"{number}.png")
        texts = [WORDS[(number + shift) % len(WORDS)] for shift in range(3)]
        rows.append({"file_name": f"{number}.png", "texts": texts})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def make_job(base: Path, data: Path, output: str, *, workers: int, accumulation: int, kind: str = "full") -> Finetuning:
    """Eight steps of 4 examples; evaluations and checkpoints after steps 3, 6 and 8."""
    method = FinetuneMethod.FULL if kind == "full" else FinetuneMethod.LORA
    adapter = {} if kind == "full" else {"lora_rank": 4, "lora_dropout": 0.1}
    options = FinetuneOptions(
        max_steps=8, batch_size=4 // accumulation, gradient_accumulation=accumulation, learning_rate=1e-3,
        eval_every=3, eval_examples=2, max_new_tokens=4, seed=1, loader_workers=workers,
        gradient_checkpointing=kind == "checkpointing" or None, **adapter,
    )  # fmt: skip
    return Finetuning(base=str(base), dataset=str(data), output=output, method=method, options=options)


def in_child(work: Callable[[], object]) -> int:
    """Do something in a child; return the signal that ended it, 0 for none. A child that hangs shows where and ends."""
    pid = os.fork()
    if pid == 0:
        status = 1
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except Exception:  # noqa: BLE001 - whatever it is, the parent must go on
            traceback.print_exc()
        finally:
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    if os.WIFEXITED(ended) and os.WEXITSTATUS(ended):
        raise SystemExit("a child failed")
    return os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else 0


def attempt(job: Finetuning, directory: Path, kill: Callable[[], Callable[[Progress], None]]) -> tuple[int, int]:
    """Run a job in a child; return the signal that ended it and the first step that it made."""
    directory.mkdir(parents=True)
    steps = directory / "steps"

    def run() -> None:
        after_step = kill()

        def note(progress: Progress) -> None:
            with steps.open("a") as file:
                file.write(f"{progress.step}\n")
            after_step(progress)

        finetune(job, places=Places(WorkerSettings(device="cpu"), directory), progress=note)

    ended = in_child(run)
    return ended, int(steps.read_text().splitlines()[0])


def die(*_: object) -> None:
    """End this process at once, as the system's memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


def never() -> Callable[[Progress], None]:
    return lambda _: None


def after_step_5() -> Callable[[Progress], None]:
    return lambda progress: die() if progress.step == 5 else None


def during_the_upload_of_step_6() -> Callable[[Progress], None]:
    """In the middle: weights are stored, the optimizer's state is not."""
    for kind in (FolderObjects, S3Objects):
        upload = kind.upload

        def dies(self: FolderObjects, path: Path, name: str, upload: Callable[..., None] = upload) -> None:
            if name == "checkpoint-6/state/optimizer.safetensors":
                die()
            upload(self, path, name)

        kind.upload = dies  # type: ignore[method-assign,assignment]
    return never()


def before_latest_names_step_6() -> Callable[[Progress], None]:
    """The checkpoint is whole, and nothing says so but its manifest."""
    for kind in (FolderObjects, S3Objects):
        write_if = kind.write_if

        def dies(
            self: FolderObjects, name: str, content: bytes, tag: str, write_if: Callable[..., bool] = write_if
        ) -> bool:
            if name == LATEST and b"checkpoint-6" in content:
                die()
            return write_if(self, name, content, tag)

        kind.write_if = dies  # type: ignore[method-assign,assignment]
    return never()


def outcome(output: str) -> dict[str, object]:
    """What a run has left: the digest of its last weights, and its best step."""
    objects = open_objects(output, training_client(WorkerSettings()))
    manifest, latest = objects.read("checkpoint-8/manifest.json"), objects.read(LATEST)
    assert manifest is not None
    assert latest is not None
    found = json.loads(manifest[0])
    weights = "model.safetensors" if "model.safetensors" in found["files"] else "adapter_model.safetensors"
    return {
        "weights": found["files"][weights]["sha256"],
        "state": found["files"]["state/optimizer.safetensors"]["sha256"],
        "run": found["files"]["state/run.json"]["sha256"],
        "best": json.loads(latest[0])["best"],
    }


def compare(directory: Path, base: Path, data: Path, run: str) -> dict[str, object]:
    """Make a run undisturbed and killed; return what it is to print."""
    place, workers, accumulation, kind = run.split(":")
    directory.mkdir()
    outputs = [str(directory / name) for name in ("undisturbed", "killed")]
    if place == "s3":
        outputs = [f"s3://{BUCKET}/{directory.name}/{name}/" for name in ("undisturbed", "killed")]
    job, killed = (
        make_job(base, data, output, workers=num_workers, accumulation=int(accumulation), kind=kind)
        for output, num_workers in zip(outputs, (0, int(workers)), strict=True)
    )
    attempt(job, directory / "work-0", never)
    kills = (after_step_5, during_the_upload_of_step_6, before_latest_names_step_6, never)
    ends = [attempt(killed, directory / f"work-{number}", kill) for number, kill in enumerate(kills, start=1)]
    return {
        "undisturbed": outcome(outputs[0]),
        "killed": outcome(outputs[1]),
        "signals": [end[0] for end in ends],
        "first_steps": [end[1] for end in ends],
    }


def main() -> None:
    """Make all runs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    given = parser.parse_args()
    directory: Path = given.directory
    # Nothing but imports may have happened before a fork: what libraries start their threads for.
    base, data = directory / "base", make_data(directory / "data")
    in_child(lambda: build_any("git", base))
    if any(run.startswith("s3:") for run in given.runs):
        training_client(WorkerSettings()).create_bucket(Bucket=BUCKET)
    for number, run in enumerate(given.runs):
        print(json.dumps(compare(directory / f"run-{number}", base, data, run)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
