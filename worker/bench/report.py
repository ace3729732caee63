"""What the engine bench found, as figures, as text and as JSON. Plain values only; nothing here measures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from worker.bench.engine_runs import LongPrompt, WideBatch, mean_stages
from worker.bench.run import Run, percentile
from worker.engine.step_times import StepStage

SEQUENTIAL: Final = "sequential"
STATIC: Final = "static"


@dataclass(frozen=True, slots=True)
class ModeReport:
    """Figures of one run. step_s: mean seconds of each stage of an engine's steps. floor: see `floor_fraction`.

    same_texts: jobs whose text and number of tokens are those of sequential `generate`.
    """

    name: str
    num_jobs: int
    num_tokens: int
    wall_s: float
    cpu_s: float
    tokens_per_s: float
    jobs_per_s: float
    first_token_p50_s: float
    first_token_p99_s: float
    gap_p50_s: float
    gap_p99_s: float
    peak_bytes: int | None
    same_texts: int
    num_steps: int
    step_s: Mapping[StepStage, float]
    floor: float | None

    @staticmethod
    def of(run: Run, baseline: Run, floor: float | None = None) -> ModeReport:
        """Sum a run up beside the baseline that answered the same jobs."""
        same = [
            (answer.text, answer.num_tokens) == (baseline.answers[job_id].text, baseline.answers[job_id].num_tokens)
            for job_id, answer in run.answers.items()
        ]
        return ModeReport(
            name=run.name,
            num_jobs=len(run.answers),
            num_tokens=run.num_tokens,
            wall_s=run.cost.wall_s,
            cpu_s=run.cost.cpu_s,
            tokens_per_s=run.tokens_per_s,
            jobs_per_s=len(run.answers) / run.cost.wall_s,
            first_token_p50_s=percentile(run.first_token_s, 50),
            first_token_p99_s=percentile(run.first_token_s, 99),
            gap_p50_s=percentile(run.gaps_s, 50),
            gap_p99_s=percentile(run.gaps_s, 99),
            peak_bytes=run.cost.peak_bytes,
            same_texts=sum(same),
            num_steps=len(run.steps),
            step_s=mean_stages(run.steps) if run.steps else {},
            floor=floor,
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """What was measured, and on what. load: running processes when it began, mean of a minute (uptime(1)).

    kv_backend: what a worker takes for this model by itself. why_not_paged: see `Engine`.
    On a busy machine more than one thread makes every kernel wait for a core, and modes with more kernels per token,
    sequential `generate` first, lose more than they would alone.
    """

    model: str
    device: str
    dtype: str
    threads: int
    load: float
    num_cpus: int
    num_jobs: int
    concurrency: int
    new_tokens: tuple[int, int]
    num_images: int
    num_prompt_tokens: float
    copy_bandwidth: float | None
    kv_backend: str
    why_not_paged: str | None


@dataclass(frozen=True, slots=True)
class EngineReport:
    """The bench's result; `modes` begins with sequential `generate`."""

    setting: Setting
    modes: Sequence[ModeReport]
    long_prompts: Sequence[LongPrompt]
    wide_batches: Sequence[WideBatch]
    peer: ModeReport | None = None

    @property
    def has_parity(self) -> bool:
        """Whether every mode gave every job the text of sequential `generate`."""
        return all(mode.same_texts == mode.num_jobs for mode in self.modes)

    @property
    def must_have_parity(self) -> bool:
        """Only float32 says enough to tell near ties apart whatever the batch."""
        return self.setting.dtype == "float32"

    def ratio(self, name: str, base: str = SEQUENTIAL) -> float:
        """Return tokens per second of a mode over those of another."""
        speeds = {mode.name: mode.tokens_per_s for mode in self.modes}
        return speeds[name] / speeds[base]

    def key_ratios(self) -> Mapping[str, float]:
        """Return the ratios of tokens per second that the engine is judged by."""
        own = self.setting.kv_backend
        found = {f"{own} / {base}": self.ratio(own, base) for base in (SEQUENTIAL, STATIC)}
        found["paged / slots"] = self.ratio("paged", "slots")
        if self.peer is not None:
            speeds = {mode.name: mode.tokens_per_s for mode in self.modes}
            found[f"{own} / {self.peer.name}"] = speeds[own] / self.peer.tokens_per_s
        return found

    def json(self) -> str:
        """Return everything, with the ratios to sequential and those that the engine is judged by, as JSON."""
        ratios = {mode.name: self.ratio(mode.name) for mode in self.modes}
        content = asdict(self) | {"ratios": ratios, "key_ratios": self.key_ratios(), "has_parity": self.has_parity}
        return json.dumps(content, indent=2)

    def lines(self) -> str:
        """Return the report as tables."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        setting = self.setting
        yield (
            f"{setting.model} on {setting.device}, {setting.dtype}, {setting.threads} CPU threads, "
            f"load {setting.load:.1f} on {setting.num_cpus} CPUs"
        )
        low, high = setting.new_tokens
        yield (
            f"{setting.num_jobs} jobs, {setting.num_images} images and {setting.num_prompt_tokens:.0f} prompt tokens "
            f"each, {low}-{high} new tokens, {setting.concurrency} at once"
        )
        yield ""
        yield (
            f"{'mode':<12} {'tokens/s':>9} {'ratio':>6} {'/static':>7} {'jobs/s':>7} {'CPU s':>6} "
            f"{'first p50':>9} {'p99':>7} {'gap p50':>8} {'p99':>7} {'peak MiB':>9} {'same texts':>11}"
        )
        yield from (self._mode_line(mode) for mode in [*self.modes, *([self.peer] if self.peer else [])])
        yield ""
        reason = "" if setting.why_not_paged is None else f" (not paged: {setting.why_not_paged})"
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in self.key_ratios().items())
        yield f"a worker serves this model from {setting.kv_backend}{reason}: {ratios}"
        yield from self._step_lines()
        yield from _long_lines(self.long_prompts)
        yield from _wide_lines(self.wide_batches)
        yield ""
        yield f"texts of all modes agree: {'yes' if self.has_parity else 'NO'}"

    def _mode_line(self, mode: ModeReport) -> str:
        base = {each.name: each.tokens_per_s for each in self.modes}
        peak = "-" if mode.peak_bytes is None else f"{mode.peak_bytes / 2**20:.0f}"
        return (
            f"{mode.name:<12} {mode.tokens_per_s:9.1f} {mode.tokens_per_s / base[SEQUENTIAL]:6.2f} "
            f"{mode.tokens_per_s / base[STATIC]:7.2f} {mode.jobs_per_s:7.2f} {mode.cpu_s:6.1f} "
            f"{mode.first_token_p50_s:7.2f} s {mode.first_token_p99_s:5.2f} s {mode.gap_p50_s * 1e3:5.0f} ms "
            f"{mode.gap_p99_s * 1e3:4.0f} ms {peak:>9} {mode.same_texts:>5} of {mode.num_jobs}"
        )

    def _step_lines(self) -> Iterator[str]:
        with_steps = [mode for mode in self.modes if mode.step_s]
        if with_steps:
            yield ""
            yield (
                f"{'ms per step':<12} "
                + " ".join(f"{stage:>10}" for stage in StepStage)
                + f" {'steps':>6} {'of floor':>9}"
            )
        for mode in with_steps:
            stages = " ".join(f"{mode.step_s[stage] * 1e3:10.3f}" for stage in StepStage)
            floor = "-" if mode.floor is None else f"{mode.floor:.2f}"
            yield f"{mode.name:<12} {stages} {mode.num_steps:6} {floor:>9}"


def _long_lines(found: Sequence[LongPrompt]) -> Iterator[str]:
    for each in found:
        yield ""
        yield (
            f"{each.name}: a prompt of {each.num_prompt_tokens} tokens arrives among {each.num_streams} streams: at "
            f"most {each.max_prompt_tokens_per_step} of its tokens per step, {each.max_tokens_per_step} with the "
            f"streams' (budget {each.token_budget})"
        )
        yield (
            f"  streams' gap p99 {each.p99_gap_s * 1e3:.0f} ms, median step with a full piece "
            f"{each.median_step_s * 1e3:.0f} ms, ratio {each.gap_ratio:.2f}; median step without "
            f"{each.decode_step_s * 1e3:.0f} ms"
        )


def _wide_lines(found: Sequence[WideBatch]) -> Iterator[str]:
    for each in found:
        stages = ", ".join(f"{stage} {seconds * 1e3:.3f}" for stage, seconds in each.stage_s.items())
        yield ""
        yield (
            f"{each.name}: {each.num_rows} rows, {each.num_steps} steps: schedule + detokenise + hand-over "
            f"{each.overhead_s * 1e3:.3f} ms per step, {each.overhead_cpu_s * 1e3:.3f} ms of CPU"
        )
        yield f"  median ms: {stages}"
