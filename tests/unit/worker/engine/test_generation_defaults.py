"""A checkpoint's generation_config.json holds where a job says nothing: token by token what `generate` answers."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from api_stub.contract.result import FinishReason
from tests.tiny.families import picture
from tests.tiny.jobs import TinyModel, mixed_inputs
from tests.tiny.kinds import each_kind
from tests.unit.worker.engine.harness import TIMEOUT_S, Outbox, request
from worker.bootstrap import engine_config
from worker.check import check
from worker.engine.engine import Engine
from worker.engine.request import GenerationRequest, Request, RequestOutput
from worker.errors import CannotStart
from worker.models.inputs import ModelInputs
from worker.models.loader import load
from worker.settings import KVBackend, Switch, WorkerSettings

pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints:UserWarning")

NUM_PROMPTS = 5
MAX_NEW_TOKENS = 20
#: Jobs with a sampling of their own, which run beside those that are compared.
COMPANY: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "top_k": 9, "seed": 6, "stop": []},
    {"repetition_penalty": 1.0, "min_new_tokens": 0},
    {"temperature": 1.2, "top_p": 0.8, "min_new_tokens": 6, "seed": 7, "repetition_penalty": 2.0},
]
BACKENDS: dict[str, dict[str, Any]] = {
    "slots": {"kv_backend": KVBackend.SLOTS},
    "paged": {"kv_block_size": 4},
    "paged-ahead": {"kv_block_size": 4, "run_ahead": Switch.ON},
    # So few blocks that requests push each other out and are read again.
    "paged-preempting": {"kv_block_size": 4, "kv_blocks": 42, "max_model_len": 160, "run_ahead": Switch.ON},
}

Make = Callable[[str, Mapping[str, Any]], TinyModel]


@pytest.fixture
def make(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Make:
    """Return a function from a family and fields of a generation config to such a checkpoint."""

    def checkpoint(name: str, fields: Mapping[str, Any]) -> TinyModel:
        return with_fields(name, tiny_checkpoint(name), tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}", fields)

    return checkpoint


def with_fields(name: str, source: Path, folder: Path, fields: Mapping[str, Any]) -> TinyModel:
    """Copy a checkpoint into a new folder and give it fields of a generation config."""
    shutil.copytree(source, folder)
    path = folder / "generation_config.json"
    written = json.loads(path.read_text()) | dict(fields)
    del written["_from_model_config"]  # which keeps fields that transformers does not know away
    path.write_text(json.dumps(written))
    return TinyModel(name, folder)


@dataclass
class Answers:
    """What a run said, by request id."""

    tokens: dict[str, list[int]]
    outbox: Outbox
    num_preempted: int


def run(tiny: TinyModel, requests: Sequence[GenerationRequest], backend: str = "paged", **settings: Any) -> Answers:
    """Load the checkpoint as a worker does and have an engine answer everything at once."""
    given = {"model": str(tiny.directory), "device": "cpu", "max_num_seqs": 7, "max_model_len": 256}
    chosen = WorkerSettings(**(given | BACKENDS[backend] | settings))
    loaded, outbox, tokens = load(chosen), Outbox(), defaultdict(list)
    engine = Engine(loaded.model, loaded.tokenizer, engine_config(chosen, loaded), outbox.steps.put)
    assert engine.kv_backend == ("slots" if backend == "slots" or tiny.name == "git" else "paged")
    advance = engine._core._advance

    def noting(each: Request, now: float) -> RequestOutput | None:
        tokens[each.request_id].append(each.output_ids[-1])
        return advance(each, now)

    engine._core._advance = noting  # type: ignore[method-assign]
    engine.start()
    try:
        for each in requests:
            engine.submit(each)
        for each in requests:
            outbox.finish(each.request_id)
        return Answers(tokens, outbox, engine.num_preempted)
    finally:
        engine.stop(TIMEOUT_S)


def in_company(
    prompts: Sequence[ModelInputs], **sampling: Any
) -> tuple[list[GenerationRequest], list[GenerationRequest]]:
    """Return requests for the prompts, and the same mixed with others."""
    asked = [request(inputs, MAX_NEW_TOKENS, **sampling) for inputs in prompts]
    others = [request(prompts[n % len(prompts)], MAX_NEW_TOKENS, **each) for n, each in enumerate(COMPANY)]
    mixed = [*asked, *others]
    random.Random(3).shuffle(mixed)
    return asked, mixed


def generated(tiny: TinyModel, prompts: Sequence[ModelInputs], **sampling: Any) -> list[list[int]]:
    """Return what `generate` answers to each prompt alone."""
    return [tiny.generate(inputs, MAX_NEW_TOKENS, tokenizer=tiny.tokenizer, **sampling) for inputs in prompts]


def check_equal(tiny: TinyModel, prompts: Sequence[ModelInputs], backend: str, **sampling: Any) -> list[list[int]]:
    """Compare every prompt's tokens and text with `generate`; return the tokens."""
    expected = generated(tiny, prompts, **sampling)
    check_answers(tiny, prompts, backend, expected, **sampling)
    return expected


