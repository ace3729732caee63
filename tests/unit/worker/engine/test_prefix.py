"""Prompts that begin alike share blocks, prompts with other media never do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.tiny.families import picture
from tests.tiny.jobs import TinyModel
from tests.unit.worker.engine.harness import request
from worker.engine.cache_scope import CacheScope
from worker.engine.config import PagedConfig, SchedulerLimits
from worker.engine.core import EngineCore
from worker.engine.model_hooks import ModelHooks
from worker.engine.runner.build import build_runner
from worker.engine.runner.paged import PagedRunner
from worker.engine.runner.prefill import PrefixKeys, Prompt, capture
from worker.models.inputs import ModelInputs


@torch.inference_mode()
def answers(tiny: TinyModel, prompts: list[ModelInputs]) -> tuple[list[list[int]], int]:
    """Answer one prompt after the other; return the tokens and how many prompt tokens were not read again."""
    runner = build_runner(tiny.model, 2, 256, PagedConfig(block_size=4))
    assert isinstance(runner, PagedRunner)
    core = EngineCore(tiny.model, tiny.tokenizer, runner, SchedulerLimits(2, 24))
    said = []
    for inputs in prompts:
        generation = request(inputs, max_new_tokens=6)
        core.add(generation, submitted_at=0.0)
        state = core.scheduler.find(generation.request_id)
        assert state is not None
        while not core.scheduler.is_idle:
            core.step()
        said.append(state.output_ids)
    return said, runner.prefix_stats().num_reused_tokens


@pytest.mark.parametrize("name", ["idefics2", "idefics2-window", "llava", "blip2"])
def test_questions_about_one_image_read_it_once(tiny_model: Callable[[str], TinyModel], name: str) -> None:
    tiny = tiny_model(name)
    prompts = [tiny.inputs(question, [picture(1)]) for question in ("What is it?", "What colour?", "What is it?")]
    said, num_reused = answers(tiny, prompts)
    assert said == [tiny.generate(inputs, 6) for inputs in prompts]
    assert num_reused >= 12


def test_another_image_is_another_prefix(tiny_model: Callable[[str], TinyModel]) -> None:
    """The words are the same, token for token, and so are those in front of the image."""
    tiny = tiny_model("idefics2")
    prompts = [tiny.inputs("What is it?", [picture(seed)]) for seed in (1, 2, 3)]
    assert torch.equal(prompts[0].tensors["input_ids"], prompts[1].tensors["input_ids"])
    said, num_reused = answers(tiny, prompts)
    assert said == [tiny.generate(inputs, 6) for inputs in prompts]
    first_image = (prompts[0].tensors["input_ids"][0] == tiny.model.config.image_token_id).nonzero()[0].item()
    assert num_reused <= 2 * first_image


@torch.inference_mode()
def test_keys_name_the_whole_prefix(idefics2: TinyModel) -> None:
    hooks, prefixes = ModelHooks(idefics2.model), PrefixKeys()

    def prompt(text: str, seed: int) -> Prompt:
        return capture(hooks, hooks.on_device(idefics2.inputs(text, [picture(seed)])))

    def keys(text: str, seed: int) -> list[bytes]:
        return prefixes.keys(prompt(text, seed), 4, CacheScope())

    one, same, longer, other = keys("It", 1), keys("It", 1), keys("It is red and blue", 1), keys("It", 2)
    assert one == same
    assert len(set(one)) == len(one)
    assert longer[: len(one) - 2] == one[: len(one) - 2]
    assert not set(other[2:]) & set(one)
    assert PrefixKeys().keys(prompt("It", 1), 4, CacheScope()) != one
