"""What a checkpoint asks for changes scores as transformers' own processors do, for every row of a batch alike."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from api_stub.contract.sampling import SamplingParams
from tests.tiny.jobs import TinyModel
from tests.tiny.kinds import each_kind
from worker.engine.logits_processor_list import ProcessingFactory
from worker.engine.request import GenerationRequest, Request
from worker.models.generation_defaults import GenerationDefaults, read_generation_defaults
from worker.models.inputs import ModelInputs

VOCABULARY = 40
ENDS = [3, 7]
#: Beyond what can be chosen, as placeholders of images may be.
PLACEHOLDER = VOCABULARY + 2


def random_fields(chance: random.Random) -> dict[str, Any]:
    """Return some fields of a generation config at random."""

    def some(most: int) -> list[int]:
        return chance.sample(range(VOCABULARY), chance.randint(1, most))

    every: dict[str, Any] = {
        "repetition_penalty": chance.choice([0.7, 1.9]),
        "encoder_repetition_penalty": chance.choice([0.5, 1.5]),
        "no_repeat_ngram_size": chance.randint(1, 5),
        "encoder_no_repeat_ngram_size": chance.randint(1, 4),
        "bad_words_ids": [[5], [3], [1, 2], [2, 2], [1, 2, 3], [9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]],
        "sequence_bias": [
            [[4], 2.5],
            [[1, 1], -3.0],
            [[1, 1, 6], 1.0],
            [[2, 2, 2, 6], 1.0],
            [[2, 1], 1.5],
            [[3, 1], 0.5],
            [[1, 2, 1], 2.0],
        ],
        "suppress_tokens": [-1, *some(9), VOCABULARY + 5],
        "begin_suppress_tokens": some(9),
        "forced_bos_token_id": 11,
        "forced_eos_token_id": chance.choice([12, [14, 13]]),
        "min_new_tokens": chance.randint(1, 6),
        "min_length": chance.randint(2, 16),
        "remove_invalid_values": True,
        "exponential_decay_length_penalty": [chance.randint(-1, 4), chance.uniform(0.5, 2.0)],
    }
    names = chance.sample(sorted(every), chance.randint(1, 8))
    chosen = {name: every[name] for name in names}
    if "forced_eos_token_id" in chosen:
        chosen.pop("suppress_tokens", None)  # transformers refuses a forced token that is suppressed
    return chosen


def random_row(chance: random.Random, defaults: GenerationDefaults) -> Request:
    """Return a request with a few small numbers as tokens, so that they repeat.

    transformers fails at placeholders in the prompt with what it has made for encoders.
    """
    is_plain = bool(defaults.encoder_no_repeat_ngram_size) or defaults.encoder_repetition_penalty != 1
    prompt = [chance.choice([1, 2, 3, 4 if is_plain else PLACEHOLDER]) for _ in range(chance.choice([1, 2, 5, 9]))]
    output = [chance.choice([1, 2, 3, 4]) for _ in range(chance.choice([0, 0, 1, 3, 7]))]
    inputs = ModelInputs({"input_ids": torch.tensor([prompt])})
    sampling = SamplingParams(max_new_tokens=len(output) + chance.randint(1, 2), seed=0)
    return Request(GenerationRequest("id", inputs, sampling), 0.0, output_ids=output, defaults=defaults)


def of_transformers(tiny: TinyModel, config: GenerationConfig, scores: Tensor, row: Request) -> Tensor:
    """Return the scores [V] that `generate` would choose by."""
    prompt = row.prompt_ids[None]
    config = GenerationConfig.from_dict(config.to_dict() | {"do_sample": False})
    tiny.model._prepare_special_tokens(config, True, device="cpu", batch_size=1)
    config.max_length = row.max_new_tokens + prompt.shape[1]
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + prompt.shape[1]
    ids = torch.cat((prompt, torch.tensor([row.output_ids]).long()), dim=1)
    processors = tiny.model._get_logits_processor(config, prompt.shape[1], encoder_input_ids=prompt, device="cpu")
    return processors(ids, scores[None].clone())[0]


def random_scores(chance: random.Random, num_rows: int, *, has_invalid: bool) -> Tensor:
    scores = torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(chance.randrange(2**31)))
    if has_invalid:
        for value in (torch.nan, torch.inf, -torch.inf):
            scores[chance.randrange(num_rows), chance.randrange(VOCABULARY)] = value
    return scores


@pytest.mark.parametrize("seed", each_kind(range(60), always=range(15)))
@pytest.mark.filterwarnings("ignore:Passing `:UserWarning")
def test_scores_of_every_row_are_those_of_transformers(
    idefics2: TinyModel, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of rows one by one, and after tokens that only the device knows."""
    chance = random.Random(seed)
    config = GenerationConfig(eos_token_id=ENDS, **random_fields(chance))
    monkeypatch.setattr(idefics2.model, "generation_config", config)
    defaults = read_generation_defaults(idefics2.model)
    rows = [random_row(chance, defaults) for _ in range(6)]
    scores = random_scores(chance, len(rows), has_invalid=bool(config.remove_invalid_values))
    expected = torch.stack([of_transformers(idefics2, config, *each) for each in zip(scores, rows, strict=True)])

    processing = ProcessingFactory(ENDS, defaults).make(rows, VOCABULARY, torch.device("cpu"))
    assert processing is not None
    torch.testing.assert_close(processing.scores(scores.clone()), expected, rtol=0, atol=0, equal_nan=True)

    factory, told = ProcessingFactory(ENDS, defaults), [row.output_ids.pop() if row.output_ids else -1 for row in rows]
    early = [row for row, token in zip(rows, told, strict=True) if token >= 0]
    newest = torch.tensor([token for token in told if token >= 0])
    for is_pending in (False, True):
        processing = factory.make(rows if is_pending else early, VOCABULARY, torch.device("cpu"))
        if processing is None:
            continue
        if is_pending:
            places = torch.tensor([early.index(row) if row in early else -1 for row in rows])
            processing.see_pending(newest, places)
            torch.testing.assert_close(processing.scores(scores.clone()), expected, rtol=0, atol=0, equal_nan=True)
        else:
            processing.see(newest)
            for row in early:
                row.num_pending = 1
            chosen = [number for number, token in enumerate(told) if token >= 0]
            got = processing.scores(scores[chosen])
            torch.testing.assert_close(got, expected[chosen], rtol=0, atol=0, equal_nan=True)