def check_answers(
    tiny: TinyModel, prompts: Sequence[ModelInputs], backend: str, expected: Sequence[list[int]], **sampling: Any
) -> None:
    """Compare every prompt's tokens and text with those of `generate`."""
    asked, mixed = in_company(prompts, **sampling)
    answers = run(tiny, mixed, backend)
    assert [answers.tokens[each.request_id] for each in asked] == expected
    is_short = any(len(tokens) < MAX_NEW_TOKENS for tokens in expected)
    assert backend != "paged-preempting" or is_short or answers.num_preempted > 0
    for each, tokens in zip(asked, expected, strict=True):
        ends, text = tiny.model.generation_config.eos_token_id, answers.outbox.text(each.request_id)
        said = tokens[:-1] if tokens[-1] in (ends if isinstance(ends, list) else [ends]) else tokens
        whole = tiny.tokenizer.decode(said, skip_special_tokens=True).lstrip()
        if answers.outbox.finish(each.request_id).reason is FinishReason.STOP_SEQUENCE:
            assert whole.startswith(text)
        else:
            assert text == whole


@dataclass(frozen=True)
class Plain:
    """What a checkpoint says that has end tokens only."""

    tiny: TinyModel
    prompts: list[ModelInputs]
    tokens: list[list[int]]

    @property
    def ends(self) -> list[int]:
        """Tokens that, as end tokens, cut some answers short; they come again and again."""
        first = {tokens[0] for tokens in self.tokens}
        later = Counter(token for tokens in self.tokens for token in tokens if token not in first)
        return [token for token, _ in later.most_common(3)]

    def words(self, number: int) -> str:
        """What can be read of an answer without half characters."""
        return max(self.tiny.tokenizer.decode(self.tokens[number]).split("\ufffd"), key=len)

    @property
    def image(self) -> int:
        """The id of a special token."""
        return int(self.tiny.tokenizer.convert_tokens_to_ids("<image>"))


@pytest.fixture(scope="module")
def plain(tiny_model: Callable[[str], TinyModel]) -> Plain:
    tiny = tiny_model("idefics2")
    prompts = mixed_inputs(tiny, NUM_PROMPTS)
    return Plain(tiny, prompts, [tiny.generate(inputs, MAX_NEW_TOKENS) for inputs in prompts])


def words(plain: Plain) -> list[list[int]]:
    """Sequences of two and three tokens that plain answers hold, and a single one."""
    first, second, third, *_ = plain.tokens
    return [first[2:4], second[4:7], third[5:6], first[8:10], [third[3], third[7]]]


