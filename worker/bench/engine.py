"""The engine beside plain transformers: the same model, the same jobs, one run.

Sequential `generate`, static batches of `generate`, and the engine on each KV back end answer the same jobs; on a GPU
also transformers' continuous batching. Texts of all modes are compared with sequential `generate`.

The floor is the least time a decode step can take, every weight of the text model and every cached key and value read
once: step ≥ (weight bytes + KV bytes) / bandwidth, with the bandwidth that this device reaches when it copies memory
(the roofline of Williams, Waterman, Patterson 2009, memory side).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from transformers import PreTrainedModel

from worker.bench.baselines import can_run_peer, continuous_batching, static_batches
from worker.bench.engine_runs import (
    BACK_ENDS,
    REUSING,
    LongPrompt,
    WideBatch,
    automatic_back_end,
    long_prompt,
    serving,
    wide_batch,
)
from worker.bench.random_models import RANDOM_MODELS, build_random
from worker.bench.report import SEQUENTIAL, STATIC, EngineReport, ModeReport, Setting
from worker.bench.run import BenchJob, Mode, Run, make_jobs, measure
from worker.engine.config import PagedConfig
from worker.engine.step_times import Step
from worker.models.loader import LoadedModel, load
from worker.settings import WorkerSettings

#: Large enough that no cache holds them.
_COPY_BYTES: Final = {"cuda": 1 << 30, "cpu": 1 << 28}
_NUM_COPIES: Final = 8


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes per second, read and written, of the fastest of some copies inside the device's memory."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(_NUM_COPIES):
        _wait(device)
        started_at = time.perf_counter()
        target.copy_(source)
        _wait(device)
        times.append(time.perf_counter() - started_at)
    return 2 * source.nbytes / min(times)


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that one decode step reads: text decoder and head; of embeddings it reads rows."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = {weight for weight in model.get_decoder().parameters() if weight is not table.weight}
    if head is not None:
        weights |= set(head.parameters())
    return sum(weight.nbytes for weight in weights)


def entry_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    config = model.config.get_text_config(decoder=True)
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * num_heads * head_dim * model.dtype.itemsize)


def floor_fraction(model: PreTrainedModel, bandwidth: float, steps: Sequence[Step]) -> float:
    """Return floor over measured time of the steps that fed streams only; 0 without any."""
    decode = [step for step in steps if step.num_streams and not step.num_prompt_tokens]
    taken_s = sum(step.total_s for step in decode)
    num_bytes = sum(weight_bytes(model) + step.num_entries * entry_bytes(model) for step in decode)
    return num_bytes / bandwidth / taken_s if taken_s else 0.0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


#: New tokens of each job that decodes in a wide batch.
WIDE_TOKENS = 24
#: Jobs that every mode answers before it is measured, their tokens and what they are drawn from.
NUM_WARM_UP, WARM_UP_TOKENS, WARM_UP_SEED = 2, 2, 1


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """new_tokens: least and most of a job, drawn uniformly. repeats: runs of each mode, taken in turns; the median one
    is told. long_prompt_tokens, num_wide_rows: sizes of the two situations, 0 leaves one out.
    """

    num_jobs: int = 16
    new_tokens: tuple[int, int] = (8, 96)
    concurrency: int = 16
    num_images: int = 1
    repeats: int = 1
    long_prompt_tokens: int = 6000
    num_wide_rows: int = 64


def bench_engine(model: str, threads: int, options: BenchOptions) -> EngineReport:
    """Load or build the model and measure. `threads` of torch, 0 leaves them. Raises CannotStart as loading does."""
    if threads:
        torch.set_num_threads(threads)
    return bench_loaded(model, load_model(model, threads), options)


def load_model(model: str, threads: int = 0) -> LoadedModel:
    """Build one of `RANDOM_MODELS`, else load what the worker would load under that name."""
    if model not in RANDOM_MODELS:
        return load(WorkerSettings(model=model, torch_threads=threads))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    return build_random(model, device, torch.bfloat16 if has_gpu else torch.float32)


def bench_loaded(name: str, loaded: LoadedModel, options: BenchOptions) -> EngineReport:
    """Measure a model that is there."""
    load_average = os.getloadavg()[0]
    jobs = make_jobs(loaded, options.num_jobs, options.new_tokens, options.num_images)
    warm_up = make_jobs(loaded, NUM_WARM_UP, (WARM_UP_TOKENS, WARM_UP_TOKENS), options.num_images, WARM_UP_SEED)
    bandwidth = copy_bandwidth(loaded.device)
    runs = _measure_in_turns(_modes(loaded, options, [*jobs, *warm_up]), jobs, warm_up, options.repeats)
    baseline = runs[0]

    def summed_up(run: Run) -> ModeReport:
        return ModeReport.of(run, baseline, floor_fraction(loaded.model, bandwidth, run.steps) if run.steps else None)

    peer = partial(continuous_batching, loaded)
    return EngineReport(
        setting=_setting(name, loaded, options, jobs, bandwidth, load_average),
        modes=[summed_up(run) for run in runs],
        long_prompts=_long_prompts(loaded, options, jobs),
        wide_batches=_wide_batches(loaded, options),
        peer=summed_up(measure("peer", peer, jobs, warm_up)) if can_run_peer(loaded) else None,
    )


def _modes(loaded: LoadedModel, options: BenchOptions, jobs: Sequence[BenchJob]) -> Mapping[str, Mode]:
    """Return the ways of answering, engines sized for `jobs`."""
    baselines: Mapping[str, Mode] = {
        SEQUENTIAL: partial(static_batches, loaded, 1),
        STATIC: partial(static_batches, loaded, options.concurrency),
    }
    engines: Mapping[str, Mode] = {
        name: partial(serving, loaded, back_end, options.concurrency, jobs)
        for name, back_end in {**BACK_ENDS, REUSING: PagedConfig()}.items()
    }
    return {**baselines, **engines}


def _measure_in_turns(
    modes: Mapping[str, Mode], jobs: Sequence[BenchJob], warm_up: Sequence[BenchJob], repeats: int
) -> list[Run]:
    """Run every mode `repeats` times, in turns, so that a busy spell hits all; return the median run of each."""
    rounds = [[measure(name, mode, jobs, warm_up) for name, mode in modes.items()] for _ in range(repeats)]
    return [sorted(runs, key=lambda run: run.cost.wall_s)[repeats // 2] for runs in zip(*rounds, strict=True)]


def _long_prompts(loaded: LoadedModel, options: BenchOptions, jobs: Sequence[BenchJob]) -> list[LongPrompt]:
    if not options.long_prompt_tokens:
        return []
    num_tokens = min(options.long_prompt_tokens, loaded.max_context - 8)
    streams = jobs[: max(1, options.concurrency // 2)]
    return [long_prompt(loaded, name, back_end, streams, num_tokens) for name, back_end in BACK_ENDS.items()]


def _wide_batches(loaded: LoadedModel, options: BenchOptions) -> list[WideBatch]:
    if not options.num_wide_rows:
        return []
    jobs = make_jobs(loaded, options.num_wide_rows, (WIDE_TOKENS, WIDE_TOKENS), num_images=0)
    return [wide_batch(loaded, name, back_end, jobs) for name, back_end in BACK_ENDS.items()]


def _setting(
    name: str,
    loaded: LoadedModel,
    options: BenchOptions,
    jobs: Sequence[BenchJob],
    bandwidth: float,
    load_average: float,
) -> Setting:
    is_gpu = loaded.device.type == "cuda"
    kv_backend, why_not_paged = automatic_back_end(loaded)
    return Setting(
        model=name,
        device=torch.cuda.get_device_name(loaded.device) if is_gpu else loaded.device.type,
        dtype=str(loaded.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        load=load_average,
        num_cpus=os.cpu_count() or 1,
        num_jobs=options.num_jobs,
        concurrency=options.concurrency,
        new_tokens=options.new_tokens,
        num_images=options.num_images,
        num_prompt_tokens=statistics.fmean(job.inputs.num_prompt_tokens for job in jobs),
        copy_bandwidth=bandwidth,
        kv_backend=kv_backend,
        why_not_paged=why_not_paged,
    )
