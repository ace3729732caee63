"""The jobs of the engine bench, and one way of answering them, measured: who said what and when, and what it took.

The jobs are questions about pictures of random patches, drawn from a seed; prompts are built as the worker builds them.
In: jobs. Out: a `Run`. All times are seconds of `time.perf_counter`.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Final

import numpy as np
import torch
from PIL import Image

from api_stub.contract.conversation import ImagePart, Role, TextPart, Turn
from worker.engine.step_times import Step
from worker.media.types import DecodedImage
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel
from worker.prompting.prepare import PromptBuilder

_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
_STATUS: Final = Path("/proc/self/status")

WORDS: Final = ("what", "is", "the", "colour", "of", "this", "circle", "how", "many", "red", "squares", "are", "there")
#: Width and height: one size, so that static batches can be made of any family's tensors.
PICTURE_SIZE: Final = (640, 480)


@dataclass(frozen=True, slots=True)
class BenchJob:
    """A prompt and how many tokens it wants, greedily."""

    job_id: str
    inputs: ModelInputs
    max_new_tokens: int


@dataclass(slots=True)
class JobOutput:
    """What one job got. token_times: when a reader got something new, the first token first."""

    text: str = ""
    num_tokens: int = 0
    token_times: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Cost:
    """cpu_s: of all threads. peak_bytes: of the device, on a CPU resident memory; None where nobody counts it."""

    started_at: float
    wall_s: float
    cpu_s: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Run:
    """Answers by job id in the jobs' order, the cost of all, and an engine's steps."""

    name: str
    answers: Mapping[str, JobOutput]
    cost: Cost
    steps: Sequence[Step] = ()

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers.values())

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.cost.wall_s

    @property
    def first_token_s(self) -> list[float]:
        """Seconds from the beginning, when all jobs were handed in, to each first token."""
        return [answer.token_times[0] - self.cost.started_at for answer in self.answers.values() if answer.token_times]

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between two pieces of one answer."""
        return [gap for answer in self.answers.values() for gap in gaps(answer.token_times)]


#: Answers jobs; returns the answers and, for an engine, its steps.
Answering = Callable[[Sequence[BenchJob]], tuple[Mapping[str, JobOutput], Sequence[Step]]]
#: A way of answering: sets up what a serving process would have ready, and takes it down.
Mode = Callable[[], AbstractContextManager[Answering]]


def measure(name: str, mode: Mode, jobs: Sequence[BenchJob], warm_up: Sequence[BenchJob]) -> Run:
    """JobOutput the jobs, warm, and count time and memory. `warm_up` are others, lest anything is kept of the jobs."""
    gc.collect()
    with mode() as answering, _peak_memory() as peak:
        answering(warm_up)
        cpu_s, started_at = time.process_time(), time.perf_counter()
        answers, steps = answering(jobs)
        wall_s, cpu_s = time.perf_counter() - started_at, time.process_time() - cpu_s
    ordered = {job.job_id: answers[job.job_id] for job in jobs}
    return Run(name, ordered, Cost(started_at, wall_s, cpu_s, peak()), steps)


def gaps(times: Sequence[float]) -> list[float]:
    """Return the differences between neighbours."""
    return [later - earlier for earlier, later in pairwise(times)]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a value that `percent` of the values do not exceed (nearest rank); 0 without values."""
    if not values:
        return 0.0
    rank = max(0, -int(-percent * len(values) // 100) - 1)
    return sorted(values)[rank]


@contextmanager
def _peak_memory() -> Iterator[Callable[[], int | None]]:
    """Count the peak from here on; the caller asks after the block."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
        return
    try:
        # Linux: sets the high-water mark of resident memory back (proc(5)).
        _CLEAR_REFS.write_text("5")
    except OSError:
        yield lambda: None
        return
    yield _resident_peak_bytes


def _resident_peak_bytes() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_jobs(
    loaded: LoadedModel, num_jobs: int, new_tokens: tuple[int, int], num_images: int, seed: int = 0
) -> list[BenchJob]:
    """Return jobs whose questions have 4 to 40 words and which want `new_tokens` tokens, both uniform."""
    rng = Random(seed)
    prompts = PromptBuilder(loaded)
    return [
        BenchJob(f"job-{number}", _prompt(prompts, rng, num_images), rng.randint(*new_tokens))
        for number in range(num_jobs)
    ]


def long_job(loaded: LoadedModel, num_tokens: int, max_new_tokens: int, seed: int = 1) -> BenchJob:
    """Return a job with a prompt of `num_tokens` text tokens."""
    rng = Random(seed)
    text = " ".join(rng.choice(WORDS) for _ in range(num_tokens))
    ids = torch.tensor([loaded.tokenizer.encode(text, add_special_tokens=False)[:num_tokens]])
    return BenchJob("long", ModelInputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}), max_new_tokens)


def _prompt(prompts: PromptBuilder, rng: Random, num_images: int) -> ModelInputs:
    words = [rng.choice(WORDS) for _ in range(rng.randint(4, 40))]
    pictures = [_picture(rng) for _ in range(num_images)]
    parts = [ImagePart(uri=f"s3://bench/{number}.png") for number in range(num_images)]
    turn = Turn(role=Role.USER, content=(*parts, TextPart(text=" ".join(words))))
    return prompts.prepare([turn], pictures)


def _picture(rng: Random) -> DecodedImage:
    # Few large patches: fine noise looks the same to a model that averages over it.
    patches = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return DecodedImage(Image.fromarray(patches).resize(PICTURE_SIZE, Image.Resampling.NEAREST))
