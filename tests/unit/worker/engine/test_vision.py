"""The vision tower sees no picture twice, pictures of several requests together, and never one for another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny.families import build, picture, save
from tests.tiny.families import idefics2 as make_idefics2
from tests.tiny.jobs import TinyModel
from tests.unit.worker.engine.harness import request
from worker.engine.batch import VisionStats
from worker.engine.cache_scope import CacheScope
from worker.engine.config import PagedConfig, SchedulerLimits, VisionConfig
from worker.engine.core import EngineCore
from worker.engine.pictures import cut, tower_hooks
from worker.engine.request import Ended, Request, RequestOutput
from worker.engine.runner.build import build_runner
from worker.models.inputs import ModelInputs

PAGED = PagedConfig(block_size=4)
NO_CACHES = (PagedConfig(block_size=4, reuses_prefixes=False), VisionConfig(cache_bytes=0))
NEW_TOKENS = 6
NUM_QUESTIONS = 100


@dataclass
class Served:
    """Requests in a core, driven step by step."""

    core: EngineCore
    outputs: list[RequestOutput]
    requests: list[Request]

    @classmethod
    def by(
        cls, tiny: TinyModel, paged: PagedConfig | None = PAGED, vision: VisionConfig | None = None, num_seqs: int = 8
    ) -> Served:
        runner = build_runner(tiny.model, num_seqs, 512, paged, vision)
        limits = SchedulerLimits(num_seqs, 4 * num_seqs)
        return cls(EngineCore(tiny.model, tiny.tokenizer, runner, limits), [], [])

    @property
    def stats(self) -> VisionStats:
        return self.core.vision_stats()

    def add(self, inputs: ModelInputs, max_new_tokens: int = NEW_TOKENS) -> Request:
        generation = request(inputs, max_new_tokens=max_new_tokens)
        self.core.add(generation, submitted_at=0.0)
        found = self.core.scheduler.find(generation.request_id)
        assert found is not None
        self.requests.append(found)
        return found

    @torch.inference_mode()
    def step(self) -> None:
        self.outputs += self.core.step()

    def answer(self, *prompts: ModelInputs, max_new_tokens: int = NEW_TOKENS) -> list[list[int]]:
        """Answer prompts that wait together."""
        added = [self.add(inputs, max_new_tokens) for inputs in prompts]
        while not self.core.scheduler.is_idle:
            self.step()
        return [each.output_ids for each in added]


@contextmanager
def counted_work(tiny: TinyModel) -> Iterator[Counter[str]]:
    """Count what really goes through the model in the block: pictures and calls of the tower, tokens of the text."""
    done: Counter[str] = Counter()
    base = tiny.model.base_model

    def tower(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        done.update(calls=1, pictures=len(kwargs["pixel_values"]))

    def text(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        done["tokens"] += kwargs["inputs_embeds"].shape[1]

    hooks = [
        base.vision_model.register_forward_hook(tower, with_kwargs=True),
        tiny.model.get_decoder().register_forward_hook(text, with_kwargs=True),
    ]
    try:
        yield done
    finally:
        for hook in hooks:
            hook.remove()


def expected(tiny: TinyModel, *prompts: ModelInputs) -> list[list[int]]:
    return [tiny.generate(inputs, NEW_TOKENS) for inputs in prompts]


@pytest.fixture(scope="module")
def true_length(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """An Idefics2 whose images take as many tokens as the real one's."""
    return TinyModel("idefics2", save(lambda: make_idefics2(image_seq_len=64), tmp_path_factory.mktemp("idefics2-64")))


@pytest.mark.parametrize("paged", [PAGED, None], ids=["paged", "slots"])
def test_a_hundred_questions_about_one_image_run_the_tower_once(
    true_length: TinyModel, paged: PagedConfig | None
) -> None:
    """Paged blocks also spare four fifths of the text model's work; rows read every prompt in full."""
    prompts = [true_length.inputs(f"What is number {number}?", [picture(1)]) for number in range(NUM_QUESTIONS)]
    num_tokens = sum(inputs.num_prompt_tokens for inputs in prompts)

    served = Served.by(true_length, paged)
    with counted_work(true_length) as done:
        first = served.answer(prompts[0], max_new_tokens=1)
        said = first + served.answer(*prompts[1:], max_new_tokens=1)
    assert (done["calls"], done["pictures"]) == (1, 1)
    assert (served.stats.num_tower_calls, served.stats.num_encoded) == (1, 1)
    assert (served.stats.hits, served.stats.misses) == (NUM_QUESTIONS - 1, 1)
    if paged is None:
        assert done["tokens"] == num_tokens
        return
    assert done["tokens"] * 5 <= num_tokens
    reuse = served.core.prefix_stats()
    assert (reuse.num_queried_tokens, reuse.num_queried_tokens - reuse.num_reused_tokens) == (
        num_tokens,
        done["tokens"],
    )

    without = Served.by(true_length, *NO_CACHES)
    with counted_work(true_length) as without_caches:
        assert said == [without.answer(inputs, max_new_tokens=1)[0] for inputs in prompts]
    assert (without_caches["calls"], without_caches["tokens"]) == (NUM_QUESTIONS, num_tokens)


