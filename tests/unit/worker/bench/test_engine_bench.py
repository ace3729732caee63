"""The engine bench on a tiny model: what its report holds, and that all modes say the same. Nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForImageTextToText, MistralConfig
from typer.testing import CliRunner

from worker.bench.baselines import collate, continuous_batching, static_batches, text_model
from worker.bench.engine import BenchOptions, bench_loaded, entry_bytes, weight_bytes
from worker.bench.engine_runs import BACK_ENDS, REUSING, TOKEN_BUDGET
from worker.bench.random_models import RANDOM_MODELS, build, idefics2
from worker.bench.report import EngineReport, ModeReport
from worker.bench.run import BenchJob, Cost, JobOutput, Run, long_job, make_jobs, percentile
from worker.cli import app
from worker.engine.step_times import StepStage
from worker.models.loader import LoadedModel

pytestmark = pytest.mark.check

OPTIONS = BenchOptions(
    num_jobs=4, new_tokens=(3, 9), concurrency=3, num_images=1, long_prompt_tokens=700, num_wide_rows=5
)
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 8,
}  # fmt: skip
PERCEIVER = {
    "hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
    "resampler_head_dim": 16, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    tiny = idefics2(MistralConfig(vocab_size=600, **TEXT), VISION, PERCEIVER, shortest_edge=24)
    return build(tiny, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def report(loaded: LoadedModel) -> EngineReport:
    return bench_loaded("tiny", loaded, OPTIONS)


def test_all_modes_answer_all_jobs_alike(report: EngineReport) -> None:
    assert [mode.name for mode in report.modes] == ["sequential", "static", *BACK_ENDS, REUSING]
    assert {mode.num_jobs for mode in report.modes} == {mode.same_texts for mode in report.modes} == {4}
    assert report.has_parity
    assert report.must_have_parity
    assert len({mode.num_tokens for mode in report.modes}) == 1
    assert 4 * 3 <= report.modes[0].num_tokens <= 4 * 9


def test_only_the_engines_modes_tell_their_steps(report: EngineReport) -> None:
    for mode in report.modes:
        is_engine = mode.name in {*BACK_ENDS, REUSING}
        assert set(mode.step_s) == (set(StepStage) if is_engine else set())
        assert (mode.num_steps > 0) is is_engine
        assert (mode.floor is not None) is is_engine


def test_times_are_told_for_every_mode(report: EngineReport) -> None:
    for mode in report.modes:
        assert 0 < mode.first_token_p50_s <= mode.first_token_p99_s <= mode.wall_s
        assert 0 < mode.gap_p50_s <= mode.gap_p99_s <= mode.wall_s
        assert mode.cpu_s > 0
        assert mode.tokens_per_s == pytest.approx(mode.num_tokens / mode.wall_s)


def test_a_long_prompt_keeps_to_the_budget_on_paged_blocks(report: EngineReport) -> None:
    by_name = {each.name: each for each in report.long_prompts}
    assert set(by_name) == set(BACK_ENDS)
    assert by_name["slots"].max_prompt_tokens_per_step == 700
    paged = by_name["paged"]
    assert 0 < paged.max_prompt_tokens_per_step < TOKEN_BUDGET
    assert paged.max_tokens_per_step <= paged.token_budget == TOKEN_BUDGET
    assert all(each.p99_gap_s > 0 and each.num_streams == 1 for each in by_name.values())


def test_a_wide_batch_is_measured_at_its_full_width(report: EngineReport) -> None:
    assert [each.name for each in report.wide_batches] == list(BACK_ENDS)
    for each in report.wide_batches:
        assert (each.num_rows, set(each.stage_s)) == (5, set(StepStage))
        assert each.num_steps > 10
        assert each.overhead_s > 0
        assert each.overhead_cpu_s > 0


def test_the_report_reads_as_text_and_as_json(report: EngineReport) -> None:
    content = json.loads(report.json())
    assert content["ratios"]["sequential"] == 1.0
    assert content["ratios"]["paged"] == pytest.approx(report.ratio("paged"))
    assert content["has_parity"] is True
    assert content["setting"]["kv_backend"] == "paged"
    assert content["key_ratios"] == pytest.approx(
        {
            "paged / sequential": report.ratio("paged"),
            "paged / static": report.ratio("paged", "static"),
            "paged / slots": report.ratio("paged", "slots"),
        }
    )
    assert content["setting"]["model"] == "tiny"
    assert content["modes"][2]["step_s"]["model"] > 0
    text = report.lines()
    assert f"from paged: paged / sequential {report.ratio('paged'):.2f}, paged / static" in text
    assert "texts of all modes agree: yes" in text
    assert all(mode.name in text for mode in report.modes)
    assert max(len(line) for line in text.splitlines()) < 200


def test_a_peer_and_a_fallback_are_told(report: EngineReport) -> None:
    peer = replace(report.modes[2], name="peer", tokens_per_s=report.modes[2].tokens_per_s / 2)
    slots = replace(report.setting, kv_backend="slots", why_not_paged="layers of type odd")
    other = replace(report, setting=slots, peer=peer)
    assert other.key_ratios()["slots / peer"] == pytest.approx(2.0)
    assert "from slots (not paged: layers of type odd): slots / sequential" in other.lines()
    assert "peer" in [line.split(" ")[0] for line in other.lines().splitlines()]


def test_a_different_text_is_found(report: EngineReport) -> None:
    cost = Cost(0.0, 1.0, 1.0, None)
    run = Run("a", {"one": JobOutput("x", 3, [0.1, 0.2, 0.5]), "two": JobOutput("y", 1, [0.4])}, cost)
    other = replace(run, name="b", answers={**run.answers, "one": JobOutput("x", 2, [0.1])})
    modes = [ModeReport.of(run, run), ModeReport.of(other, run)]
    assert [mode.same_texts for mode in modes] == [2, 1]
    assert modes[0].first_token_p99_s == 0.4
    assert modes[0].gap_p99_s == pytest.approx(0.3)
    broken = replace(report, modes=modes)
    assert not broken.has_parity


def test_jobs_come_from_their_seed(loaded: LoadedModel) -> None:
    first, again, other = (make_jobs(loaded, 3, (1, 50), 2, seed) for seed in (0, 0, 1))

    def same(one: BenchJob, two: BenchJob) -> bool:
        return all(torch.equal(one.inputs.tensors[name], two.inputs.tensors[name]) for name in one.inputs.tensors)

    assert all(
        same(one, two) and one.max_new_tokens == two.max_new_tokens for one, two in zip(first, again, strict=True)
    )
    assert not torch.equal(first[0].inputs.tensors["pixel_values"], other[0].inputs.tensors["pixel_values"])
    assert first[0].inputs.tensors["pixel_values"].shape[:2] == (1, 2)
    assert long_job(loaded, 321, 2).inputs.num_prompt_tokens == 321


def test_answers_depend_on_the_picture(loaded: LoadedModel) -> None:
    job = make_jobs(loaded, 1, (12, 12), 1)[0]
    other = make_jobs(loaded, 1, (12, 12), 1, seed=5)[0].inputs.tensors["pixel_values"]
    changed = replace(
        job, job_id="changed", inputs=replace(job.inputs, tensors={**job.inputs.tensors, "pixel_values": other})
    )
    with static_batches(loaded, 1) as answering:
        answers, _ = answering([job, changed])
    assert answers[job.job_id].text != answers["changed"].text


def test_batches_are_padded_on_the_left(loaded: LoadedModel) -> None:
    jobs = sorted(make_jobs(loaded, 4, (1, 1), 1), key=lambda job: job.inputs.num_prompt_tokens)
    batch = collate(jobs, pad_token_id=0)
    width = jobs[-1].inputs.num_prompt_tokens
    padding = width - jobs[0].inputs.num_prompt_tokens
    assert padding > 0
    assert batch["input_ids"].shape == (4, width)
    assert batch["attention_mask"][0].tolist() == [0] * padding + [1] * (width - padding)
    assert torch.equal(batch["input_ids"][0, padding:], jobs[0].inputs.tensors["input_ids"][0])
    assert batch["pixel_values"].shape[0] == 4


def test_pixels_of_different_sizes_are_no_batch(loaded: LoadedModel) -> None:
    jobs = [*make_jobs(loaded, 1, (1, 1), 1), *make_jobs(loaded, 1, (1, 1), 2)]
    with pytest.raises(ValueError, match="pixel_values"):
        collate(jobs, pad_token_id=0)


def test_the_floor_counts_what_a_step_reads(loaded: LoadedModel) -> None:
    hidden, inner, vocab = 64, 96, 600
    layer = 2 * hidden * hidden + 2 * hidden * (hidden // 2) + 3 * hidden * inner + 2 * hidden
    assert weight_bytes(loaded.model) == 4 * (2 * layer + hidden + vocab * hidden)
    assert entry_bytes(loaded.model) == 4 * 2 * 2 * 2 * 16


def test_the_peers_text_model_shares_the_weights(loaded: LoadedModel) -> None:
    text = text_model(loaded)
    assert {weight.device.type for weight in text.parameters()} == {"cpu"}
    ids = torch.arange(10, 20)[None]
    with torch.inference_mode():
        assert torch.equal(text(input_ids=ids).logits, loaded.model(input_ids=ids).logits)


def test_the_peer_answers_alike_and_leaves_the_model_as_it_was(loaded: LoadedModel) -> None:
    jobs = make_jobs(loaded, 2, (3, 6), num_images=0)
    with continuous_batching(loaded) as answering:
        peer, _ = answering(jobs)
    with static_batches(loaded, 1) as answering:
        alone, _ = answering(jobs)
    assert {name: answer.text for name, answer in peer.items()} == {name: a.text for name, a in alone.items()}
    assert [len(peer[job.job_id].token_times) for job in jobs] == [job.max_new_tokens for job in jobs]


def test_percentiles_are_nearest_ranks() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0], percent) for percent in (0, 25, 50, 99, 100)] == [1.0, 1.0, 2.0, 4.0, 4.0]
    assert percentile([], 50) == 0.0


def test_true_sizes_are_those_of_published_models() -> None:
    """Weights of the whole model, counted without memory."""
    counts = {}
    for name, make in RANDOM_MODELS.items():
        with init_empty_weights():
            model = AutoModelForImageTextToText.from_config(make().config)
        model.tie_weights()
        counts[name] = sum(weight.numel() for weight in model.parameters())
    assert counts["idefics2-8b-random"] == pytest.approx(8.40e9, rel=0.01)
    assert counts["llava-0.5b-random"] == pytest.approx(0.494e9 + 0.40e9, rel=0.01)
    assert counts["idefics2-512x8-random"] < 5e7


def test_a_report_can_be_drawn(report: EngineReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from worker.bench.plot import plot

    plot(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_the_processors_of_true_sizes_fit_models_of_their_shape(name: str) -> None:
    """The same vision grid and token counts, narrow and with one layer each."""
    architecture = RANDOM_MODELS[name]()
    config = architecture.config
    for part in (config.text_config, config.vision_config):
        for size in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            setattr(part, size, 1 if size == "num_hidden_layers" else 64)
        part.num_attention_heads = 4
    config.text_config.num_key_value_heads, config.text_config.head_dim = 2, 16
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:1]
    if hasattr(config, "perceiver_config"):
        config.perceiver_config.hidden_size, config.perceiver_config.resampler_depth = 64, 1
    loaded = build(architecture, torch.device("cpu"), torch.float32)
    jobs = make_jobs(loaded, 2, (2, 3), num_images=1)
    with static_batches(loaded, 2) as answering:
        answers, _ = answering(jobs)
    assert [answers[job.job_id].num_tokens for job in jobs] == [job.max_new_tokens for job in jobs]


def test_the_command_writes_what_it_prints(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("VISIONQ_DEVICE", "cpu")
    options = {
        "model": tiny_checkpoint("idefics2"), "jobs": 2, "max-new-tokens": 3, "concurrency": 2, "threads": 1,
        "long-prompt": 0, "rows": 0, "json": tmp_path / "engine.json", "plot": tmp_path / "engine.png",
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in options.items()]
    result = CliRunner().invoke(app, ["bench", "engine", *arguments])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "engine.json").read_text())
    assert f"paged / slots {content['key_ratios']['paged / slots']:.2f}" in result.output
    assert (tmp_path / "engine.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", ["", "-", "9-8", "0-3", "a-b", "-3", "1.5"])
def test_a_range_that_is_none_is_refused(wrong: str) -> None:
    result = CliRunner().invoke(app, ["bench", "engine", "--max-new-tokens", wrong])
    assert result.exit_code == 2
    assert "--max-new-tokens" in result.output
