"""The engine from outside: submit, cancel, stop, failures, stop strings, seeds."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from api_stub.contract.error import ErrorCode
from api_stub.contract.result import FinishReason
from api_stub.contract.sampling import SamplingParams
from tests.servers import eventually
from tests.tiny.families import picture
from tests.tiny.jobs import TinyModel, mixed_inputs
from tests.unit.worker.engine.harness import TIMEOUT_S, Outbox, request, running_engine
from worker.engine.config import EngineConfig, PagedConfig
from worker.engine.engine import Engine
from worker.engine.request import Ended, GenerationRequest
from worker.errors import CannotStart, EngineDead, PromptTooLong
from worker.models.inputs import ModelInputs


def text_of(tiny: TinyModel, token_ids: list[int]) -> str:
    text: str = tiny.tokenizer.decode(token_ids, skip_special_tokens=True)
    return text.lstrip()


def answer(tiny: TinyModel, generation: GenerationRequest) -> str:
    """Return what an engine of its own answers."""
    with running_engine(tiny) as (engine, outbox):
        engine.submit(generation)
        outbox.finish(generation.request_id)
    return outbox.text(generation.request_id)


@contextmanager
def generation_config(tiny: TinyModel, **fields: Any) -> Iterator[None]:
    """Change fields of the model's generation config for the block."""
    config = tiny.model.generation_config
    before = {name: getattr(config, name) for name in fields}
    for name, value in fields.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def test_an_answer_streams_and_ends_at_its_limit(idefics2: TinyModel) -> None:
    inputs = idefics2.inputs("What is it?", [picture(1)])
    with running_engine(idefics2) as (engine, outbox):
        generation = request(inputs, max_new_tokens=12)
        engine.submit(generation)
        finish = outbox.finish(generation.request_id)
    outputs = outbox.outputs[generation.request_id]
    assert finish.reason is FinishReason.LENGTH
    assert (finish.num_prompt_tokens, finish.num_completion_tokens) == (inputs.num_prompt_tokens, 12)
    assert [output.is_first for output in outputs] == [True] + [False] * (len(outputs) - 1)
    assert len(outputs) > 3
    assert finish.first_token_s > 0
    assert finish.generate_s > 0


def test_one_token_is_one_token(idefics2: TinyModel) -> None:
    with running_engine(idefics2) as (engine, outbox):
        generation = request(idefics2.inputs("What is it?"), max_new_tokens=1)
        engine.submit(generation)
        finish = outbox.finish(generation.request_id)
    assert (finish.reason, finish.num_completion_tokens) == (FinishReason.LENGTH, 1)
    assert len(outbox.outputs[generation.request_id]) == 1


@pytest.mark.parametrize("place", [0, 3])
def test_the_end_token_ends_an_answer_and_is_counted(idefics2: TinyModel, place: int) -> None:
    """Place 0: the very first token, which comes out of prefill."""
    inputs = idefics2.inputs("What is it?", [picture(3)])
    free = idefics2.generate(inputs, 8)
    end = free[place]
    expected = free[: free.index(end) + 1]
    with generation_config(idefics2, eos_token_id=[0, end]), running_engine(idefics2) as (engine, outbox):
        generation, other = request(inputs, max_new_tokens=8), request(idefics2.inputs("And this?"), max_new_tokens=30)
        engine.submit(other)
        engine.submit(generation)
        finish = outbox.finish(generation.request_id)
        outbox.finish(other.request_id)
    assert (finish.reason, finish.num_completion_tokens) == (FinishReason.STOP, len(expected))
    assert outbox.text(generation.request_id) == text_of(idefics2, expected[:-1])


def test_without_an_end_token_in_the_generation_config_the_tokenizers_counts(idefics2: TinyModel) -> None:
    inputs = idefics2.inputs("What is it?", [picture(3)])
    end = idefics2.generate(inputs, 4)[2]
    before = idefics2.tokenizer.eos_token
    idefics2.tokenizer.eos_token = idefics2.tokenizer.convert_ids_to_tokens(end)
    try:
        with generation_config(idefics2, eos_token_id=None), running_engine(idefics2) as (engine, outbox):
            generation = request(inputs, max_new_tokens=8)
            engine.submit(generation)
            finish = outbox.finish(generation.request_id)
    finally:
        idefics2.tokenizer.eos_token = before
    assert finish.reason is FinishReason.STOP