@pytest.mark.parametrize("paged", [PAGED, None], ids=["paged", "slots"])
@pytest.mark.parametrize("name", ["idefics2", "llava", "gemma3", "blip2"])
def test_images_that_look_alike_on_paper_never_share_anything(
    tiny_model: Callable[[str], TinyModel], name: str, paged: PagedConfig | None
) -> None:
    """Same size, same question, same moment; the second differs from the first in one pixel only."""
    tiny = tiny_model(name)
    almost = picture(1)
    almost.putpixel((24, 24), tuple(255 - value for value in almost.getpixel((24, 24))))
    prompts = [tiny.inputs("What is it?", [shown]) for shown in (picture(1), almost, picture(2))]
    served = Served.by(tiny, paged)
    assert served.answer(*prompts) == expected(tiny, *prompts)
    assert served.answer(*reversed(prompts)) == expected(tiny, *reversed(prompts))
    assert (served.stats.misses, served.stats.hits, served.stats.num_entries) == (3, 3, 3)


def test_a_key_covers_everything_that_the_tower_gets(tiny_model: Callable[[str], TinyModel]) -> None:
    tiny = tiny_model("idefics2")
    doors = tower_hooks(tiny.model)
    plain = dict(tiny.inputs("a", [picture(1)]).tensors)

    def key(**changed: torch.Tensor) -> bytes:
        (found,) = cut(doors, ModelInputs({**plain, **changed}), CacheScope())
        return found.key

    pixels, mask = plain["pixel_values"], plain["pixel_attention_mask"]
    one_value, one_less = pixels.clone(), mask.clone()
    one_value[0, 0, 2, 3, 4] = torch.nextafter(one_value[0, 0, 2, 3, 4], torch.tensor(9.0))
    one_less[0, 0, 5, 5] = 0
    changed = (key(pixel_values=one_value), key(pixel_attention_mask=one_less), key(pixel_values=pixels.bfloat16()))
    turned = key(pixel_values=pixels.transpose(-1, -2), pixel_attention_mask=mask.transpose(-1, -2))
    assert key() == key(pixel_values=pixels.clone(), input_ids=torch.tensor([[1, 2]]))
    assert len({key(), *changed, turned}) == 5


def test_frames_that_only_pad_a_clip_to_the_length_of_another_are_no_pictures(idefics2: TinyModel) -> None:
    """As SmolVLM's processor pads them: zeros, and a mask that counts them."""
    tensors = idefics2.inputs("a", [picture(1)]).tensors
    pixels, mask = tensors["pixel_values"], tensors["pixel_attention_mask"]
    clips = torch.cat((pixels.expand(1, 3, -1, -1, -1), torch.cat((pixels, torch.zeros_like(pixels[:, [0, 0]])), 1)))
    padded = {"pixel_values": clips, "pixel_attention_mask": mask[:, [0]].expand(2, 3, -1, -1)}
    found = cut(tower_hooks(idefics2.model), ModelInputs({**tensors, **padded}), CacheScope())
    assert len(found) == 4


@pytest.mark.parametrize("name", ["idefics2", "idefics2-splitting", "idefics3", "llava"])
def test_an_image_is_known_again_in_other_company(tiny_model: Callable[[str], TinyModel], name: str) -> None:
    """The other image is larger, so the processor pads this one where images of a prompt get one size."""
    tiny = tiny_model(name)
    shown, other = picture(1, 40, 32), picture(2, 64, 64)
    served = Served.by(tiny)
    served.answer(tiny.inputs("Compare.", [other, shown]))
    num_seen = served.stats.num_entries
    prompts = [tiny.inputs("What is it?", [shown]), tiny.inputs("Compare.", [shown, other])]
    assert served.answer(*prompts) == expected(tiny, *prompts)
    assert served.stats.num_entries == num_seen


@pytest.mark.parametrize("name", ["idefics2", "llava"])
def test_images_of_waiting_requests_are_seen_together_a_few_per_step(
    tiny_model: Callable[[str], TinyModel], name: str
) -> None:
    """Meanwhile the stream that runs gets its token in every step."""
    tiny = tiny_model(name)
    sizes = [(40, 40), (48, 40), (40, 48)]
    early, late = (
        [tiny.inputs("What is it?", [picture(seed, *sizes[seed % 3])]) for seed in range(start, start + count)]
        for start, count in ((100, 6), (0, 24))
    )
    per_image = len(cut(tower_hooks(tiny.model), late[0], CacheScope()))
    served = Served.by(tiny, vision=VisionConfig(max_pictures=4 * per_image), num_seqs=32)
    served.answer(*early)  # also tries whether they can be seen together
    stream = served.add(tiny.inputs("Tell a story."), max_new_tokens=60)
    served.step()
    waiting = [served.add(inputs) for inputs in late]
    before = served.stats
    while served.stats.num_encoded < before.num_encoded + len(late) * per_image:
        num_encoded, num_told = served.stats.num_encoded, len(stream.output_ids)
        served.step()
        assert 0 < served.stats.num_encoded - num_encoded <= 4 * per_image
        assert len(stream.output_ids) == num_told + 1
    while not served.core.scheduler.is_idle:
        served.step()
    assert served.stats.num_tower_calls - before.num_tower_calls <= len(late) / 2
    assert [each.output_ids for each in waiting] == expected(tiny, *late)


