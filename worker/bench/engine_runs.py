"""Runs the worker's engine on bench jobs, and the two situations it was built for: a long prompt that arrives among
streams, and many rows at once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Final

from api_stub.contract.sampling import SamplingParams
from worker.bench.run import Answering, BenchJob, JobOutput, long_job, percentile
from worker.engine.config import EngineConfig, PagedConfig
from worker.engine.engine import Engine
from worker.engine.request import Ended, GenerationRequest, RequestOutput
from worker.engine.step_times import Step, StepStage, StepTimes
from worker.models.loader import LoadedModel

#: KV back ends by name, as the engine is told about them. Nothing is kept of one job for another, as by `generate`.
BACK_ENDS: Final[Mapping[str, PagedConfig | None]] = {"slots": None, "paged": PagedConfig(reuses_prefixes=False)}
#: The same as a worker runs it, which keeps what it can.
REUSING: Final = "paged-reuse"
#: For all jobs of one run.
TIMEOUT_S: Final = 3600.0
#: Tokens of a request of the engine that is only asked for its back end.
PROBE_LENGTH: Final = 64
#: Tokens fed in one step, prompts and streams together.
TOKEN_BUDGET: Final = 512
#: Tokens that each stream has got when the long prompt arrives, and what it wants in all.
TOKENS_BEFORE, STREAM_TOKENS = 8, 96
#: What a step does beside the model's and the sampler's work.
OVERHEAD: Final = (StepStage.SCHEDULE, StepStage.DETOKENISE, StepStage.HAND_OVER)


@contextmanager
def serving(
    loaded: LoadedModel, back_end: PagedConfig | None, num_seqs: int, jobs: Sequence[BenchJob]
) -> Iterator[Answering]:
    """JobOutput all jobs that come, `num_seqs` at a time, in an engine sized for `jobs`."""
    with _running(loaded, _config(back_end, num_seqs, jobs)) as (running, times):
        yield partial(_serve, running, times)


def automatic_back_end(loaded: LoadedModel) -> tuple[str, str | None]:
    """Return the KV back end that a worker takes for a model unless told otherwise, and why not paged if so."""
    engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(1, PROBE_LENGTH, paged=PagedConfig()))
    engine.stop(TIMEOUT_S)
    return engine.kv_backend, engine.why_not_paged


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """What streams notice of a long prompt that arrives among them.

    median_step_s: of the steps that read a full piece of it. decode_step_s: of steps without prompts, median.
    p99_gap_s: between pieces of the other streams' answers while it was read.
    """

    name: str
    num_prompt_tokens: int
    num_streams: int
    token_budget: int
    max_prompt_tokens_per_step: int
    max_tokens_per_step: int
    median_step_s: float
    decode_step_s: float
    p99_gap_s: float

    @property
    def gap_ratio(self) -> float:
        """How much longer than an ordinary step of that size the streams wait, at the worst."""
        return self.p99_gap_s / self.median_step_s


def long_prompt(
    loaded: LoadedModel, name: str, back_end: PagedConfig | None, streams: Sequence[BenchJob], num_tokens: int
) -> LongPrompt:
    """Let a prompt of `num_tokens` tokens arrive when every stream has its first tokens."""
    streams = [BenchJob(job.job_id, job.inputs, STREAM_TOKENS) for job in streams]
    late = long_job(loaded, num_tokens, max_new_tokens=2)
    config = _config(back_end, len(streams) + 1, [*streams, late])
    answers: dict[str, JobOutput] = {}
    with _running(loaded, config) as (running, times):
        outputs = running.generate([_request(job) for job in streams], TIMEOUT_S)
        young = {job.job_id for job in streams}
        while young:
            output = _add(next(outputs), answers)
            if output.finish is not None or answers[output.request_id].num_tokens >= TOKENS_BEFORE:
                young.discard(output.request_id)
        arrived_at = time.perf_counter()
        late_outputs = running.generate([_request(late)], TIMEOUT_S)
        for output in chain(outputs, late_outputs):
            _add(output, answers)
    reading = [step for step in times.steps if step.num_prompt_tokens and step.at_s + step.total_s > arrived_at]
    decoding = [step.total_s for step in times.steps if step.num_streams and not step.num_prompt_tokens]
    largest = max(step.num_prompt_tokens for step in reading)
    seen = [gap for job in streams for gap in _gaps_during(answers[job.job_id].token_times, reading)]
    return LongPrompt(
        name=name,
        num_prompt_tokens=late.inputs.num_prompt_tokens,
        num_streams=len(streams),
        token_budget=config.max_num_batched_tokens,
        max_prompt_tokens_per_step=largest,
        max_tokens_per_step=max(step.num_prompt_tokens + step.num_streams for step in reading),
        median_step_s=statistics.median(step.total_s for step in reading if step.num_prompt_tokens == largest),
        decode_step_s=statistics.median(decoding) if decoding else 0.0,
        p99_gap_s=percentile(seen, 99),
    )


@dataclass(frozen=True, slots=True)
class WideBatch:
    """Median seconds of the stages of a step that feeds `num_rows` streams and nothing else.

    overhead_s: scheduling, detokenising and handing over, all but model and sampler; the median step's. overhead_cpu_s:
        the same as the engine thread computed, without waiting for a core or for Python's lock.
    """

    name: str
    num_rows: int
    num_steps: int
    stage_s: Mapping[StepStage, float]
    overhead_s: float
    overhead_cpu_s: float


def wide_batch(loaded: LoadedModel, name: str, back_end: PagedConfig | None, jobs: Sequence[BenchJob]) -> WideBatch:
    """Serve all jobs together and look at the steps that they are all in."""
    with serving(loaded, back_end, len(jobs), jobs) as answering:
        _, steps = answering(jobs)
    full = [step for step in steps if step.num_streams == len(jobs) and not step.num_prompt_tokens]
    stages = {stage: statistics.median(step.stage_s[stage] for step in full) for stage in StepStage}
    overhead_s = statistics.median(sum(step.stage_s[stage] for stage in OVERHEAD) for step in full)
    overhead_cpu_s = statistics.median(sum(step.cpu_s[stage] for stage in OVERHEAD) for step in full)
    return WideBatch(name, len(jobs), len(full), stages, overhead_s, overhead_cpu_s)


def mean_stages(steps: Sequence[Step]) -> Mapping[StepStage, float]:
    """Return the mean seconds of each stage, 0 without steps."""
    return {stage: sum(step.stage_s.get(stage, 0.0) for step in steps) / max(len(steps), 1) for stage in StepStage}


def _serve(
    running: Engine, times: StepTimes, jobs: Sequence[BenchJob]
) -> tuple[Mapping[str, JobOutput], Sequence[Step]]:
    answers: dict[str, JobOutput] = {}
    num_before = len(times.steps)
    for output in running.generate([_request(job) for job in jobs], TIMEOUT_S):
        _add(output, answers)
    return answers, times.steps[num_before:]


def _add(output: RequestOutput, answers: dict[str, JobOutput]) -> RequestOutput:
    """Add an output that has just come to its job's answer; return it. Raises RuntimeError for a job that failed."""
    answer = answers.setdefault(output.request_id, JobOutput())
    answer.text += output.text
    answer.num_tokens += output.num_tokens
    if output.num_tokens or output.is_first:
        answer.token_times.append(time.perf_counter())
    if output.finish is not None and isinstance(output.finish.reason, Ended):
        raise RuntimeError(f"{output.request_id} {output.finish.reason}: {output.finish.error}")
    return output


