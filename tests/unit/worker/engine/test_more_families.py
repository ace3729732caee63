"""Further families: whatever is asked, in whatever company, every answer is the one that `generate` gives alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.tiny.kinds import each_kind
from tests.tiny.more_families import MORE_FAMILIES
from tests.unit.worker.engine.crowds import (
    MAX_MODEL_LEN,
    check_crowd,
    check_pictures_matter,
    check_prompts,
    check_sent_back,
    check_vision_cache,
    jobs_of,
    prompts_of,
)
from tests.unit.worker.engine.test_handed import check_handed
from tests.unit.worker.engine.test_parity import BACKENDS
from tests.unit.worker.prompting.conftest import builder_of, loaded_family
from worker.models.loader import LoadedModel
from worker.prompting.prepare import PromptBuilder

__all__ = ["builder_of", "loaded_family"]

NUM_JOBS = 12
#: What blocks cannot attend: Gemma 2 caps its scores.
ROWS_ONLY = ("paligemma2",)

Builders = Callable[[str], PromptBuilder]
Loaded = Callable[[str], LoadedModel]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", each_kind(MORE_FAMILIES))
def test_every_one_of_12_mixed_jobs_equals_sequential_generate(
    name: str, backend: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    loaded = loaded_family(name)
    jobs = jobs_of(loaded, builder_of(name), NUM_JOBS)
    assert len({tuple(job.expected[:6]) for job in jobs}) > NUM_JOBS // 2
    runner, _ = check_crowd(loaded, jobs, BACKENDS[backend], runs_ahead=backend == "paged-ahead")
    assert runner.kv_backend == ("slots" if backend == "slots" or name in ROWS_ONLY else "paged")


@pytest.mark.parametrize("name", each_kind(MORE_FAMILIES))
def test_requests_that_are_sent_back_go_on_where_they_were(
    name: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    num_preempted = check_sent_back(loaded_family(name), builder_of(name))
    assert name in ROWS_ONLY or num_preempted >= 1


@pytest.mark.parametrize("backend", ["paged", "slots"])
@pytest.mark.parametrize("name", each_kind(MORE_FAMILIES))
def test_pictures_that_were_seen_before_are_answered_as_generate_does(
    name: str, backend: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    check_vision_cache(loaded_family(name), builder_of(name), BACKENDS[backend], NUM_JOBS // 2)


@pytest.mark.parametrize("backend", ["paged", "slots"])
@pytest.mark.parametrize("name", each_kind(MORE_FAMILIES))
def test_the_engine_hands_a_model_what_generate_hands_it(
    name: str, backend: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    loaded = loaded_family(name)
    prompts = prompts_of(loaded, builder_of(name), NUM_JOBS)[:7]
    check_handed(loaded.model, prompts, BACKENDS[backend], MAX_MODEL_LEN)


@pytest.mark.parametrize("name", each_kind(MORE_FAMILIES))
def test_another_picture_or_order_changes_the_logits(name: str, loaded_family: Loaded, builder_of: Builders) -> None:
    """Guards the other tests: a model that ignored its pictures would pass them."""
    check_pictures_matter(loaded_family(name), builder_of(name))


@pytest.mark.parametrize("name", each_kind(name for name in MORE_FAMILIES if "gemma" not in name))
def test_prompts_are_what_the_familys_own_chat_path_makes_of_them(
    name: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    check_prompts(loaded_family(name), builder_of(name))
