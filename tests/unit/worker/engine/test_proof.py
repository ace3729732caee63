"""Every back end proves itself at boot against the model's own `generate`, or says why it cannot serve the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Model,
)

from tests.tiny.decoders import REFUSED, ROWS_ONLY, SERVED, llava_with, mllama
from tests.tiny.families import FAMILIES, picture, save
from tests.tiny.jobs import TinyModel, mixed_inputs
from tests.tiny.kinds import each_kind
from tests.unit.worker.engine.harness import request
from tests.unit.worker.engine.test_parity import LIMITS, Job, check_answers, run_with_random_arrivals
from worker.engine.config import PagedConfig
from worker.engine.core import EngineCore
from worker.engine.model_hooks import ModelHooks
from worker.engine.runner.build import build_runner
from worker.engine.runner.dense import DenseRunner
from worker.engine.runner.paged import PagedRunner
from worker.engine.runner.proof import reference
from worker.errors import CannotStart
from worker.models.inputs import ModelInputs
from worker.models.loader import load
from worker.prompting.prepare import PromptBuilder, trial_prompts
from worker.settings import WorkerSettings

PAGED = PagedConfig(block_size=8)
BACKENDS = {"paged": PAGED, "slots": None}
MAX_MODEL_LEN = 512


def trials_of(tiny: TinyModel) -> list[ModelInputs]:
    """Return the prompts with which a worker tries this checkpoint."""
    loaded = load(WorkerSettings(model=str(tiny.directory)))
    return trial_prompts(PromptBuilder(loaded), loaded.capabilities)


@pytest.fixture(scope="module")
def decoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """Return a function from a text decoder's type to a tiny LLaVA with it."""

    @cache
    def make(model_type: str) -> TinyModel:
        options = {
            name: given if isinstance(given, dict) else given[0]
            for name, given in (SERVED | ROWS_ONLY | REFUSED).items()
        }
        return TinyModel(
            "llava", save(llava_with(model_type, options[model_type]), tmp_path_factory.mktemp(model_type))
        )

    return make


# PaliGemma's processor makes labels in a way NumPy 2 warns about.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", each_kind(FAMILIES))
def test_every_family_is_proven_with_pictures_and_served_by_both_back_ends(
    name: str, backend: str, tiny_model: Callable[[str], TinyModel], caplog: pytest.LogCaptureFixture
) -> None:
    tiny = tiny_model(name)
    trials = trials_of(tiny)
    assert any("pixel_values" in trial.tensors for trial in trials)
    with caplog.at_level(logging.INFO):
        runner = build_runner(tiny.model, 4, 256, BACKENDS[backend], trials=trials)
    assert isinstance(runner, PagedRunner if backend == "paged" and name != "git" else DenseRunner)
    proven = [record for record in caplog.records if record.getMessage() == "back end answers as generate does"]
    assert [record.kv_backend for record in proven] == [runner.kv_backend]  # type: ignore[attr-defined]


def check_mixed_jobs(tiny: TinyModel, backend: str) -> str:
    """Let a back end that has proven itself answer a mixed crowd; return which one it became."""
    runner = build_runner(tiny.model, LIMITS.max_num_seqs, MAX_MODEL_LEN, BACKENDS[backend], trials=trials_of(tiny))
    jobs = [Job(inputs, 12, tiny.generate(inputs, 12)) for inputs in mixed_inputs(tiny, 10)]
    requests = [request(job.inputs, max_new_tokens=12) for job in jobs]
    core = EngineCore(tiny.model, tiny.tokenizer, runner, LIMITS)
    check_answers(tiny, jobs, requests, run_with_random_arrivals(core, requests, set(), seed=3))
    return runner.kv_backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", each_kind(SERVED, always=list(SERVED)[:2]))
def test_decoders_of_other_kinds_that_are_accepted_answer_as_generate_does(
    model_type: str, backend: str, decoder_of: Callable[[str], TinyModel]
) -> None:
    assert check_mixed_jobs(decoder_of(model_type), backend) == backend


