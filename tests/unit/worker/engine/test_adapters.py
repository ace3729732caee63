"""Adapters in one batch: each answer is PEFT's with that adapter, each answer of the base is the base's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tests.tiny.adapters import with_noisy_adapters
from tests.tiny.families import FAMILIES, picture
from tests.tiny.jobs import TinyModel, mixed_inputs
from tests.tiny.kinds import each_kind
from tests.unit.worker.engine.harness import request, running_engine
from tests.unit.worker.engine.recorder import TapeRecorder
from tests.unit.worker.engine.test_parity import BACKENDS, LIMITS, MAX_MODEL_LEN, run_with_random_arrivals
from worker.engine.batch import Chunk
from worker.engine.cache_scope import CacheScope
from worker.engine.config import PagedConfig, SchedulerLimits
from worker.engine.core import EngineCore
from worker.engine.model_hooks import ModelHooks
from worker.engine.request import Request
from worker.engine.runner.build import build_runner
from worker.engine.runner.cuda_graphs import DecodeGraphs, graph_sizes
from worker.engine.runner.dense import DenseRunner
from worker.engine.runner.paged import PagedRunner
from worker.engine.runner.prefill import PrefixKeys, capture
from worker.errors import CannotStart, InvalidRequest
from worker.models.adapter import read_adapter
from worker.models.inputs import LoadedAdapter, ModelInputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

OWNERS = ("", "one", "two", "three")
#: Layers of the text models' attention and MLPs by the names that the tiny families give them.
TARGETS = r".*(text_model|language_model|git\.encoder)\..*\.(q_proj|v_proj|down_proj|query|value|fc2)"
NUM_JOBS = 24
NUM_TOKENS = 10


@dataclass(frozen=True)
class Adapted:
    """Three adapters of a tiny model, the model, and what PEFT's own `generate` says with each of them and without."""

    tiny: TinyModel
    adapters: tuple[LoadedAdapter, ...]
    inputs: tuple[ModelInputs, ...]
    owners: tuple[str, ...]
    expected: Mapping[tuple[int, str], list[int]]

    def generate(self, number: int) -> list[int]:
        return self.expected[number, self.owners[number]]


@pytest.fixture(scope="session")
def adapted(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Adapted]:
    """Return a function from a family's name to its tiny model with adapters."""

    @cache
    def make(name: str) -> Adapted:
        tiny, folder = TinyModel(name, tiny_checkpoint(name)), tmp_path_factory.mktemp(f"{name}-adapters")
        write_adapters(TinyModel(name, tiny_checkpoint(name)), folder, TARGETS)
        trained = TinyModel(name, tiny_checkpoint(name))
        peft = with_adapters(trained, TARGETS)
        inputs = tuple(mixed_inputs(tiny, NUM_JOBS))
        owners = tuple(OWNERS[number % 4] for number in range(NUM_JOBS))
        expected = {}
        for number, prompt in enumerate(inputs):
            for owner in OWNERS if number < 4 else owners[number : number + 1]:
                if owner:
                    peft.set_adapter(owner)
                    expected[number, owner] = trained.generate(prompt, NUM_TOKENS)
                else:
                    with peft.disable_adapter():
                        expected[number, owner] = trained.generate(prompt, NUM_TOKENS)
        adapters = tuple(
            read_adapter(owner, folder / owner).beside(tiny.model, owner, f"digest of {owner}") for owner in OWNERS[1:]
        )
        return Adapted(tiny, adapters, inputs, owners, expected)

    return make


def with_adapters(tiny: TinyModel, targets: str) -> PeftModel:
    """Let PEFT put three adapters of noise, of different ranks, into a model."""
    ranks = dict(zip(OWNERS[1:], (4, 2, 6), strict=True))
    return with_noisy_adapters(tiny.model, ranks, targets=targets, std=0.25, base="base", seed=11)


def write_adapters(tiny: TinyModel, folder: Path, targets: str) -> None:
    with_adapters(tiny, targets).save_pretrained(folder, save_embedding_layers=False)  # else it looks on the hub


@contextmanager
def serving(
    adapted: Adapted, paged: PagedConfig | None, max_num_seqs: int = LIMITS.max_num_seqs, length: int = MAX_MODEL_LEN
) -> Iterator[PagedRunner | DenseRunner]:
    """Prove a back end with the adapters and leave the model as it was afterwards."""
    trials = adapted.inputs[:2]
    runner = build_runner(
        adapted.tiny.model, max_num_seqs, length, paged, trials=trials, adapters=adapted.adapters, checkpoint="base"
    )
    try:
        yield runner
    finally:
        assert runner.adapters is not None
        runner.adapters.remove()


