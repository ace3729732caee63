"""The sampler's distributions are those of transformers' own logits processors; draws depend on nothing but the row."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from api_stub.contract.sampling import SamplingParams
from worker.engine.request import GenerationRequest, Request
from worker.engine.sampler import Sampler, uniform
from worker.models.inputs import ModelInputs

VOCABULARY = 64
EOS = (2, 5)
NUM_DRAWS = 4_000

PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 1_000_000, "top_p": 0.9},
    {"temperature": 0.7, "repetition_penalty": 1.5},
    {"temperature": 1.0, "repetition_penalty": 0.6, "top_k": 9, "min_new_tokens": 4},
    {"temperature": 1.0, "min_new_tokens": 4, "top_p": 0.8},
    {"temperature": 1.0, "min_new_tokens": 3, "top_p": 0.8},
    {},
    {"repetition_penalty": 3.0, "min_new_tokens": 9},
]


def row(
    *, prompt: Sequence[int] = (7, 7, 9), output: Sequence[int] = (11, 12, 9), seed: int = 0, **params: Any
) -> Request:
    """Make a running request that has generated `output`."""
    inputs = ModelInputs({"input_ids": torch.tensor([prompt])})
    sampling = SamplingParams.model_validate({"max_new_tokens": 99, "seed": seed, **params})
    name = "".join(random.choices(string.ascii_letters, k=8))
    return Request(GenerationRequest(name, inputs, sampling), submitted_at=0.0, output_ids=list(output))


def logits(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def transformers_probabilities(scores: Tensor, request: Request) -> Tensor:
    """Return what `generate` would draw from, for logits [V]; one-hot when greedy."""
    params = request.sampling
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_new_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(3, params.min_new_tokens, list(EOS)))
    if params.temperature:
        processors.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            processors.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            processors.append(MinPLogitsWarper(params.min_p))
    ids = torch.cat([request.prompt_ids, torch.tensor(request.output_ids)])[None]
    scores = processors(ids, scores[None].clone())[0]
    if not params.temperature:
        return torch.nn.functional.one_hot(scores.argmax(), VOCABULARY).float()
    return scores.softmax(dim=-1)


@pytest.mark.parametrize("params", PARAMETERS, ids=str)
def test_draws_follow_the_distribution_of_transformers(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced numbers instead of hashed ones make the frequencies exact to two draws."""
    monkeypatch.setattr(
        "worker.engine.sampler.uniform", lambda seeds, steps: (torch.arange(len(steps)) + 0.5) / NUM_DRAWS
    )
    scores, request = logits(1)[0], row(**params)
    tokens = Sampler(EOS).sample(scores.expand(NUM_DRAWS, -1), [request] * NUM_DRAWS).tolist()
    frequencies = torch.bincount(torch.tensor(tokens), minlength=VOCABULARY) / NUM_DRAWS
    expected = transformers_probabilities(scores, request)
    assert (frequencies - expected).abs().max() < 2 / NUM_DRAWS
    assert not frequencies[expected == 0].any()


@pytest.mark.parametrize("params", PARAMETERS, ids=str)
def test_company_does_not_change_a_draw(params: dict[str, Any]) -> None:
    scores = logits(len(PARAMETERS) + 1)
    alone = Sampler(EOS).sample(scores[:1], [row(seed=123, **params)]).tolist()
    company = [row(seed=seed, **others) for seed, others in enumerate(PARAMETERS)]
    together = Sampler(EOS).sample(scores, [row(seed=123, **params), *company]).tolist()
    last = Sampler(EOS).sample(scores.roll(-1, dims=0), [*company, row(seed=123, **params)]).tolist()
    assert together[0] == last[-1] == alone[0]


@pytest.mark.parametrize("top_k", [20, 2_000])
def test_company_does_not_choose_among_equal_logits(top_k: int) -> None:
    """Half the precision makes many logits equal; more candidates for a neighbour must not reorder them."""
    for seed in range(60):
        scores = torch.randn(2, 4_000, generator=torch.Generator().manual_seed(seed)).bfloat16()
        alone = Sampler(EOS).sample(scores[:1], [row(seed=seed, temperature=1.0, top_k=20)]).tolist()
        company = [row(seed=seed, temperature=1.0, top_k=20), row(temperature=1.0, top_k=top_k)]
        assert Sampler(EOS).sample(scores, company).tolist()[:1] == alone