def test_features_do_not_pile_up_for_requests_that_wait_for_blocks(
    idefics2: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places are free but blocks are not, so the line moves slowly and the tower could run far ahead of it."""
    num_bytes = 4 * 64 * 4  # four tokens of 64 numbers
    monkeypatch.setattr("worker.engine.vision.stage.MAX_READY_BYTES", 3 * num_bytes)
    prompts = [idefics2.inputs("What is it?", [picture(seed)]) for seed in range(12)]
    few_blocks = PagedConfig(block_size=4, num_blocks=512 // 4 + 1)
    served = Served.by(idefics2, few_blocks, VisionConfig(cache_bytes=0, max_pictures=2), num_seqs=32)
    served.add(idefics2.inputs("long " * 84), max_new_tokens=60)
    added = [served.add(inputs) for inputs in prompts]
    num_ready = []
    while not served.core.scheduler.is_idle:
        served.step()
        waiting = [each for each in added if each.state == "waiting"]
        vision = served.core._runner._vision  # type: ignore[attr-defined]
        num_ready.append(sum(len(vision._needed[each].features) for each in waiting if each in vision._needed))
    assert [each.output_ids for each in added] == expected(idefics2, *prompts)
    assert 3 <= max(num_ready) <= 3 + 2 - 1


def test_one_image_in_many_waiting_requests_is_seen_once(idefics2: TinyModel) -> None:
    """Also without a cache, as far as they wait together."""
    prompts = [idefics2.inputs(f"What is number {number}?", [picture(1)]) for number in range(6)]
    served = Served.by(idefics2, vision=VisionConfig(cache_bytes=0))
    assert served.answer(*prompts) == expected(idefics2, *prompts)
    assert (served.stats.num_encoded, served.stats.num_entries) == (1, 0)


def test_the_cache_keeps_what_was_used_last_within_its_bytes(idefics2: TinyModel) -> None:
    prompts = [idefics2.inputs("What is it?", [picture(seed)]) for seed in range(5)]
    num_bytes = 4 * 64 * 4  # four tokens of 64 numbers
    served = Served.by(idefics2, vision=VisionConfig(cache_bytes=3 * num_bytes))
    for seed in (0, 1, 2, 0, 3, 0, 4):
        assert served.answer(prompts[seed]) == expected(idefics2, prompts[seed])
        assert served.stats.num_bytes <= 3 * num_bytes
    assert (served.stats.hits, served.stats.evictions, served.stats.num_entries) == (2, 2, 3)
    served.answer(prompts[0])
    assert served.stats.hits == 3


def test_a_picture_that_the_tower_refuses_fails_alone(idefics2: TinyModel) -> None:
    good = [idefics2.inputs("What is it?", [picture(seed)]) for seed in (1, 2)]
    wrong = {"pixel_values": good[0].tensors["pixel_values"][:, :, :2]}
    bad = replace(good[0], tensors={**good[0].tensors, **wrong})
    served = Served.by(idefics2)
    served.answer(*good[:1])
    refused, answered = served.add(bad), served.add(good[1])
    while not served.core.scheduler.is_idle:
        served.step()
    assert [answered.output_ids] == expected(idefics2, good[1])
    (finish,) = [each.finish for each in served.outputs if each.finish and each.request_id == refused.request_id]
    assert finish.reason is Ended.FAILED


@pytest.mark.parametrize("paged", [PAGED, None], ids=["paged", "slots"])
def test_a_model_whose_pictures_depend_on_each_other_gets_them_as_pixels(
    tmp_path: Path, paged: PagedConfig | None
) -> None:
    """A trial finds out; prompts of one picture are as good as ever, but nobody's are seen together."""
    tiny = TinyModel("llava", build("llava", tmp_path))
    honest = tiny.model.base_model.get_image_features

    @wraps(honest)
    def mixing(*args: Any, **kwargs: Any) -> Any:
        output = honest(*args, **kwargs)
        mean = torch.stack(list(output.pooler_output)).mean(0)
        output.pooler_output = [features + mean for features in output.pooler_output]
        return output

    tiny.model.base_model.get_image_features = mixing
    prompts = [tiny.inputs("Compare.", [picture(seed), picture(seed + 1)]) for seed in range(3)]
    prompts += [tiny.inputs("What is it?", [picture(seed)]) for seed in range(3)]
    served = Served.by(tiny, paged)
    assert served.answer(*prompts) == expected(tiny, *prompts)
    assert served.stats.num_entries == 3
