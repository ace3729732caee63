"""What the settings make of the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from worker.bootstrap import engine_config
from worker.engine.config import PagedConfig
from worker.errors import CannotStart
from worker.models.loader import LoadedModel, load
from worker.settings import WorkerSettings

BLOCKS = PagedConfig(block_size=32, num_blocks=99, memory_fraction=0.5)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Callable[[str], Path]) -> LoadedModel:
    return load(WorkerSettings(model=str(tiny_checkpoint("idefics2")), device="cpu"))


@pytest.mark.parametrize(("value", "paged"), [(None, BLOCKS), ("auto", BLOCKS), ("slots", None), ("paged", BLOCKS)])
def test_the_kv_back_end_is_chosen_by_a_variable(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, value: str | None, paged: PagedConfig | None
) -> None:
    if value is not None:
        monkeypatch.setenv("VISIONQ_KV", value)
    monkeypatch.setenv("VISIONQ_KV_BLOCK_SIZE", "32")
    monkeypatch.setenv("VISIONQ_KV_BLOCKS", "99")
    monkeypatch.setenv("VISIONQ_KV_MEMORY_FRACTION", "0.5")
    assert engine_config(WorkerSettings(), loaded).paged == paged


@pytest.mark.parametrize(("value", "choice"), [("auto", None), ("on", True), ("off", False)])
def test_what_a_gpu_does_can_be_chosen(loaded: LoadedModel, value: str, choice: bool | None) -> None:
    settings = WorkerSettings.model_validate(dict.fromkeys(("cuda_graphs", "run_ahead"), value))
    config = engine_config(settings, loaded)
    assert config.runs_ahead is choice
    assert config.paged is not None
    assert config.paged.records is choice


@pytest.mark.parametrize(("value", "tries"), [("auto", True), ("flash_attention_2", True), ("sdpa", False)])
def test_sdpa_is_taken_at_its_word(loaded: LoadedModel, value: str, tries: bool) -> None:
    paged = engine_config(WorkerSettings.model_validate({"attention": value}), loaded).paged
    assert paged is not None
    assert paged.tries_kernels is tries


def test_the_token_budget_leaves_room_for_prompts(loaded: LoadedModel) -> None:
    assert engine_config(WorkerSettings(), loaded).max_num_batched_tokens == 512
    assert engine_config(WorkerSettings(max_num_seqs=300), loaded).max_num_batched_tokens == 600
    assert engine_config(WorkerSettings(max_num_batched_tokens=17), loaded).max_num_batched_tokens == 17
    with pytest.raises(CannotStart, match=r"VISIONQ_MAX_NUM_BATCHED_TOKENS: 16 .*VISIONQ_MAX_NUM_SEQS=16"):
        engine_config(WorkerSettings(max_num_batched_tokens=16), loaded)