#: Fields, and the fields that the same checkpoint has without them.
FIELDS: dict[str, Callable[[Plain], tuple[dict[str, Any], dict[str, Any]]]] = {
    "repetition_penalty": lambda plain: ({"repetition_penalty": 1.7}, {}),
    "encoder_repetition_penalty": lambda plain: ({"encoder_repetition_penalty": 3.0}, {}),
    "no_repeat_ngram_size": lambda plain: ({"no_repeat_ngram_size": 2}, {}),
    "no_repeat_ngram_size of one": lambda plain: ({"no_repeat_ngram_size": 1}, {}),
    "encoder_no_repeat_ngram_size": lambda plain: ({"encoder_no_repeat_ngram_size": 1}, {}),
    "bad_words_ids": lambda plain: ({"bad_words_ids": words(plain)[:4]}, {}),
    "sequence_bias": lambda plain: (
        {"sequence_bias": [[ids, -3.5] for ids in words(plain)[:4]] + [[[plain.tokens[3][6]], 2.5]]}, {},
    ),
    "suppress_tokens": lambda plain: ({"suppress_tokens": [-1, *(tokens[2] for tokens in plain.tokens)]}, {}),
    "begin_suppress_tokens": lambda plain: ({"begin_suppress_tokens": [tokens[0] for tokens in plain.tokens]}, {}),
    "forced_eos_token_id": lambda plain: ({"forced_eos_token_id": 7}, {}),
    "forced_eos_token_id as a list": lambda plain: ({"forced_eos_token_id": [9, 8]}, {}),
    "min_new_tokens": lambda plain: (
        {"min_new_tokens": 9, "eos_token_id": plain.ends}, {"eos_token_id": plain.ends},
    ),
    "min_new_tokens beyond the maximum": lambda plain: (
        {"min_new_tokens": 900, "eos_token_id": plain.ends}, {"eos_token_id": plain.ends},
    ),
    "min_length": lambda plain: (
        {"min_length": plain.prompts[2].num_prompt_tokens + 7, "eos_token_id": plain.ends},
        {"eos_token_id": plain.ends},
    ),
    "exponential_decay_length_penalty": lambda plain: (
        {"exponential_decay_length_penalty": [4, 1.6], "eos_token_id": [11, 12]}, {"eos_token_id": [11, 12]},
    ),
    "stop_strings": lambda plain: (
        {"stop_strings": [plain.words(number)[1:3] for number in range(3)]}, {},
    ),
    "a stop string that is a special token": lambda plain: (
        {"stop_strings": "<image>", "sequence_bias": [[[plain.tokens[0][1], plain.image], 90.0]]},
        {"sequence_bias": [[[plain.tokens[0][1], plain.image], 90.0]]},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def of_field(
    plain: Plain, tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[TinyModel, list[list[int]]]]:
    """Return a function from a field to the checkpoint that has it, and what that generates: other than without it."""

    @cache
    def checkpoint(field: str) -> tuple[TinyModel, list[list[int]]]:
        fields, without = FIELDS[field](plain)
        folder, source = tmp_path_factory.mktemp("field"), tiny_checkpoint("idefics2")
        tiny = with_fields("idefics2", source, folder / "with", fields)
        expected = generated(tiny, plain.prompts)
        bare = generated(with_fields("idefics2", source, folder / "bare", without), plain.prompts) if without else None
        assert expected != (plain.tokens if bare is None else bare)
        return tiny, expected

    return checkpoint


#: One that looks at the prompt and the answer, one that looks at the length, one that looks at the text.
FIELDS_OF_EACH_KIND = ("no_repeat_ngram_size", "min_new_tokens", "stop_strings")


@pytest.mark.parametrize("field", each_kind(FIELDS, always=FIELDS_OF_EACH_KIND))
@pytest.mark.parametrize("backend", each_kind(["slots", "paged-preempting"], always=["paged-preempting"]))
def test_a_field_of_the_checkpoint_changes_answers_as_it_does_those_of_generate(
    plain: Plain, of_field: Callable[[str], tuple[TinyModel, list[list[int]]]], field: str, backend: str
) -> None:
    tiny, expected = of_field(field)
    check_answers(tiny, plain.prompts, backend, expected)


FAMILY_FIELDS = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "suppress_tokens": [40, 50, 60, 70, 80]}


@pytest.mark.parametrize("name", each_kind(["llava", "idefics3", "gemma3", "paligemma", "git"], always=["llava"]))
def test_other_families_follow_their_checkpoints_too(
    tiny_model: Callable[[str], TinyModel], make: Make, name: str
) -> None:
    prompts = mixed_inputs(tiny_model(name), 3)
    told = check_equal(make(name, FAMILY_FIELDS), prompts, "paged-ahead")
    assert told != [tiny_model(name).generate(inputs, MAX_NEW_TOKENS) for inputs in prompts]


def test_a_first_token_is_forced_after_a_prompt_of_one_token_only(
    tiny_model: Callable[[str], TinyModel], make: Make
) -> None:
    """GIT's captions begin so; what may not begin an answer may not follow the forced token then."""
    git = tiny_model("git")
    long = git.inputs("What is it?", [picture(1)])
    start = {
        name: value[:, :1] if name in ("input_ids", "attention_mask") else value for name, value in long.tensors.items()
    }
    prompts = [long, ModelInputs(start, num_images=1)]
    assert prompts[1].num_prompt_tokens == 1
    forced = make("git", {"forced_bos_token_id": 33})
    told = check_equal(forced, prompts, "slots")
    assert told[1][0] == 33
    assert told[0] == git.generate(long, MAX_NEW_TOKENS)
    behind = make("git", {"forced_bos_token_id": 33, "begin_suppress_tokens": [33, told[1][1], told[0][0]]})
    assert check_equal(behind, prompts, "slots")[1][:2] not in ([33, told[1][1]], [33, 33])


def test_a_model_that_hands_over_to_another_generate_ignores_what_generate_ignores(
    tiny_model: Callable[[str], TinyModel], make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    blip2 = make("blip2", {"repetition_penalty": 4.0, "suppress_tokens": list(range(30, 90))})
    prompts = mixed_inputs(blip2, 2)
    told = check_equal(blip2, prompts, "paged")
    assert told == [tiny_model("blip2").generate(inputs, MAX_NEW_TOKENS) for inputs in prompts]
    assert ignored(caplog) == ["repetition_penalty, suppress_tokens"]


def test_the_end_tokens_of_the_model_that_generates_count(tiny_model: Callable[[str], TinyModel], make: Make) -> None:
    """BLIP-2 hands over to its language model, whose own generation config names the end."""
    prompts = mixed_inputs(tiny_model("blip2"), 3)
    told = [tiny_model("blip2").generate(inputs, MAX_NEW_TOKENS) for inputs in prompts]
    early = make("blip2", {"eos_token_id": [tokens[2] for tokens in told]})
    for is_inner in (False, True):
        if is_inner:
            config = json.loads((early.directory / "config.json").read_text())
            config["text_config"]["eos_token_id"] = told[0][2]
            (early.directory / "config.json").write_text(json.dumps(config))
            early = TinyModel("blip2", early.directory)
        expected = [early.generate(inputs, MAX_NEW_TOKENS) for inputs in prompts]
        assert (expected == told) is not is_inner
        requests = [request(inputs, max_new_tokens=MAX_NEW_TOKENS) for inputs in prompts]
        answers = run(early, requests)
        assert [answers.tokens[each.request_id] for each in requests] == expected


def random_fields(plain: Plain, chance: random.Random) -> dict[str, Any]:
    """Return some fields at random; tokens are those that answers hold."""
    said = [token for tokens in plain.tokens for token in tokens]

    def some(most: int) -> list[int]:
        return chance.sample(said, chance.randint(1, most))

    def sequences() -> list[list[int]]:
        return [chance.choice([some(3), tokens[3 : 3 + chance.randint(1, 3)]]) for tokens in plain.tokens]

    ends = some(3)
    every: dict[str, Any] = {
        "repetition_penalty": chance.choice([0.8, 1.3, 2.5]),
        "encoder_repetition_penalty": chance.choice([0.5, 1.5]),
        "no_repeat_ngram_size": chance.randint(1, 4),
        "encoder_no_repeat_ngram_size": chance.randint(1, 3),
        "bad_words_ids": [*sequences(), ends[:1]],
        "sequence_bias": [[ids, chance.uniform(-4, 4)] for ids in sequences()],
        "suppress_tokens": some(9),
        "begin_suppress_tokens": some(9),
        "forced_bos_token_id": some(1)[0],
        "forced_eos_token_id": chance.choice([ends, said[0]]),
        "min_new_tokens": chance.randint(1, 15),
        "min_length": chance.randint(20, 60),
        "remove_invalid_values": True,
        "exponential_decay_length_penalty": [chance.randint(0, 8), chance.uniform(0.8, 1.3)],
        "stop_strings": [plain.words(chance.randrange(NUM_PROMPTS))[:2] or "e"],
        "renormalize_logits": True,
    }
    every["suppress_tokens"] = [token for token in every["suppress_tokens"] if token not in (*ends, said[0])]
    names = chance.sample(sorted(every), chance.randint(2, 7))
    return {"eos_token_id": ends, **{name: every[name] for name in names}}


@pytest.mark.parametrize("seed", each_kind(range(16), always=[0]))
def test_fields_together_equal_generate(plain: Plain, make: Make, seed: int) -> None:
    chance = random.Random(seed)
    backend = list(BACKENDS)[seed % 3]
    check_equal(make("idefics2", random_fields(plain, chance)), plain.prompts, backend)


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.0}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 0.6}),
        ({"min_new_tokens": 15}, {"min_new_tokens": 0}),
        ({"min_length": 70}, {"min_new_tokens": 0}),
        ({"min_new_tokens": 15}, {"min_new_tokens": 7}),
    ],
    ids=str,
)
def test_what_a_job_says_beats_the_checkpoint(
    plain: Plain, make: Make, fields: dict[str, Any], own: dict[str, Any]
) -> None:
    """A neutral value that is given is said too."""
    checkpoint = make("idefics2", {"eos_token_id": plain.ends, **fields})
    told = check_equal(checkpoint, plain.prompts, "paged-ahead", **own)
    assert told != [checkpoint.generate(inputs, MAX_NEW_TOKENS) for inputs in plain.prompts]