@pytest.mark.parametrize("model_type", each_kind(ROWS_ONLY, always=list(ROWS_ONLY)[:2]))
def test_decoders_whose_attention_blocks_cannot_do_are_served_by_rows(
    model_type: str, decoder_of: Callable[[str], TinyModel], caplog: pytest.LogCaptureFixture
) -> None:
    assert check_mixed_jobs(decoder_of(model_type), "paged") == "slots"
    [refused] = [record for record in caplog.records if "cannot be served from paged blocks" in record.getMessage()]
    assert ROWS_ONLY[model_type][1] in refused.reason  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", each_kind(REFUSED, always=list(REFUSED)[:2]))
def test_decoders_that_no_back_end_answers_for_are_refused_with_the_reason(
    model_type: str, backend: str, decoder_of: Callable[[str], TinyModel]
) -> None:
    """State-space layers, attention in chunks, and positions that the longest row of a batch decides for all."""
    tiny = decoder_of(model_type)
    trials = [tiny.inputs("What is this?", [picture(1)]), tiny.inputs("Hi")]
    with pytest.raises(CannotStart) as refused:
        build_runner(tiny.model, 4, MAX_MODEL_LEN, BACKENDS[backend], trials=trials)
    assert str(refused.value).startswith("VISIONQ_MODEL: ")
    assert REFUSED[model_type][1] in str(refused.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_sees_pictures_by_cross_attention_is_refused(backend: str, tmp_path: Path) -> None:
    loaded = load(WorkerSettings(model=str(save(mllama, tmp_path))))
    trials = trial_prompts(PromptBuilder(loaded), loaded.capabilities)
    assert len(trials) == 3
    with pytest.raises(CannotStart, match="MllamaForConditionalGeneration cannot be served here"):
        build_runner(loaded.model, 4, MAX_MODEL_LEN, BACKENDS[backend], trials=trials)


class CountsItself(Qwen2Model):
    """A text decoder that asks the cache how far it is, whatever positions it is handed."""

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, position_ids=None, **kwargs)


class CountsPairs(Qwen2Model):
    """A text decoder that gives two tokens one position, counted on its own from the token it is handed."""

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, position_ids=None if position_ids is None else position_ids // 2, **kwargs)


class Remembers(Qwen2Model):
    """A text decoder whose last call has an effect on the next, whoever's it was."""

    memory: Any = 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        before = self.memory if kwargs.get("past_key_values") is not None else 0.0
        self.memory = output.last_hidden_state.mean()
        output.last_hidden_state = output.last_hidden_state * (1 + before)
        return output


class LooksAtTheBatch(Qwen2Model):
    """A text decoder that scales each row by the others, as a norm over the batch would."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * (1 + output.last_hidden_state[..., :1].mean().abs())
        return output


@contextmanager
def decoding_by(model: PreTrainedModel, decoder: type[Qwen2Model]) -> Iterator[None]:
    """Let a LLaVA's text decoder be of another class for the block."""
    before = type(model.model.language_model)
    model.model.language_model.__class__ = decoder
    try:
        yield
    finally:
        model.model.language_model.__class__ = before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decoder", [CountsItself, Remembers, LooksAtTheBatch])
def test_a_decoder_with_ways_of_its_own_is_refused_by_each_back_end(
    decoder: type[Qwen2Model], backend: str, tiny_model: Callable[[str], TinyModel]
) -> None:
    tiny = tiny_model("llava")
    trials = trials_of(tiny)
    with decoding_by(tiny.model, decoder), pytest.raises(CannotStart, match="cannot be served here"):
        build_runner(tiny.model, 4, MAX_MODEL_LEN, BACKENDS[backend], trials=trials)
    with decoding_by(tiny.model, decoder), pytest.raises(CannotStart, match="cannot be served here"):
        build_runner(tiny.model, 4, MAX_MODEL_LEN, BACKENDS[backend])


@contextmanager
def logits_put_at(model: PreTrainedModel, value: float) -> Iterator[None]:
    """Let a LLaVA put the logits of some tokens that must not be chosen far away for the block, as Chameleon does."""

    def put(_module: torch.nn.Module, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.arange(5, 9), value)

    hook = model.lm_head.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [LOWEST, -torch.inf, -1e4])