def answers(adapted: Adapted, core: EngineCore) -> list[list[int]]:
    """Ask the core all prompts, each of its owner, arriving at random; return the tokens it chose."""
    requests = [
        replace(request(prompt, max_new_tokens=NUM_TOKENS), adapter=owner)
        for prompt, owner in zip(adapted.inputs, adapted.owners, strict=True)
    ]
    found: dict[str, Request] = {}
    add = core.scheduler.add
    core.scheduler.add = lambda each: (found.__setitem__(each.request_id, each), add(each))[1]  # type: ignore[method-assign]
    run_with_random_arrivals(core, requests, set(), seed=5)
    return [found[each.request_id].output_ids for each in requests]


@pytest.mark.parametrize("backend", each_kind(BACKENDS, always=("slots", "paged-ahead")))
@pytest.mark.parametrize("name", each_kind(FAMILIES, always=("idefics2", "llava", "gemma3", "git")))
def test_three_adapters_and_the_base_in_one_batch_answer_as_peft_does(
    adapted: Callable[[str], Adapted], name: str, backend: str
) -> None:
    one = adapted(name)
    assert len({tuple(one.expected[0, owner]) for owner in OWNERS}) == 4, "adapters that answer differently"
    with serving(one, BACKENDS[backend]) as runner:
        assert isinstance(runner, DenseRunner if backend == "slots" or name == "git" else PagedRunner)
        core = EngineCore(one.tiny.model, one.tiny.tokenizer, runner, LIMITS, runs_ahead=backend == "paged-ahead")
        said = answers(one, core)
    assert said == [one.generate(number) for number in range(NUM_JOBS)]


