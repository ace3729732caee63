"""transformers' own continuous batching on the text model of the bench's model: the peer on a GPU.

It takes token ids only, so it reads the prompts' ids, image placeholders as plain tokens, and runs no vision tower:
with `--images 0` both do the same work. Tried on a CPU with transformers 5.23; not yet run on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from worker.bench.run import Answer, Answering, BenchJob
from worker.engine.step_times import Step
from worker.models.generation_defaults import eos_token_ids
from worker.models.loader import LoadedModel


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
    """Answer jobs with `generate`'s continuous batching; what it sets up, it sets up once."""
    model: Any = text_model(loaded)
    attention = loaded.model.config.get_text_config(decoder=True)._attn_implementation
    config = GenerationConfig(
        do_sample=False,
        eos_token_id=eos_token_ids(loaded.model, loaded.tokenizer),
        pad_token_id=loaded.tokenizer.pad_token_id or 0,
    )
    try:
        with model.continuous_batching_context_manager(generation_config=config, block=True, timeout=5) as manager:
            yield partial(_answer, loaded, manager)
    finally:
        # The manager leaves its paged attention on the config that both models share.
        loaded.model.set_attn_implementation({"text_config": attention})


def _answer(loaded: LoadedModel, manager: Any, jobs: Sequence[BenchJob]) -> tuple[Mapping[str, Answer], Sequence[Step]]:
    started_at = time.perf_counter()
    wanted = {
        manager.add_request(
            job.inputs.tensors["input_ids"][0].tolist(),
            max_new_tokens=job.max_new_tokens,
            record_timestamps=True,
        ): job.job_id
        for job in jobs
    }
    answers: dict[str, Answer] = {}
    while len(answers) < len(jobs):
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' continuous batching has ended")
        elif result.is_finished():
            ids = list(result.generated_tokens)
            text: str = loaded.tokenizer.decode(ids, skip_special_tokens=True)
            times = list(result.timestamps or [started_at])
            answers[wanted[result.request_id]] = Answer(text.lstrip(), len(ids), times)
    return answers, ()