def test_logits_of_forbidden_tokens_do_not_hide_that_the_others_are_wrong(
    value: float, backend: str, tiny_model: Callable[[str], TinyModel]
) -> None:
    tiny = tiny_model("llava")
    trials = trials_of(tiny)
    with logits_put_at(tiny.model, value):
        assert build_runner(tiny.model, 4, MAX_MODEL_LEN, BACKENDS[backend], trials=trials).kv_backend == backend
        for decoder in (CountsItself, Remembers, LooksAtTheBatch):
            with decoding_by(tiny.model, decoder), pytest.raises(CannotStart, match="cannot be served here"):
                build_runner(tiny.model, 4, MAX_MODEL_LEN, BACKENDS[backend], trials=trials)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits_prove_nothing(backend: str, tiny_model: Callable[[str], TinyModel]) -> None:
    tiny = tiny_model("llava")
    with logits_put_at(tiny.model, torch.inf), pytest.raises(CannotStart, match="cannot be served here"):
        build_runner(tiny.model, 4, MAX_MODEL_LEN, BACKENDS[backend], trials=trials_of(tiny))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_model_len", [8, 30, 64])
def test_a_limit_below_the_trial_prompts_spares_no_kind_of_prompt_its_proof(
    max_model_len: int, backend: str, tmp_path: Path
) -> None:
    """Jobs about smaller pictures, or with less text, still fit."""
    loaded = load(WorkerSettings(model=str(save(mllama, tmp_path))))
    trials = trial_prompts(PromptBuilder(loaded), loaded.capabilities)
    with pytest.raises(CannotStart, match="MllamaForConditionalGeneration cannot be served here"):
        build_runner(loaded.model, 4, max_model_len, BACKENDS[backend], trials=trials)


def test_a_model_whose_context_holds_no_trial_prompt_is_refused(tiny_model: Callable[[str], TinyModel]) -> None:
    tiny = tiny_model("llava")
    config = tiny.model.config.get_text_config()
    before, trials = config.max_position_embeddings, trials_of(tiny)
    config.max_position_embeddings = 20
    try:
        with pytest.raises(CannotStart, match="more than the model's context of 20"):
            build_runner(tiny.model, 4, 20, PAGED, trials=trials)
    finally:
        config.max_position_embeddings = before


def test_each_back_end_is_judged_by_itself(tiny_model: Callable[[str], TinyModel]) -> None:
    """Rows hand no positions to prefill, for which this decoder counts otherwise than for those of `generate`."""
    tiny = tiny_model("llava")
    trials = trials_of(tiny)
    with decoding_by(tiny.model, CountsPairs):
        assert build_runner(tiny.model, 4, MAX_MODEL_LEN, PAGED, trials=trials).kv_backend == "paged"
        with pytest.raises(CannotStart, match="rows: logits of token 1 differ from generate's"):
            build_runner(tiny.model, 4, MAX_MODEL_LEN, None, trials=trials)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_not_numbers_are_refused(backend: str, tiny_model: Callable[[str], TinyModel]) -> None:
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(tiny_model("llava").directory).eval()
    assert isinstance(model, LlavaForConditionalGeneration)
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(CannotStart, match="cannot be served here"):
        build_runner(model, 4, MAX_MODEL_LEN, BACKENDS[backend])


@torch.inference_mode()
def test_the_reference_is_plain_generate_whatever_the_checkpoint_says(tiny_model: Callable[[str], TinyModel]) -> None:
    """A generation config that ends at once, or counts repetitions, must not shorten or bend the proof."""
    tiny = tiny_model("llava")
    hooks, inputs = ModelHooks(tiny.model), tiny.inputs("Hello", [picture(1)])
    plain = reference(hooks, inputs)
    config = tiny.model.generation_config
    before = (config.eos_token_id, config.repetition_penalty)
    try:
        config.eos_token_id, config.repetition_penalty = plain.tokens[0], 9.0
        again = reference(hooks, inputs)
        assert tiny.model.generation_config is config
    finally:
        config.eos_token_id, config.repetition_penalty = before
    assert again.tokens == plain.tokens
    assert len(plain.tokens) == 6
    assert plain.positions == list(range(inputs.num_prompt_tokens, inputs.num_prompt_tokens + 5))
    assert plain.num_cached == inputs.num_prompt_tokens