def test_a_stop_string_ends_an_answer_and_is_left_out(idefics2: TinyModel) -> None:
    inputs = idefics2.inputs("Where is the flower?", [picture(5)])
    free = answer(idefics2, request(inputs, max_new_tokens=24))
    stop = next(free[at : at + 3] for at in range(5, len(free)) if "\ufffd" not in free[at : at + 3])
    with running_engine(idefics2) as (engine, outbox):
        generation = request(inputs, max_new_tokens=24, stop=(stop, "never to be seen"))
        engine.submit(generation)
        finish = outbox.finish(generation.request_id)
    assert finish.reason is FinishReason.STOP_SEQUENCE
    assert outbox.text(generation.request_id) == free[: free.index(stop)]
    assert finish.num_completion_tokens < 24
    assert sum(each.num_tokens for each in outbox.outputs[generation.request_id]) == finish.num_completion_tokens


def test_a_seed_gives_the_same_answer_whatever_else_runs(idefics2: TinyModel) -> None:
    inputs = idefics2.inputs("Describe it.", [picture(6)])
    sampling = {"temperature": 1.2, "top_p": 0.9, "seed": 4711}
    alone = answer(idefics2, request(inputs, max_new_tokens=20, **sampling))
    with running_engine(idefics2, max_num_seqs=4) as (engine, outbox):
        generation = request(inputs, max_new_tokens=20, **sampling)
        company = [
            request(each, max_new_tokens=5 + number, temperature=number % 3, top_k=7 * (number % 2), seed=number)
            for number, each in enumerate(mixed_inputs(idefics2, 9))
        ]
        for each in [*company[:2], generation, *company[2:]]:
            engine.submit(each)
        for each in [generation, *company]:
            outbox.finish(each.request_id)
    assert outbox.text(generation.request_id) == alone
    assert answer(idefics2, request(inputs, max_new_tokens=20, **(sampling | {"seed": 4712}))) != alone


def test_greedy_repetition_penalty_and_minimum_equal_generate(idefics2: TinyModel) -> None:
    inputs = idefics2.inputs("How many people?", [picture(8)])
    end = idefics2.generate(inputs, 6)[3]
    options = {"repetition_penalty": 1.8, "min_new_tokens": 10}
    with generation_config(idefics2, eos_token_id=end):
        expected = idefics2.generate(inputs, 30, **options)
        got = answer(idefics2, request(inputs, max_new_tokens=30, **options))
    assert got == text_of(idefics2, expected)
    assert len(expected) >= 10


def test_a_continued_turn_keeps_its_leading_space(idefics2: TinyModel) -> None:
    inputs = idefics2.inputs("There's a")
    space = idefics2.tokenizer.encode(" a", add_special_tokens=False)
    with torch.inference_mode():
        first = int(idefics2.model(**inputs.tensors).logits[0, -1].argmax())
    head = idefics2.model.lm_head.weight.data
    swapped = head[[first, space[0]]].clone()
    head[[space[0], first]] = swapped  # the model now says " …" first
    try:
        plain = answer(idefics2, request(inputs, max_new_tokens=4))
        continued = ModelInputs(inputs.tensors, is_continuation=True)
        kept = answer(idefics2, request(continued, max_new_tokens=4))
    finally:
        head[[first, space[0]]] = swapped
    assert kept.startswith(" ")
    assert plain == kept.lstrip()


@pytest.mark.parametrize(
    ("row_length", "max_new_tokens", "limit"), [(64, 60, "64"), (4096, 2040, "2048")], ids=["row", "context"]
)
def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(
    idefics2: TinyModel, row_length: int, max_new_tokens: int, limit: str
) -> None:
    inputs = idefics2.inputs("Too long?")
    num_tokens = inputs.num_prompt_tokens + max_new_tokens
    with running_engine(idefics2, max_model_len=row_length) as (engine, _):
        with pytest.raises(
            PromptTooLong, match=rf"{inputs.num_prompt_tokens} .*{max_new_tokens} .*{num_tokens}.*{limit}"
        ):
            engine.submit(request(inputs, max_new_tokens=max_new_tokens))
        engine.submit(request(inputs, max_new_tokens=int(limit) - inputs.num_prompt_tokens))


