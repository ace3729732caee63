"""Further families that need torchvision: whatever is asked, every answer is the one that `generate` gives alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny.families import save
from tests.tiny.more_families import MORE_VISION_FAMILIES, qwen3_5
from tests.unit.worker.engine.crowds import (
    MAX_MODEL_LEN,
    check_crowd,
    check_pictures_matter,
    check_prompts,
    check_sent_back,
    check_vision_cache,
    generate,
    jobs_of,
    prepare,
    prompts_of,
    upstream_form,
)
from tests.unit.worker.engine.test_handed import check_handed
from tests.unit.worker.engine.test_parity import BACKENDS
from tests.unit.worker.prompting.conversations import IMAGE, VIDEO, clip, image, user
from worker.engine.runner.build import build_runner
from worker.errors import CannotStart
from worker.models.loader import LoadedModel, load
from worker.prompting.prepare import PromptBuilder, trial_prompts
from worker.settings import WorkerSettings

NUM_JOBS = 12

Builders = Callable[[str], PromptBuilder]
Loaded = Callable[[str], LoadedModel]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MORE_VISION_FAMILIES)
def test_every_one_of_12_mixed_jobs_equals_sequential_generate(
    name: str, backend: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    loaded = loaded_family(name)
    jobs = jobs_of(loaded, builder_of(name), NUM_JOBS)
    assert len({tuple(job.expected[:6]) for job in jobs}) > NUM_JOBS // 2
    runner, _ = check_crowd(loaded, jobs, BACKENDS[backend], runs_ahead=backend == "paged-ahead")
    assert runner.kv_backend == ("slots" if backend == "slots" else "paged")


@pytest.mark.parametrize("name", MORE_VISION_FAMILIES)
def test_requests_that_are_sent_back_go_on_where_they_were(
    name: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    num_preempted = check_sent_back(loaded_family(name), builder_of(name))
    assert num_preempted >= 1


@pytest.mark.parametrize("backend", ["paged", "slots"])
@pytest.mark.parametrize("name", MORE_VISION_FAMILIES)
def test_pictures_that_were_seen_before_are_answered_as_generate_does(
    name: str, backend: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    check_vision_cache(loaded_family(name), builder_of(name), BACKENDS[backend], NUM_JOBS // 2)


@pytest.mark.parametrize("backend", ["paged", "slots"])
@pytest.mark.parametrize("name", MORE_VISION_FAMILIES)
def test_the_engine_hands_a_model_what_generate_hands_it(
    name: str, backend: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    loaded = loaded_family(name)
    prompts = prompts_of(loaded, builder_of(name), NUM_JOBS)[:7]
    check_handed(loaded.model, prompts, BACKENDS[backend], MAX_MODEL_LEN)


@pytest.mark.parametrize("name", MORE_VISION_FAMILIES)
def test_another_picture_or_order_changes_the_logits(name: str, loaded_family: Loaded, builder_of: Builders) -> None:
    """Guards the other tests: a model that ignored its pictures would pass them."""
    check_pictures_matter(loaded_family(name), builder_of(name))


@pytest.mark.parametrize("name", MORE_VISION_FAMILIES)
def test_prompts_are_what_the_familys_own_chat_path_makes_of_them(
    name: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    check_prompts(loaded_family(name), builder_of(name))


def test_a_clip_beside_a_picture_is_shown_as_frames_where_both_stand_for_one_token(
    loaded_family: Loaded, builder_of: Builders
) -> None:
    """GLM-4V's own `generate` fails on a prompt with both."""
    loaded, builder = loaded_family("glm4v"), builder_of("glm4v")
    for parts, media, form in (
        ((VIDEO,), (clip(1, 4),), "whole"),
        ((VIDEO, VIDEO), (clip(1, 4), clip(2, 3)), "whole"),
        ((IMAGE, VIDEO), (image(1), clip(1, 4)), "as frames"),
    ):
        turns = (user(*parts, "What is this?"),)
        inputs = prepare(builder, turns, media)
        assert upstream_form(loaded, inputs, turns, media) == form
        assert generate(loaded, inputs, 2)


@pytest.mark.parametrize("backend", ["paged", "slots"])
def test_a_family_whose_layers_keep_another_state_than_keys_and_values_is_refused(backend: str, tmp_path: Path) -> None:
    loaded = load(WorkerSettings(model=str(save(qwen3_5, tmp_path))))
    trials = trial_prompts(PromptBuilder(loaded), loaded.capabilities)
    with pytest.raises(CannotStart, match="Qwen3_5ForConditionalGeneration cannot be served here"):
        build_runner(loaded.model, 4, MAX_MODEL_LEN, BACKENDS[backend], trials=trials)
