"""What transformers does without us: `generate` job by job, and `generate` over left-padded batches.

A static batch lasts as long as its longest answer; tokens that a job did not ask for are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name
from transformers.generation.streamers import BaseStreamer

from worker.bench.run import Answer, Answering, BenchJob
from worker.engine.step_times import Step
from worker.models.generation_defaults import eos_token_ids
from worker.models.loader import LoadedModel


@contextmanager
def static_batches(loaded: LoadedModel, size: int) -> Iterator[Answering]:
    """Answer `size` jobs at a time, the next ones when all of them are done; 1 is sequential `generate`."""
    yield partial(_generate_in_batches, loaded, size)


def _generate_in_batches(
    loaded: LoadedModel, size: int, jobs: Sequence[BenchJob]
) -> tuple[Mapping[str, Answer], Sequence[Step]]:
    answers: dict[str, Answer] = {}
    for start in range(0, len(jobs), size):
        answers |= _generate(loaded, jobs[start : start + size])
    return answers, ()


class _Stamps(BaseStreamer):  # type: ignore[misc]
    """Notes when each step's tokens are there; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is kept back."""


@torch.inference_mode()
def _generate(loaded: LoadedModel, jobs: Sequence[BenchJob]) -> Mapping[str, Answer]:
    pad = loaded.tokenizer.pad_token_id or 0
    tensors = {name: value.to(loaded.device) for name, value in collate(jobs, pad).items()}
    stamps = _Stamps()
    ids: Any = loaded.model.generate(
        **tensors,
        do_sample=False,
        max_new_tokens=max(job.max_new_tokens for job in jobs),
        pad_token_id=pad,
        streamer=stamps,
    )
    new_ids = ids[:, tensors["input_ids"].shape[1] :].tolist()
    ends = frozenset(eos_token_ids(loaded.model, loaded.tokenizer))
    return {
        job.job_id: _answer(loaded, _cut(row, job.max_new_tokens, ends), stamps.times[1:])
        for job, row in zip(jobs, new_ids, strict=True)
    }


def _answer(loaded: LoadedModel, ids: Sequence[int], times: Sequence[float]) -> Answer:
    text: str = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    return Answer(text.lstrip(), len(ids), list(times[: len(ids)]))


def _cut(ids: Sequence[int], max_new_tokens: int, ends: frozenset[int]) -> Sequence[int]:
    """Return an answer's own tokens, its end token included."""
    ids = ids[:max_new_tokens]
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)


def collate(jobs: Sequence[BenchJob], pad_token_id: int) -> dict[str, Tensor]:
    """Return one batch: what is as long as its prompt is padded on the left, pixels are laid one behind the other.

    Raises ValueError when pixels of different sizes would have to be padded.
    """
    width = max(job.inputs.num_prompt_tokens for job in jobs)
    batch: dict[str, Tensor] = {}
    for name in jobs[0].inputs.tensors:
        rows = [job.inputs.tensors[name] for job in jobs]
        if all(row.shape == job.inputs.tensors["input_ids"].shape for row, job in zip(rows, jobs, strict=True)):
            filling = pad_token_id if name == "input_ids" else 0
            rows = [F.pad(row, (width - row.shape[1], 0), value=filling) for row in rows]
        if len({row.shape[1:] for row in rows}) > 1:
            raise ValueError(f"{name} of different sizes cannot be one batch: {sorted({row.shape for row in rows})}")
        batch[name] = torch.cat(rows)
    return batch
