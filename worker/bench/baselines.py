"""What transformers does without us: `generate` job by job, over left-padded batches, and its continuous batching.

A static batch lasts as long as its longest answer; tokens that a job did not ask for are not counted. Continuous
batching, the peer on a GPU, takes token ids only, so it reads the prompts' ids, image placeholders as plain tokens, and
runs no vision tower: with `--images 0` both do the same work. Tried on a CPU with transformers 5.23; not yet on a GPU.
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
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from worker.bench.run import Answering, BenchJob, JobOutput
from worker.engine.step_times import Step
from worker.models.generation_defaults import eos_token_ids
from worker.models.loader import LoadedModel


@contextmanager
def static_batches(loaded: LoadedModel, size: int) -> Iterator[Answering]:
    """JobOutput `size` jobs at a time, the next ones when all of them are done; 1 is sequential `generate`."""
    yield partial(_generate_in_batches, loaded, size)


def _generate_in_batches(
    loaded: LoadedModel, size: int, jobs: Sequence[BenchJob]
) -> tuple[Mapping[str, JobOutput], Sequence[Step]]:
    answers: dict[str, JobOutput] = {}
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
def _generate(loaded: LoadedModel, jobs: Sequence[BenchJob]) -> Mapping[str, JobOutput]:
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


def _answer(loaded: LoadedModel, ids: Sequence[int], times: Sequence[float]) -> JobOutput:
    text: str = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    return JobOutput(text.lstrip(), len(ids), list(times[: len(ids)]))


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


def can_run_peer(loaded: LoadedModel) -> bool:
    """Whether the peer is measured: on a GPU, for which it was made."""
    return loaded.device.type == "cuda"


def text_model(loaded: LoadedModel) -> PreTrainedModel:
    """Return the text model with its head as a model of its own, on the same weights."""
    model, config = loaded.model, loaded.model.config.get_text_config(decoder=True)
    with torch.device("meta"):
        text: Any = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    setattr(text, text.base_model_prefix, model.get_decoder())
    text.set_output_embeddings(model.get_output_embeddings())
    result: PreTrainedModel = text.eval()
    return result


@contextmanager
def continuous_batching(loaded: LoadedModel) -> Iterator[Answering]:
    """JobOutput jobs with `generate`'s continuous batching; what it sets up, it sets up once."""
    model: Any = text_model(loaded)
    attention = loaded.model.config.get_text_config(decoder=True)._attn_implementation
    config = GenerationConfig(
        do_sample=False,
        eos_token_id=eos_token_ids(loaded.model, loaded.tokenizer),
        pad_token_id=loaded.tokenizer.pad_token_id or 0,
    )
    try:
        with model.continuous_batching_context_manager(generation_config=config, block=True, timeout=5) as manager:
            yield partial(_peer_answer, loaded, manager)
    finally:
        # The manager leaves its paged attention on the config that both models share.
        loaded.model.set_attn_implementation({"text_config": attention})


def _peer_answer(
    loaded: LoadedModel, manager: Any, jobs: Sequence[BenchJob]
) -> tuple[Mapping[str, JobOutput], Sequence[Step]]:
    started_at = time.perf_counter()
    wanted = {
        manager.add_request(
            job.inputs.tensors["input_ids"][0].tolist(),
            max_new_tokens=job.max_new_tokens,
            record_timestamps=True,
        ): job.job_id
        for job in jobs
    }
    answers: dict[str, JobOutput] = {}
    while len(answers) < len(jobs):
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' continuous batching has ended")
        elif result.is_finished():
            ids = list(result.generated_tokens)
            text: str = loaded.tokenizer.decode(ids, skip_special_tokens=True)
            times = list(result.timestamps or [started_at])
            answers[wanted[result.request_id]] = JobOutput(text.lstrip(), len(ids), times)
    return answers, ()