@pytest.mark.parametrize("own", [(), ("never to be seen",)])
def test_stop_strings_of_a_job_replace_those_of_the_checkpoint(plain: Plain, make: Make, own: tuple[str, ...]) -> None:
    stopping = make("idefics2", {"stop_strings": [plain.words(0)[1:3]]})
    each = request(plain.prompts[0], MAX_NEW_TOKENS, stop=list(own))
    assert run(stopping, [each]).tokens[each.request_id] == plain.tokens[0]


def test_a_stop_string_of_the_checkpoint_is_left_out_of_the_text(plain: Plain, make: Make) -> None:
    stop = plain.words(0)[2:4]
    each = request(plain.prompts[0], MAX_NEW_TOKENS)
    answers = run(make("idefics2", {"stop_strings": stop}), [each])
    whole = plain.tiny.tokenizer.decode(plain.tokens[0], skip_special_tokens=True)
    assert answers.outbox.text(each.request_id) == whole[: whole.index(stop)].lstrip()
    assert answers.outbox.finish(each.request_id).reason == "stop_sequence"


def test_a_stop_string_may_begin_in_the_prompt_and_be_white_space(plain: Plain, make: Make) -> None:
    """`generate` looks at the last tokens, whoever wrote them. The prompt ends in `Assistant:`."""
    tokenizer = plain.tiny.tokenizer
    line = tokenizer.encode("\n", add_special_tokens=False)
    first = {"sequence_bias": [[[tokenizer.convert_tokens_to_ids(":"), *line], 200.0]]}
    for stop in (":\n", "\n"):
        checkpoint = make("idefics2", {**first, "stop_strings": stop})
        told = check_equal(checkpoint, plain.prompts, "paged")
        assert told == [line] * NUM_PROMPTS
    assert check_equal(make("idefics2", first), plain.prompts, "paged")[0][:2] != line