def test_image_features_that_do_not_fit_the_row_fail_the_request(tiny_model: Any) -> None:
    """GIT puts features in front of the text that no token of the prompt stands for."""
    git = tiny_model("git")
    inputs = git.inputs("a red", [picture(1)])
    with running_engine(git, max_model_len=32) as (engine, outbox):
        long, short = request(inputs, max_new_tokens=20), request(inputs, max_new_tokens=5)
        engine.submit(long)
        engine.submit(short)
        finish = outbox.finish(long.request_id)
        assert outbox.finish(short.request_id).reason is FinishReason.LENGTH
    assert finish.reason is Ended.FAILED
    assert finish.error is not None
    assert finish.error.code is ErrorCode.PROMPT_TOO_LONG
    assert "32 tokens" in finish.error.message


def test_unresolved_sampling_is_refused(idefics2: TinyModel) -> None:
    with running_engine(idefics2) as (engine, _), pytest.raises(ValueError, match="max_new_tokens and seed"):
        engine.submit(GenerationRequest("id", idefics2.inputs("a"), SamplingParams()))


def test_an_id_is_refused_until_its_request_has_ended(idefics2: TinyModel) -> None:
    generation = request(idefics2.inputs("once"), max_new_tokens=3)
    with running_engine(idefics2) as (engine, outbox):
        long = request(idefics2.inputs("long"), max_new_tokens=400)
        engine.submit(long)
        with pytest.raises(ValueError, match=f"{long.request_id} has not ended"):
            engine.submit(GenerationRequest(long.request_id, generation.inputs, generation.sampling))
        engine.submit(generation)
        outbox.finish(generation.request_id)
        outbox.outputs[generation.request_id].clear()
        engine.submit(generation)
        assert outbox.finish(generation.request_id).num_completion_tokens == 3
        engine.cancel(long.request_id)
        outbox.finish(long.request_id)


def test_a_model_serves_one_engine_at_a_time(idefics2: TinyModel) -> None:
    config, outbox = EngineConfig(1, 64), Outbox()
    with running_engine(idefics2) as (engine, _):
        assert (engine.kv_backend, engine.why_not_paged) == ("slots", None)
        with pytest.raises(ValueError, match="another engine"):
            Engine(idefics2.model, idefics2.tokenizer, config, outbox.steps.put)
    unstarted = Engine(idefics2.model, idefics2.tokenizer, config, outbox.steps.put)
    with pytest.raises(ValueError, match="another engine"):
        Engine(idefics2.model, idefics2.tokenizer, config, outbox.steps.put)
    unstarted.stop(timeout_s=1)
    with pytest.raises(CannotStart):
        Engine(idefics2.model, idefics2.tokenizer, EngineConfig(1, 64, paged=PagedConfig(16, 2)), outbox.steps.put)
    with running_engine(idefics2):
        unstarted.stop(timeout_s=1)


def test_cancel_ends_running_and_waiting_requests_and_leaves_others_alone(idefics2: TinyModel) -> None:
    running, waiting, other = (request(idefics2.inputs(text), max_new_tokens=400) for text in ("one", "two", "three"))
    with running_engine(idefics2, max_num_seqs=1, max_model_len=1024) as (engine, outbox):
        for each in (running, waiting, other):
            engine.submit(each)
        while len(outbox.outputs[running.request_id]) < 3:
            outbox.read()
        engine.cancel("nobody")
        engine.cancel(waiting.request_id)
        engine.cancel(running.request_id)
        finish = outbox.finish(running.request_id)
        assert finish.reason is Ended.CANCELLED
        assert 3 <= finish.num_completion_tokens < 400
        unstarted = outbox.finish(waiting.request_id)
        assert (unstarted.reason, unstarted.num_completion_tokens) == (Ended.CANCELLED, 0)
        assert outbox.finish(other.request_id).reason in (FinishReason.LENGTH, FinishReason.STOP)
        engine.cancel(other.request_id)
    assert text_of(idefics2, idefics2.generate(running.inputs, 400)).startswith(outbox.text(running.request_id))