@contextmanager
def _running(loaded: LoadedModel, config: EngineConfig) -> Iterator[tuple[Engine, StepTimes]]:
    times = StepTimes()
    running = Engine(loaded.model, loaded.tokenizer, config, clock=times)
    running.start()
    try:
        yield running, times
    finally:
        running.stop(TIMEOUT_S)


def _config(back_end: PagedConfig | None, num_seqs: int, jobs: Sequence[BenchJob]) -> EngineConfig:
    return EngineConfig(
        max_num_seqs=num_seqs,
        max_model_len=max(job.inputs.num_prompt_tokens + job.max_new_tokens for job in jobs),
        max_num_batched_tokens=max(TOKEN_BUDGET, 2 * num_seqs),
        paged=back_end,
    )


def _request(job: BenchJob) -> GenerationRequest:
    return GenerationRequest(job.job_id, job.inputs, SamplingParams(max_new_tokens=job.max_new_tokens, seed=0))


def _gaps_during(times: Sequence[float], steps: Sequence[Step]) -> list[float]:
    """Return the gaps that these steps, which follow one another, are part of."""
    pairs = [(earlier, later) for earlier, later in pairwise(times) if later > steps[0].at_s]
    return [later - earlier for earlier, later in pairs if earlier < steps[-1].at_s]
