"""What adapters cost the engine: `python -m tests.adapter_cost`, by hand.

The shipped model, 24 jobs with pictures at once, greedy, answers of 48 tokens. In turn: an engine without adapters, one
with three of rank 8 whose jobs use none, and the same with jobs of all three and of the base.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from PIL import Image

from api_stub.contract.job import VqaJob
from api_stub.contract.sampling import SamplingParams
from tests.tiny.adapters import with_noisy_adapters
from worker.bootstrap import engine_config, prompt_builder
from worker.engine.engine import Engine
from worker.engine.request import GenerationRequest
from worker.media.types import DecodedImage
from worker.models.loader import load
from worker.settings import WorkerSettings

OWNERS: Final = ("", "one", "two", "three")
NUM_JOBS: Final = 24
NUM_TOKENS: Final = 48
NUM_ROUNDS: Final = 9
TARGETS: Final = r".*text_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def write_adapters(folder: Path) -> str:
    """Write three adapters of noise; return the setting that names them."""
    ranks = dict.fromkeys(OWNERS[1:], 8)
    peft = with_noisy_adapters(load(WorkerSettings()).model, ranks, targets=TARGETS, std=0.05, base="demo")
    peft.save_pretrained(folder, save_embedding_layers=False)
    return ",".join(f"{name}={folder / name}" for name in OWNERS[1:])


def main() -> None:
    """Measure, print."""
    with TemporaryDirectory() as directory:
        adapters = write_adapters(Path(directory))
        engines = {
            name: start(WorkerSettings(max_num_seqs=NUM_JOBS, torch_threads=1, adapters=given))
            for name, given in (("without", ""), ("with", adapters))
        }
    kinds = {"without adapters": ("without", False), "unused": ("with", False), "three and the base": ("with", True)}
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(NUM_ROUNDS + 1):
        for kind, (engine, is_mixed) in kinds.items():
            seconds = ask(*engines[engine], number, is_mixed=is_mixed)
            if number:
                took[kind].append(seconds)
    base = statistics.median(took["without adapters"])
    for kind, seconds_of in took.items():
        middle = statistics.median(seconds_of)
        sys.stdout.write(f"{kind:<20} {middle:.3f} s, {middle / base:.2f} times\n")
    for engine, _ in engines.values():
        engine.stop(10)


Started = tuple[Engine, list[GenerationRequest]]


def start(settings: WorkerSettings) -> Started:
    """Start an engine; return it with its prompts."""
    loaded = load(settings)
    prompts = prompt_builder(settings, loaded)
    job = VqaJob(media=("s3://media/scene.png",), question="Describe everything that is to be seen.")
    pictures = [Image.effect_noise((96, 96), 40 + number).convert("RGB") for number in range(NUM_JOBS)]
    sampling = SamplingParams(max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, seed=0)
    requests = [
        GenerationRequest(str(number), prompts.prepare(prompts.turns(job), [DecodedImage(picture)]), sampling)
        for number, picture in enumerate(pictures)
    ]
    engine = Engine(loaded.model, loaded.tokenizer, engine_config(settings, loaded))
    engine.start()
    return engine, requests


def ask(engine: Engine, requests: list[GenerationRequest], number: int, *, is_mixed: bool) -> float:
    """Ask all prompts at once; return the seconds until all are answered."""
    asked = [
        GenerationRequest(
            f"{number}-{is_mixed}-{each.request_id}", each.inputs, each.sampling, OWNERS[i % 4] if is_mixed else ""
        )
        for i, each in enumerate(requests)
    ]
    began = time.perf_counter()
    for _ in engine.generate(asked, 600):
        pass
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