def test_off_leaves_the_end_tokens_only(plain: Plain, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    fields = {name: value for make_fields in FIELDS.values() for name, value in make_fields(plain)[0].items()}
    checkpoint = make("idefics2", fields | {"eos_token_id": plain.ends, "num_beams": 3})
    asked = [request(inputs, MAX_NEW_TOKENS) for inputs in plain.prompts]
    told = run(checkpoint, asked, generation_config="off")
    ended = make("idefics2", {"eos_token_id": plain.ends})
    assert [told.tokens[each.request_id] for each in asked] == [
        ended.generate(inputs, MAX_NEW_TOKENS) for inputs in plain.prompts
    ]
    assert ignored(caplog) == []


def ignored(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what each warning names."""
    heads = [record.getMessage().partition("generation_config fields ignored: ") for record in caplog.records]
    return [names for _, head, names in heads if head]


def test_what_is_not_followed_is_named_once(plain: Plain, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """What changes no greedy text, or asks for nothing, is not."""
    fields = {
        "num_beams": 4, "penalty_alpha": 0.6, "guidance_scale": 1.5, "my_own_field": 3, "top_h": 0.4, "max_time": 9.0,
        "prompt_lookup_num_tokens": 3, "repetition_penalty": 1.2, "do_sample": True, "temperature": 0.6, "top_p": 0.9,
        "top_k": 20, "min_p": 0.1, "max_length": 50, "max_new_tokens": 30, "use_cache": False, "length_penalty": 0.5,
        "typical_p": 1.0, "num_return_sequences": 1, "cache_implementation": "static", "no_repeat_ngram_size": 0,
    }  # fmt: skip
    each = request(plain.prompts[0], MAX_NEW_TOKENS)
    run(make("idefics2", fields), [each, request(plain.prompts[1])])
    assert ignored(caplog) == [
        "guidance_scale, max_time, my_own_field, num_beams, penalty_alpha, prompt_lookup_num_tokens, top_h"
    ]


def test_a_checkpoint_without_the_file_says_it_in_its_config(plain: Plain, make: Make) -> None:
    """transformers takes generation fields out of config.json then."""
    checkpoint = make("idefics2", {})
    (checkpoint.directory / "generation_config.json").unlink()
    path = checkpoint.directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.7, "eos_token_id": [2]}))
    assert check_equal(checkpoint, plain.prompts, "paged") != plain.tokens


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", -1.0),
        ("no_repeat_ngram_size", "two"),
        ("bad_words_ids", [3]),
        ("sequence_bias", [[[3], "much"]]),
        ("suppress_tokens", [1.5]),
        ("forced_eos_token_id", 1_000_000),
        ("stop_strings", [""]),
    ],
)
def test_a_value_that_nobody_can_follow_refuses_to_start(make: Make, field: str, value: object) -> None:
    settings = {"model": str(make("idefics2", {field: value}).directory), "device": "cpu"}
    with pytest.raises(CannotStart, match=field) as refusal:
        load(WorkerSettings(**settings))
    assert "VISIONQ_GENERATION_CONFIG=off" in str(refusal.value)
    load(WorkerSettings(**settings, generation_config="off"))


@pytest.mark.parametrize(
    ("fields", "choice", "line"),
    [
        ({}, "auto", "end tokens only"),
        ({"min_length": -1, "no_repeat_ngram_size": 0, "bad_words_ids": []}, "auto", "end tokens only"),
        ({"num_beams": 2, "top_k": 3}, "auto", "end tokens only; ignored: num_beams"),
        (
            {"repetition_penalty": 1.5, "suppress_tokens": [4, 5], "num_beams": 2},
            "auto",
            "repetition_penalty 1.5, suppress_tokens (4, 5); ignored: num_beams",
        ),
        ({"repetition_penalty": 1.5, "num_beams": 2}, "off", "off: end tokens only"),
    ],
)
def test_check_tells_what_counts_and_what_does_not(make: Make, fields: dict[str, Any], choice: str, line: str) -> None:
    report = check(
        WorkerSettings(model=str(make("idefics2", fields).directory), device="cpu", generation_config=choice)
    )
    assert [each.split(maxsplit=2)[2] for each in report.splitlines() if each.startswith("generation config")] == [line]
