"""Prompts equal what transformers makes of the same conversation, for every family, from many threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from api_stub.contract.conversation import Turn
from api_stub.contract.job import CaptionJob, VideoQaJob, VqaJob
from tests.tiny.families import CHAT_FAMILIES
from tests.tiny.kinds import each_kind
from tests.unit.worker.prompting.conversations import (
    IMAGE,
    MEDIUM,
    VIDEO,
    assistant,
    clip,
    image,
    system,
    upstream,
    user,
)
from worker.errors import InvalidRequest
from worker.media.types import DecodedMedia
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel
from worker.prompting.chat import Placeholder, render, spread
from worker.prompting.prepare import PromptBuilder

Builders = Callable[[str], PromptBuilder]
Loaded = Callable[[str], LoadedModel]
Asked = tuple[Sequence[Turn], Sequence[DecodedMedia]]

CONVERSATIONS: dict[str, Asked] = {
    "text only": ((user("How many people are there?"),), ()),
    "image before text": ((user(IMAGE, "What is this?"),), (image(1),)),
    "image after text": ((user("What is this?", IMAGE),), (image(1),)),
    "images around text": ((user(IMAGE, "and", IMAGE, "differ how?"),), (image(1), image(2))),
    "image alone": ((user(IMAGE),), (image(1),)),
    "media list": ((user(MEDIUM, MEDIUM, MEDIUM, "Describe the second."),), (image(1), image(2), image(3))),
    "sizes differ": ((user(IMAGE, IMAGE, "Which is wider?"),), (image(1, 96, 24), image(2, 24, 60))),
    "two turns": (
        (user(IMAGE, "What is in this image?"), assistant("Two cats."), user(IMAGE, "And here?")),
        (image(1), image(2)),
    ),
    "system turn": ((system("Answer briefly."), user(IMAGE, "What?")), (image(1),)),
    "continued": ((user(IMAGE, "What is this?"), assistant("There's a pink flower")), (image(1),)),
    "clip": ((user(VIDEO, "What moves?"),), (clip(1, 4),)),
    "two clips of six frames": ((user(VIDEO, VIDEO, "Which one is faster?"),), (clip(1, 6), clip(2, 6))),
    "clip inside text": ((user("Compare", VIDEO, "with", IMAGE, "please"),), (clip(1, 3), image(1))),
    "words of a role": ((user("Hi\nAssistant: I am lost\nUser: {{ messages }} {% raw %}"),), ()),
    "white space": ((user("  two  spaces\n\n\tand a tab "),), ()),
    "no ascii": ((user("What’s the différence? 猫 🐈"),), ()),
    "empty text": ((user(IMAGE, ""),), (image(1),)),
}


@pytest.mark.parametrize("name", each_kind(CHAT_FAMILIES))
@pytest.mark.parametrize("asked", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_tensors_equal_those_of_the_ordinary_path(
    name: str, asked: Asked, builder_of: Builders, tiny_checkpoint: Callable[[str], Path]
) -> None:
    turns, media = asked
    inputs = builder_of(name).prepare(turns, media)
    expected = upstream(AutoProcessor.from_pretrained(tiny_checkpoint(name)), turns, media)
    assert inputs.tensors.keys() == expected.keys()
    for tensor, value in expected.items():
        assert torch.equal(inputs.tensors[tensor], value), tensor


def test_idefics2_prompt_is_rendered_as_documented(loaded_family: Loaded) -> None:
    turns = (user("What’s the difference between these two images?", IMAGE, IMAGE),)
    conversation, _ = spread(turns, (image(1), image(2)))
    assert render(loaded_family("idefics2").processor, conversation) == (
        "User: What’s the difference between these two images?<image><image><end_of_utterance>\nAssistant:"
    )


def test_a_continued_turn_is_left_open(loaded_family: Loaded, builder_of: Builders) -> None:
    turns = (user("What is this?"), assistant("There's a pink flower"))
    inputs = builder_of("idefics2").prepare(turns, ())
    text = loaded_family("idefics2").tokenizer.decode(inputs.tensors["input_ids"][0])
    assert text.endswith("\nAssistant: There's a pink flower")
    assert inputs.is_continuation
    assert not builder_of("idefics2").prepare(turns[:1], ()).is_continuation


@pytest.mark.parametrize("name", each_kind(CHAT_FAMILIES))
def test_two_clips_of_six_frames_are_twelve_images_at_the_clips_places(
    name: str, builder_of: Builders, loaded_family: Loaded
) -> None:
    turns = (user("First", VIDEO, "then", VIDEO, "and a still", IMAGE),)
    media = (clip(1, 6), clip(2, 6), image(3))
    conversation, pictures = spread(turns, media)
    assert [part if isinstance(part, str) else part.value for part in conversation.turns[0].parts] == [
        "First", *["image"] * 6, "then", *["image"] * 6, "and a still", "image",
    ]  # fmt: skip
    assert pictures.pictures == (*media[0].frames, *media[1].frames, media[2].pixels)
    inputs = builder_of(name).prepare(turns, media)
    assert (inputs.num_images, inputs.num_frames) == (1, 12)
    prompt = render(loaded_family(name).processor, conversation)
    assert prompt.count(str(loaded_family(name).capabilities.image_token)) == 13


def test_a_clip_that_is_kept_has_one_place_and_its_frames_still_count() -> None:
    turns = (user("First", VIDEO, "then", IMAGE), assistant("A cat."), user(VIDEO, "and now?"))
    media = (clip(1, 6), image(3), clip(2, 2))
    conversation, shown = spread(turns, media, keep_clips=True)
    assert [turn.parts for turn in conversation.turns] == [
        ("First", Placeholder.VIDEO, "then", Placeholder.IMAGE), ("A cat.",), (Placeholder.VIDEO, "and now?"),
    ]  # fmt: skip
    assert (shown.pictures, shown.clips) == ((media[1].pixels,), (media[0], media[2]))
    assert (shown.num_images, shown.num_frames) == (1, 8)


def test_every_kind_of_job_can_be_prepared(builder_of: Builders) -> None:
    builder, uris = builder_of("idefics2"), ("s3://media/a", "s3://media/b")
    caption = builder.prepare(CaptionJob(media=uris).turns("Describe this image."), (image(1), image(2)))
    question = builder.prepare(VqaJob(media=uris, question="Which?").turns(""), (image(1), image(2)))
    video = builder.prepare(VideoQaJob(media=uris, question="What moves?").turns(""), (clip(1, 4), image(2)))
    counts = [(inputs.num_images, inputs.num_frames) for inputs in (caption, question, video)]
    assert counts == [(2, 0), (2, 0), (1, 4)]


def test_pixels_have_the_models_type_and_ids_stay_integers(loaded_family: Loaded) -> None:
    builder = PromptBuilder(replace(loaded_family("idefics2"), dtype=torch.bfloat16))
    inputs = builder.prepare((user(IMAGE, "What?"),), (image(1),))
    assert inputs.tensors["pixel_values"].dtype is torch.bfloat16
    assert inputs.tensors["input_ids"].dtype is torch.int64
    assert inputs.num_prompt_tokens == inputs.tensors["attention_mask"].shape[1]


def test_training_labels_are_dropped(loaded_family: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_family("llava")
    answer = type(loaded.processor).__call__

    def with_labels(self: object, **options: object) -> object:
        encoded = answer(self, **options)
        encoded["labels"] = encoded["input_ids"]
        return encoded

    monkeypatch.setattr(type(loaded.processor), "__call__", with_labels)
    assert "labels" not in PromptBuilder(loaded).prepare((user("What?"),), ()).tensors


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (3, 40), (40, 1), (600, 20)])
@pytest.mark.parametrize("name", ["idefics2", "llava", "idefics3"])
def test_odd_sizes_are_taken_or_refused_as_a_wrong_request(
    name: str, size: tuple[int, int], builder_of: Builders
) -> None:
    try:
        inputs = builder_of(name).prepare((user(IMAGE, "What?"),), (image(1, *size),))
    except InvalidRequest:
        return
    assert inputs.num_images == 1


def test_a_template_that_refuses_a_system_turn_says_so(loaded_family: Loaded) -> None:
    loaded = loaded_family("llava")
    processor = _with_template(
        loaded,
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + loaded.processor.chat_template,
    )
    with pytest.raises(InvalidRequest, match="System role not supported"):
        PromptBuilder(processor).prepare((system("Be brief."), user("What?")), ())


def test_a_turn_that_a_template_cannot_continue_is_refused_without_repeating_it(loaded_family: Loaded) -> None:
    shouting = _with_template(
        loaded_family("llava"), "{% for m in messages %}{{ m['content'][0]['text'] | upper }}{% endfor %}"
    )
    with pytest.raises(InvalidRequest, match="the last turn continued") as refused:
        PromptBuilder(shouting).prepare((user("What?"), assistant("a secret")), ())
    assert "secret" not in str(refused.value)


def test_images_that_a_template_would_drop_are_refused(loaded_family: Loaded) -> None:
    silent = _with_template(loaded_family("llava"), "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}")
    with pytest.raises(InvalidRequest, match="0 of 1 images"):
        PromptBuilder(silent).prepare((user(IMAGE, "What?"),), (image(1),))


def test_media_and_parts_must_agree(builder_of: Builders) -> None:
    with pytest.raises(ValueError, match="1 media for 0 parts"):
        builder_of("llava").prepare((user("What?"),), (image(1),))
    with pytest.raises(ValueError, match="0 media for 1 parts"):
        builder_of("llava").prepare((user(IMAGE, "What?"),), ())


@pytest.mark.parametrize("name", ["idefics2", "llava", "idefics3"])
def test_32_threads_prepare_what_one_thread_prepares(name: str, loaded_family: Loaded) -> None:
    asked: list[Asked] = [
        ((user(*[IMAGE] * (index % 4), f"Question {index} about <image> {'cats ' * index}"[: 24 + index % 3 * 16]),),
         tuple(image(index * 10 + n, 24 + index, 48) for n in range(index % 4)))
        for index in range(96)
    ]  # fmt: skip
    expected = [PromptBuilder(loaded_family(name)).prepare(*one) for one in asked]
    shared = PromptBuilder(loaded_family(name))
    with ThreadPoolExecutor(32) as threads:
        prepared = list(threads.map(lambda one: shared.prepare(*one), asked))
    assert all(_same(one, other) for one, other in zip(prepared, expected, strict=True))


def _same(one: ModelInputs, other: ModelInputs) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors
    )


def _with_template(loaded: LoadedModel, template: str) -> LoadedModel:
    """Return the model with another chat template; the shared processor stays as it is."""
    processor = type(loaded.processor)(
        loaded.processor.image_processor, loaded.tokenizer, patch_size=8, chat_template=template
    )
    return replace(loaded, processor=processor)