def test_a_sampler_follows_a_changing_batch() -> None:
    """Rows come, go, move and grow; each step chooses what a fresh sampler would."""
    chance, sampler = random.Random(5), Sampler(EOS)
    batch: list[Request] = []
    for step in range(60):
        if len(batch) < 6 and chance.random() < 0.6:
            batch.append(row(seed=step, **chance.choice(PARAMETERS)))
        if len(batch) > 1 and chance.random() < 0.2:
            batch[chance.randrange(len(batch))] = batch[-1]
            batch.pop()
            batch = list(dict.fromkeys(batch))
        if not batch:
            continue
        scores = logits(len(batch), seed=step)
        tokens = sampler.sample(scores, batch).tolist()
        assert tokens == Sampler(EOS).sample(scores, batch).tolist()
        for request, token in zip(batch, tokens, strict=True):
            request.output_ids.append(token)


@pytest.mark.parametrize("params", [{"repetition_penalty": 3.0}, {"min_new_tokens": 9}], ids=str)
def test_tokens_that_the_model_cannot_choose_change_nothing(params: dict[str, Any]) -> None:
    """Some checkpoints end with a token, or mark images with one, that has no logit."""
    scores = logits(3)
    known = [row(seed=seed, **params) for seed in range(3)]
    with_more = [row(seed=seed, prompt=(7, VOCABULARY + 9, 7, 9), **params) for seed in range(3)]
    expected = Sampler(EOS).sample(scores, known).tolist()
    assert Sampler([*EOS, VOCABULARY]).sample(scores, with_more).tolist() == expected


def test_steps_and_seeds_give_independent_uniform_numbers() -> None:
    seeds, steps = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    numbers = uniform(seeds, steps)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.unique().numel() == numbers.numel()
    assert abs(numbers.mean() - 0.5) < 0.005
    centred = numbers - numbers.mean()
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, -1), (0, 1))):
        assert abs((centred * other).mean() / centred.var()) < 0.02


def test_the_uniform_numbers_of_a_seed_are_fixed_for_ever() -> None:
    """A stored job must give the same text after an upgrade: these are splitmix64's, worked out by hand in integers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        return state ^ (state >> 31)

    for seed, step in [(0, 0), (1, 0), (2**63 - 1, 5), (123456789, 4095)]:
        expected = (mix((mix(seed) + (step + 1) * golden) & mask) >> 11) / 2**53
        assert uniform(torch.tensor([seed]), torch.tensor([step])).item() == expected


def test_a_uniform_number_next_to_one_draws_a_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "worker.engine.sampler.uniform", lambda seeds, steps: torch.tensor([1 - 2**-53] * len(steps)).double()
    )
    scores = torch.full((1, VOCABULARY), -torch.inf)
    scores[0, 3] = scores[0, 20] = 0.0
    assert Sampler(EOS).sample(scores, [row(temperature=1.0)]).tolist() == [20]
    assert Sampler(EOS).sample(scores, [row(temperature=1.0, top_k=8)]).tolist() == [20]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}], ids=str)
def test_nothing_sorts_a_full_vocabulary_without_need(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sorted")

    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    monkeypatch.setattr(torch, "sort", refuse)
    Sampler(EOS).sample(logits(2), [row(**params), row(**params)]).tolist()


def test_top_p_alone_does_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the test above can fail."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sorted")

    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    with pytest.raises(AssertionError, match="sorted"):
        Sampler(EOS).sample(logits(1), [row(temperature=1.0, top_p=0.5)]).tolist()


@pytest.mark.parametrize("temperature", [1e-40, 1e-5])
def test_a_temperature_too_small_for_float32_is_greedy(temperature: float) -> None:
    scores = logits(4)
    rows = [row(temperature=temperature, seed=seed, top_k=5) for seed in range(4)]
    assert Sampler(EOS).sample(scores, rows).tolist() == scores.argmax(-1).tolist()