def test_requests_that_are_sent_back_keep_their_adapter(adapted: Callable[[str], Adapted]) -> None:
    """So few blocks that streams push each other out."""
    one = adapted("llava")
    longest = max(inputs.num_prompt_tokens for inputs in one.inputs) + NUM_TOKENS
    with serving(one, PagedConfig(block_size=4, num_blocks=longest // 4 + 4), 7, longest) as runner:
        core = EngineCore(one.tiny.model, one.tiny.tokenizer, runner, LIMITS, runs_ahead=True)
        said = answers(one, core)
        assert core.scheduler.num_preempted >= 3
    assert said == [one.generate(number) for number in range(NUM_JOBS)]


def test_recorded_steps_apply_adapters(adapted: Callable[[str], Adapted]) -> None:
    """Steps with rows of adapters and steps of the base alone are recorded apart."""
    one = adapted("idefics2")
    with serving(one, PagedConfig(block_size=8)) as runner:
        assert isinstance(runner, PagedRunner)
        recorder = TapeRecorder()
        runner._graphs = DecodeGraphs(runner._forward, graph_sizes(4), 64, torch.device("cpu"), recorder)
        with torch.inference_mode():
            runner._graphs.record()
        assert recorder.num_recorded == 2 * len(graph_sizes(4))
        core = EngineCore(one.tiny.model, one.tiny.tokenizer, runner, LIMITS, runs_ahead=True)
        said = answers(one, core)
        assert recorder.num_replayed > 5
    assert said == [one.generate(number) for number in range(NUM_JOBS)]


@torch.inference_mode()
def test_blocks_of_one_adapter_are_never_found_by_another(adapted: Callable[[str], Adapted]) -> None:
    """The same prompt four times over: its keys and values differ with whom they were computed for."""
    one = adapted("idefics2")
    with serving(one, PagedConfig(block_size=4)) as runner:
        core = EngineCore(one.tiny.model, one.tiny.tokenizer, runner, SchedulerLimits(7, 24))
        reused = []
        for owner in (*OWNERS, *OWNERS):
            core.add(generation := replace(request(one.inputs[0], NUM_TOKENS), adapter=owner), submitted_at=0.0)
            state = core.scheduler.find(generation.request_id)
            assert state is not None
            while not core.scheduler.is_idle:
                core.step()
            assert state.output_ids == one.expected[0, owner]
            reused.append(runner.prefix_stats().num_reused_tokens)
    assert reused[:4] == [0, 0, 0, 0]
    assert reused[7] > reused[6] > reused[5] > reused[4] > 0


@torch.inference_mode()
def test_keys_of_prefixes_and_pictures_begin_with_their_scope(idefics2: TinyModel) -> None:
    hooks, prefixes, inputs = ModelHooks(idefics2.model), PrefixKeys(), idefics2.inputs("What is it?", [picture(1)])
    prompt = capture(hooks, hooks.on_device(inputs))
    scopes = [CacheScope(), CacheScope("b"), CacheScope("b", "a"), CacheScope("b", "a", "s"), CacheScope("b", "", "a")]
    keys = [prefixes.keys(prompt, 4, scope)[0] for scope in scopes]
    assert len(set(keys)) == len(scopes)

    def pictures(checkpoint: str, adapter: str) -> list[bytes]:
        adapters = [LoadedAdapter("some", adapter, {})] if adapter else []
        runner = build_runner(idefics2.model, 2, 128, None, adapters=adapters, checkpoint=checkpoint)
        generation = replace(request(inputs), adapter="some" if adapter else "")
        return [each.key for each in runner.cut(generation)]

    assert pictures("b", "") == pictures("b", "")
    assert pictures("b", "") != pictures("c", "")
    assert pictures("b", "") == pictures("b", "a"), "no adapter changes what the tower sees"


@torch.inference_mode()
@pytest.mark.parametrize("backend", ["slots", "paged"])
def test_logits_of_a_row_do_not_depend_on_the_adapters_beside_it(
    adapted: Callable[[str], Adapted], backend: str
) -> None:
    """Bit for bit: the same batch with the other rows' adapters, and without them."""
    one = adapted("llava")
    with serving(one, BACKENDS[backend]) as runner:
        beside = step_logits(runner, one, ["one", "", "two", "three"])
        for number, owner in enumerate(["one", "", "two", "three"]):
            alone = step_logits(runner, one, [owner if place == number else "" for place in range(4)])
            assert torch.equal(beside[number], alone[number]), owner
        base = step_logits(runner, one, ["", "", "", ""])
    assert torch.equal(beside[1], base[1])
    plain = build_runner(one.tiny.model, LIMITS.max_num_seqs, MAX_MODEL_LEN, BACKENDS[backend])
    assert torch.equal(base, step_logits(plain, one, ["", "", "", ""]))


def step_logits(runner: PagedRunner | DenseRunner, adapted: Adapted, owners: list[str]) -> Tensor:
    """Return the logits [B, V] of one decode step of B rows behind the same prompt."""
    requests = []
    for owner in owners:
        generation = replace(request(adapted.inputs[0], NUM_TOKENS), adapter=owner)
        requests.append(Request(generation, submitted_at=0.0, pictures=runner.cut(generation)))
    for each in requests:
        runner.look_ahead([each])
        runner.allocate(each)
        made = runner.run([*(Chunk(other, 1) for other in requests if other.output_ids), Chunk(each, each.num_unread)])
        assert not made.failed
        for told in made.requests:
            told.output_ids.append(5)
            runner.append(told)
    step = runner.run([Chunk(each, 1) for each in requests])
    assert step.logits is not None
    logits = step.logits.clone()
    for each in requests:
        runner.free(each)
    return logits


def test_an_engine_takes_requests_of_its_adapters_only(adapted: Callable[[str], Adapted]) -> None:
    one = adapted("llava")
    before = num_hooks(one)
    with running_engine(one.tiny, paged=PagedConfig(), adapters=one.adapters) as (engine, outbox):
        assert num_hooks(one) == before + len({name for each in one.adapters for name in each.factors})
        with pytest.raises(InvalidRequest, match="no adapter 'four' is served here, only one, two, three"):
            engine.submit(replace(request(one.inputs[0]), adapter="four"))
        engine.submit(asked := replace(request(one.inputs[0], NUM_TOKENS), adapter="two"))
        outbox.finish(asked.request_id)
        text = one.tiny.tokenizer.decode(one.expected[0, "two"], skip_special_tokens=True).lstrip()
        assert outbox.text(asked.request_id) == text
    assert num_hooks(one) == before, "left as it was"
    with running_engine(one.tiny, paged=PagedConfig()) as (engine, _):
        assert num_hooks(one) == before, "without adapters no line of theirs runs"
        with pytest.raises(InvalidRequest, match="no adapter 'two' is served here, only none"):
            engine.submit(replace(request(one.inputs[0]), adapter="two"))


def num_hooks(adapted: Adapted) -> int:
    """Return the hooks on the layers of the text model that an adapter could change."""
    model = adapted.tiny.model
    return sum(len(module._forward_hooks) for module in model.modules() if isinstance(module, torch.nn.Linear))


@pytest.mark.parametrize(
    ("targets", "refused"),
    [
        (r".*vision_tower.*q_proj", "vision_tower"),
        (r".*multi_modal_projector.linear_1", "multi_modal_projector"),
        ("lm_head", "lm_head"),
    ],
)
def test_adapters_of_other_layers_than_the_text_models_are_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, targets: str, refused: str
) -> None:
    write_adapters(TinyModel("llava", tiny_checkpoint("llava")), tmp_path, targets)
    model = TinyModel("llava", tiny_checkpoint("llava")).model
    adapter = read_adapter("one", tmp_path / "one").beside(model, "one", "digest")
    with pytest.raises(CannotStart, match=rf"VISIONQ_ADAPTERS: one: \S*{refused}\S* is no linear layer of the text"):
        build_runner(model, 2, 128, None, adapters=[adapter])


def test_factors_that_are_not_finite_are_refused(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Zero times infinity would be no number, in every other row too."""
    tiny = TinyModel("llava", tiny_checkpoint("llava"))
    peft = with_adapters(tiny, TARGETS)
    next(weight for key, weight in peft.named_parameters() if "lora_A.one" in key).data[0, 0] = float("inf")
    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(CannotStart, match="its factors have values that are not finite in"):
        read_adapter("one", tmp_path / "one").beside(
            TinyModel("llava", tiny_checkpoint("llava")).model, "one", "digest"
        )