def test_stop_reports_every_request_as_cancelled(idefics2: TinyModel) -> None:
    requests = [request(idefics2.inputs(f"number {number}"), max_new_tokens=1500) for number in range(5)]
    with running_engine(idefics2, max_num_seqs=2, max_model_len=2048) as (engine, outbox):
        for each in requests:
            engine.submit(each)
        outbox.read()
        assert engine.is_alive
        engine.stop(timeout_s=TIMEOUT_S)
        assert not engine.is_alive
        assert {outbox.finish(each.request_id).reason for each in requests} == {Ended.CANCELLED}
        with pytest.raises(EngineDead):
            engine.submit(requests[0])
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_generate_yields_each_request_to_its_end_and_nothing_goes_to_the_outbox(idefics2: TinyModel) -> None:
    requests = [request(idefics2.inputs(text), max_new_tokens=6) for text in ("one", "two")]
    with running_engine(idefics2) as (engine, outbox):
        outputs = list(engine.generate(requests, TIMEOUT_S))
        for each in requests:
            own = [output for output in outputs if output.request_id == each.request_id]
            text = "".join(output.text for output in own)
            assert text == text_of(idefics2, idefics2.generate(each.inputs, 6))
            assert [output.finish is not None for output in own] == [False] * (len(own) - 1) + [True]
        again = list(engine.generate(requests, TIMEOUT_S))
        assert sum(output.finish is not None for output in again) == 2, "an id may be used again"
    assert outbox.steps.empty()


def test_what_generate_is_not_waited_for_is_cancelled(idefics2: TinyModel) -> None:
    requests = [request(idefics2.inputs(text), max_new_tokens=1500) for text in ("one", "two")]
    with running_engine(idefics2, max_model_len=2048) as (engine, _):
        outputs = engine.generate(requests, TIMEOUT_S)
        next(outputs)
        assert isinstance(outputs, Generator)
        outputs.close()
        eventually(lambda: engine.num_running == engine.num_waiting == 0, TIMEOUT_S, "both are cancelled")
        with pytest.raises(EngineDead, match="no answer within 0 s"):
            list(engine.generate(requests, timeout_s=0.0))
        eventually(lambda: engine.num_running == engine.num_waiting == 0, TIMEOUT_S, "both are cancelled")
        with pytest.raises(ValueError, match="not ended"):
            engine.generate([requests[0], requests[0]], TIMEOUT_S)
        eventually(lambda: engine.num_running == engine.num_waiting == 0, TIMEOUT_S, "the first is cancelled")


def test_an_engine_that_stops_ends_what_generate_yields(idefics2: TinyModel) -> None:
    generation = request(idefics2.inputs("one"), max_new_tokens=1500)
    with running_engine(idefics2, max_model_len=2048) as (engine, _):
        outputs = engine.generate([generation], TIMEOUT_S)
        next(outputs)
        engine.stop(timeout_s=TIMEOUT_S)
        finish = list(outputs)[-1].finish
    assert finish is not None
    assert finish.reason is Ended.CANCELLED


def test_counts_and_the_sign_of_life_follow_the_work(idefics2: TinyModel) -> None:
    with running_engine(idefics2, max_num_seqs=2, max_model_len=2048) as (engine, _):
        before = engine.last_step_at
        requests = [request(idefics2.inputs("count"), max_new_tokens=1500) for _ in range(3)]
        for each in requests:
            engine.submit(each)
        eventually(lambda: (engine.num_running, engine.num_waiting) == (2, 1))
        eventually(lambda: engine.last_step_at > before)
        for each in requests:
            engine.cancel(each.request_id)
        eventually(lambda: (engine.num_running, engine.num_waiting) == (0, 0))
        idle_at = engine.last_step_at
        eventually(lambda: engine.last_step_at > idle_at)


def broken(inputs: ModelInputs) -> ModelInputs:
    """Break the shapes: more image tokens than image features."""
    return ModelInputs({**inputs.tensors, "pixel_values": inputs.tensors["pixel_values"][:, :1]})


