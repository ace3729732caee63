"""Every number that the engine derives from a prompt is the one that `generate` hands its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from transformers import PreTrainedModel

from tests.tiny.families import FAMILIES
from tests.tiny.handed import handed_by_engine, handed_by_generate
from tests.tiny.jobs import TinyModel, mixed_inputs
from tests.tiny.kinds import each_kind
from worker.engine.config import PagedConfig
from worker.engine.runner.build import build_runner
from worker.models.inputs import ModelInputs

BACKENDS = {"paged": PagedConfig(block_size=8), "slots": None}


def check_handed(
    model: PreTrainedModel, prompts: Sequence[ModelInputs], paged: PagedConfig | None, length: int
) -> None:
    """Compare, prompt by prompt: positions of prompt and answer, entries seen, other tensors."""
    expected = [handed_by_generate(model, inputs) for inputs in prompts]
    runner = build_runner(model, len(prompts), length, paged)
    got = handed_by_engine(
        runner, model, [(inputs, tokens) for inputs, (_, tokens) in zip(prompts, expected, strict=True)]
    )
    for (wanted, tokens), found in zip(expected, got, strict=True):
        assert len(found.positions) == len(found.visible) == len(tokens) - 1
        window = max(wanted.visible)
        assert [min(count, window) for count in found.visible] == wanted.visible
        if wanted.positions:
            # Text stands at one place on all axes, which the engine may hand once.
            assert [set(axes) for axes in found.positions] == [set(axes) for axes in wanted.positions]
        if runner.kv_backend == "paged" and wanted.prompt is not None and found.prompt is not None:
            assert found.prompt.expand_as(wanted.prompt).equal(wanted.prompt)
        assert found.others == wanted.others == set()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", each_kind(FAMILIES))
def test_the_engine_hands_a_model_what_generate_hands_it(
    name: str, backend: str, tiny_model: Callable[[str], TinyModel]
) -> None:
    tiny = tiny_model(name)
    check_handed(tiny.model, mixed_inputs(tiny, 6), BACKENDS[backend], 512)
