"""Attention code for a device: how it is called in a step, and how what is wrong or slow is kept out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name

from tests.tiny.families import picture
from tests.tiny.jobs import TinyModel
from tests.unit.worker.engine.harness import request
from worker.engine.attention.choose import (
    best,
    choose_kernels,
    decode_candidates,
    decode_trials,
    prefill_candidates,
    prefill_trials,
)
from worker.engine.attention.kernels import SDPA, Kernels
from worker.engine.batch import Chunk
from worker.engine.config import PagedConfig
from worker.engine.kv_cache.blocks import LayerShape
from worker.engine.request import Request
from worker.engine.runner.build import build_runner
from worker.engine.runner.paged import FlatForward, PagedRunner

SHAPE = LayerShape(num_heads=2, key_dim=16, value_dim=16, dtype=torch.float32, device=torch.device("cpu"))


def see(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """Let the last tokens [n, heads, dim] of a sequence [S, kv heads, dim] look back."""
    entries = torch.arange(keys.shape[0])
    own = entries[-query.shape[0] :, None]
    mask = (entries <= own) if window is None else (entries <= own) & (entries > own - window)
    q, k, v = (each.transpose(0, 1)[None] for each in (query, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def decode_row_by_row(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, context_lens: Tensor, scale: float, window: int | None
) -> Tensor:
    assert (table.dtype, context_lens.dtype) == (torch.int32, torch.int32)
    rows = zip(table, context_lens, strict=True)
    stores = [[store[blocks].flatten(0, 1)[:count] for store in (keys, values)] for blocks, count in rows]
    return torch.cat([see(row[None], *seen, scale, window) for row, seen in zip(query, stores, strict=True)])


def pieces_one_by_one(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    scale: float,
    window: int | None,
) -> Tensor:
    sizes = [each.diff().tolist() for each in cu_seqlens]
    assert [max(each) for each in sizes] == list(max_seqlens)
    parts = zip(query.split(sizes[0]), keys.split(sizes[1]), values.split(sizes[1]), strict=True)
    return torch.cat([see(*each, scale, window) for each in parts])


OWN = Kernels(decode_row_by_row, pieces_one_by_one)


def logits_of_steps(tiny: TinyModel, kernels: Kernels) -> list[Tensor]:
    """Read prompts in pieces of 7 tokens beside streams; return the logits of every step."""
    runner = build_runner(tiny.model, 4, 200, PagedConfig(block_size=4, num_blocks=200, reuses_prefixes=False))
    assert isinstance(runner, PagedRunner)
    runner._forward = FlatForward(runner._hooks, runner._kv, kernels)
    made = []
    running: list[Request] = []
    for number in range(3):
        inputs = tiny.inputs(f"What is number {number}?", [picture(number)] * (number % 2))
        running.append(Request(request(inputs), submitted_at=0.0))
        runner.allocate(running[-1])
        while running[-1].num_unread:
            pieces = [Chunk(each, min(7, each.num_unread)) for each in running]
            assert all(chunk.num_tokens for chunk in pieces)
            step = runner.run(pieces)
            assert step.logits is not None or not step.requests
            if step.logits is not None:
                made.append(step.logits)
            for each in step.requests:
                each.output_ids.append(5 + len(each.output_ids))
            if running[-1].output_ids:
                break
    return made


@torch.inference_mode()
@pytest.mark.parametrize("name", ["idefics2-window", "llava"])
def test_steps_with_other_attention_code_give_the_same_logits(
    tiny_model: Callable[[str], TinyModel], name: str
) -> None:
    tiny = tiny_model(name)
    expected, got = (logits_of_steps(tiny, kernels) for kernels in (SDPA, OWN))
    assert len(got) == len(expected) > 5
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def no_window(*args: object) -> Tensor:
    return decode_row_by_row(*args[:-1], None)  # type: ignore[arg-type]


def no_table(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, *rest: object) -> Tensor:
    return decode_row_by_row(query, keys, values, table.sort(descending=False).values, *rest)  # type: ignore[arg-type]


def no_length(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lens: Tensor, *rest: object) -> Tensor:
    return decode_row_by_row(query, keys, values, table, lens.clamp(min=2), *rest)  # type: ignore[arg-type]


def nonsense(query: Tensor, *_rest: object) -> Tensor:
    return torch.full_like(query, torch.nan)


def no_causality(query: Tensor, keys: Tensor, values: Tensor, cu_seqlens: object, *rest: object) -> Tensor:
    return pieces_one_by_one(query.flip(0), keys, values, cu_seqlens, *rest).flip(0)  # type: ignore[arg-type]


def refuses(*_args: object) -> Tensor:
    raise RuntimeError("head dim not supported")


def test_code_that_is_wrong_in_any_way_fails_the_trials() -> None:
    decode, pieces = decode_trials(SHAPE, 6, block_size=16), prefill_trials(SHAPE, 6, block_size=16)
    assert all(trial.is_passed(OWN) for trial in [*decode, *pieces])
    for wrong in (no_window, no_table, no_length, nonsense):
        assert not all(trial.is_passed(Kernels(decode=wrong)) for trial in decode), wrong
    assert not all(trial.is_passed(Kernels(prefill=no_causality)) for trial in pieces)


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ({"slow": OWN, "quick": Kernels(decode_row_by_row)}, "quick"),
        ({"wrong": Kernels(no_window), "slow": OWN}, "slow"),
        ({"refusing": Kernels(refuses), "slow": OWN}, "slow"),
        ({"refusing": Kernels(refuses), "wrong": Kernels(nonsense)}, None),
        ({}, None),
    ],
)
def test_the_quickest_that_is_right_is_chosen(
    candidates: Mapping[str, Kernels], chosen: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Time is read off a clock that goes by the candidates' order: later ones are quicker."""
    ticks = iter(range(9, 0, -1))

    def seconds(run: Callable[[], object]) -> float:
        run()
        return next(ticks) / 1e6

    with caplog.at_level("INFO", logger="worker.engine.attention.choose"):
        got = best("decode", candidates, decode_trials(SHAPE, 6, block_size=16), seconds)
    assert got == (candidates[chosen] if chosen else SDPA)
    assert caplog.records[-1].kernel == (chosen or "sdpa")  # type: ignore[attr-defined]


def test_a_lost_device_is_not_taken_for_a_bad_kernel() -> None:
    def lost(*_args: object) -> Tensor:
        raise torch.AcceleratorError("device lost")

    with pytest.raises(torch.AcceleratorError):
        best("decode", {"lost": Kernels(lost)}, decode_trials(SHAPE, 6, block_size=16), lambda run: 1.0)


def test_a_cpu_has_sdpa_and_candidates_are_what_is_installed() -> None:
    assert choose_kernels({0: SHAPE}, 6, 16) == SDPA
    assert "flash-attn" not in decode_candidates(16), "its blocks are larger"
    assert "torch-varlen" in prefill_candidates()