def test_a_prefill_that_fails_takes_nobody_along(idefics2: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    good = [request(inputs, max_new_tokens=20) for inputs in mixed_inputs(idefics2, 6)]
    bad = replace(request(broken(idefics2.inputs("two images", [picture(1), picture(2)]))), request_id="a-job:7")
    with running_engine(idefics2, max_num_seqs=3) as (engine, outbox):
        for each in [*good[:2], bad, *good[2:]]:
            engine.submit(each)
        for each in [*good, bad]:
            outbox.finish(each.request_id)
    for each in good:
        assert outbox.text(each.request_id) == text_of(idefics2, idefics2.generate(each.inputs, 20))
    finish = outbox.finish(bad.request_id)
    assert finish.reason is Ended.FAILED
    assert finish.error is not None
    assert finish.error.code is ErrorCode.INTERNAL
    assert "Traceback" not in finish.error.message
    logged = [record for record in caplog.records if record.exc_info]
    assert [vars(record)["job_id"] for record in logged] == ["a-job"]


class FailingForward:
    """Makes a model's forward raise while decoding, `num_failures` times."""

    def __init__(self, error: Exception, num_failures: int) -> None:
        self.error, self.num_left = error, num_failures

    def __call__(self, _module: torch.nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 1 and self.num_left:
            self.num_left -= 1
            raise self.error


@contextmanager
def failing(tiny: TinyModel, error: Exception, num_failures: int) -> Iterator[None]:
    hook = tiny.model.register_forward_pre_hook(FailingForward(error, num_failures), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("tried to allocate"), ErrorCode.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ErrorCode.OUT_OF_MEMORY),
        (RuntimeError("a secret of the prompt"), ErrorCode.INTERNAL),
    ],
    ids=["oom", "cpu-oom", "other"],
)
def test_a_decode_step_that_fails_ends_the_running_and_serves_the_next(
    idefics2: TinyModel, error: Exception, code: ErrorCode
) -> None:
    first = [request(idefics2.inputs(text), max_new_tokens=9) for text in ("one", "two")]
    later = request(idefics2.inputs("three", [picture(3)]), max_new_tokens=9)
    with running_engine(idefics2, max_num_seqs=2) as (engine, outbox), failing(idefics2, error, num_failures=1):
        for each in first:
            engine.submit(each)
        finishes = [outbox.finish(each.request_id) for each in first]
        engine.submit(later)
        assert outbox.finish(later.request_id).reason is FinishReason.LENGTH
    failed = [finish.error for finish in finishes if finish.error]
    assert failed
    assert {each.code for each in failed} == {code}
    assert "secret" not in failed[0].message
    assert outbox.text(later.request_id) == text_of(idefics2, idefics2.generate(later.inputs, 9))


@pytest.mark.parametrize(
    ("error", "num_failures"), [(RuntimeError("again"), 99), (torch.AcceleratorError("device lost"), 1)], ids=str
)
def test_an_engine_that_cannot_go_on_reports_everybody_and_dies(
    idefics2: TinyModel, error: Exception, num_failures: int
) -> None:
    requests = [request(idefics2.inputs(f"number {number}"), max_new_tokens=9) for number in range(8)]
    outbox = Outbox()
    engine = Engine(idefics2.model, idefics2.tokenizer, EngineConfig(1, 512), outbox.steps.put)
    for each in requests:
        engine.submit(each)
    with failing(idefics2, error, num_failures):
        engine.start()
        finishes = [outbox.finish(each.request_id) for each in requests]
        eventually(lambda: not engine.is_alive)
    assert {finish.reason for finish in finishes} == {Ended.FAILED}
    assert {finish.error.code for finish in finishes if finish.error} == {ErrorCode.INTERNAL}
    with pytest.raises(EngineDead):
        engine.submit(requests[0])
    engine.stop(timeout_s=1)


def test_a_long_queue_does_not_stall_a_running_stream(idefics2: TinyModel) -> None:
    """At most the prefill budget of prompt tokens is read between two tokens of a stream."""
    early = request(idefics2.inputs("early"), max_new_tokens=60)
    crowd = [request(idefics2.inputs(f"number {number}", [picture(number)]), max_new_tokens=2) for number in range(30)]
    outbox = Outbox()
    config = EngineConfig(max_num_seqs=40, max_model_len=512, max_num_batched_tokens=64)
    engine = Engine(idefics2.model, idefics2.tokenizer, config, outbox.steps.put)
    for each in [early, *crowd]:
        engine.submit(each)
    engine.start()
    prompts = {each.request_id: each.inputs.num_prompt_tokens for each in crowd}
    read_per_step: list[int] = []
    try:
        while not all(outbox.outputs[each.request_id] for each in crowd):
            firsts = [output for output in outbox.read() if output.is_first]
            read_per_step.append(sum(prompts.get(output.request_id, 0) for output in firsts))
        outbox.finish(early.request_id)
    finally:
        engine.stop(timeout_s=TIMEOUT_S)
    assert max(read_per_step) <= 64
    assert sum(read_per_step) == sum(prompts.values())
