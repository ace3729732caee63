"""Prompts of families with native video equal what transformers' own chat path makes of the same conversation."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from tests.tiny.families import CHAT_FAMILIES, picture
from tests.tiny.torchvision_families import VIDEO_FAMILIES
from tests.unit.worker.prompting import test_literals as literals
from tests.unit.worker.prompting.conversations import IMAGE, VIDEO, assistant, clip, image, system, upstream, user
from tests.unit.worker.prompting.test_prepare import CONVERSATIONS, Asked
from worker.media.types import DecodedClip
from worker.models.capabilities import probe
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel
from worker.prompting.prepare import PromptBuilder

Builders = Callable[[str], PromptBuilder]
Loaded = Callable[[str], LoadedModel]

WITH_CLIPS: dict[str, Asked] = {
    "clip": ((user(VIDEO, "What moves?"),), (clip(1, 4),)),
    "odd number of frames": ((user(VIDEO, "What moves?"),), (clip(1, 5),)),
    "clip inside text": ((user("In", VIDEO, "what moves?"),), (clip(1, 4),)),
    "two clips": ((user("First", VIDEO, "then", VIDEO, "which is faster?"),), (clip(1, 4), clip(2, 4))),
    "clips in two turns": (
        (system("Be brief."), user(VIDEO, "What?"), assistant("A cat."), user("And", VIDEO, "here?")),
        (clip(1, 2), clip(2, 2)),
    ),
    "continued": ((user(VIDEO, "What moves?"), assistant("There's a")), (clip(1, 4),)),
}
LENGTHS_DIFFER: Asked = ((user(VIDEO, VIDEO, "Which is longer?"),), (clip(1, 6), clip(2, 3)))
MIXED: Asked = (
    (user(IMAGE, "Compare", VIDEO, "with", IMAGE, "and", VIDEO, "please"),),
    (image(1), clip(1, 4), image(2, 64, 32), clip(2, 4)),
)
#: SmolVLM gives images and clips to the model under one name, so its clips beside images are frames.
CANNOT_MIX = {"smolvlm"}
#: LLaVA-OneVision stacks clips, so clips of different lengths are frames.
CANNOT_MIX_LENGTHS = {"onevision"}


def assert_same(inputs: ModelInputs, expected: dict[str, torch.Tensor]) -> None:
    assert inputs.tensors.keys() == expected.keys()
    for tensor, value in expected.items():
        assert torch.equal(inputs.tensors[tensor], value), tensor


@pytest.mark.parametrize("name", [*VIDEO_FAMILIES, *CHAT_FAMILIES])
def test_conversations_with_images_equal_the_ordinary_path(
    name: str, builder_of: Builders, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """The families that need no torchvision too: with it their image processors are others."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint(name))
    assert "Pil" not in type(processor.image_processor).__name__
    for turns, media in CONVERSATIONS.values():
        if not any(isinstance(medium, DecodedClip) for medium in media):
            assert_same(builder_of(name).prepare(turns, media), upstream(processor, turns, media))


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
@pytest.mark.parametrize("asked", WITH_CLIPS.values(), ids=WITH_CLIPS.keys())
def test_clips_equal_the_ordinary_path(
    name: str, asked: Asked, builder_of: Builders, tiny_checkpoint: Callable[[str], Path]
) -> None:
    turns, media = asked
    processor = AutoProcessor.from_pretrained(tiny_checkpoint(name))
    inputs = builder_of(name).prepare(turns, media)
    assert_same(inputs, upstream(processor, turns, media, keep_clips=True))
    clips = [medium for medium in media if isinstance(medium, DecodedClip)]
    assert (inputs.num_images, inputs.num_frames) == (0, sum(len(clip.frames) for clip in clips))


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_images_and_clips_mix_where_the_family_can_and_clips_are_frames_elsewhere(
    name: str, builder_of: Builders, loaded_family: Loaded, tiny_checkpoint: Callable[[str], Path]
) -> None:
    can = loaded_family(name).capabilities
    assert can.native_video
    assert (can.can_mix_media, can.can_mix_lengths) == (name not in CANNOT_MIX, name not in CANNOT_MIX_LENGTHS)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint(name))
    for (turns, media), keep_clips in ((MIXED, can.can_mix_media), (LENGTHS_DIFFER, can.can_mix_lengths)):
        inputs = builder_of(name).prepare(turns, media)
        assert_same(inputs, upstream(processor, turns, media, keep_clips=keep_clips))
    inputs = builder_of(name).prepare(*MIXED)
    assert (inputs.num_images, inputs.num_frames) == (2, 8)


def test_templates_without_a_place_for_clips_get_frames(loaded_family: Loaded) -> None:
    loaded = loaded_family("qwen2-vl")
    processor = AutoProcessor.from_pretrained(loaded.model.name_or_path)
    processor.chat_template = processor.chat_template.replace("part['type'] == 'video'", "false")
    capabilities = probe(processor, loaded.model.config)
    assert not capabilities.native_video
    inputs = PromptBuilder(replace(loaded, processor=processor, capabilities=capabilities)).prepare(
        (user(VIDEO, "What moves?"),), (clip(1, 3),)
    )
    assert inputs.tensors["image_grid_thw"].shape[0] == inputs.num_frames == 3


def test_a_video_processor_that_cannot_process_is_not_used(
    loaded_family: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_family("qwen2-vl")
    processor = AutoProcessor.from_pretrained(loaded.model.name_or_path)

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no frames today")

    monkeypatch.setattr(type(processor.video_processor), "preprocess", fail)
    assert not probe(processor, loaded.model.config).native_video


@pytest.mark.parametrize("name", ["qwen3-vl", "smolvlm"])
def test_32_threads_prepare_what_one_thread_prepares(name: str, builder_of: Builders) -> None:
    """Processors write into the metadata that they are given."""
    asked: list[Asked] = [
        ((user("See <video>", *[VIDEO] * (1 + number % 2)),), [clip(number, 2 + number % 3)] * (1 + number % 2))
        for number in range(48)
    ]
    expected = [builder_of(name).prepare(*one) for one in asked]
    with ThreadPoolExecutor(32) as threads:
        prepared = list(threads.map(lambda one: builder_of(name).prepare(*one), asked))
    for one, other in zip(prepared, expected, strict=True):
        assert_same(one, dict(other.tensors))


def timed_clip(times_s: tuple[float, ...], duration_s: float, fps: float) -> DecodedClip:
    return DecodedClip(tuple(picture(seed) for seed in range(len(times_s))), times_s, duration_s, fps)


@pytest.mark.parametrize("fps", [0.0, 25.0])
def test_the_times_of_frames_reach_the_prompt_with_and_without_a_known_frame_rate(
    fps: float, builder_of: Builders, loaded_family: Loaded
) -> None:
    asked = timed_clip((0.0, 20.0, 60.0, 80.0), 100.0, fps)

    def prompt(name: str) -> str:
        ids = builder_of(name).prepare((user(VIDEO, "What moves?"),), (asked,)).tensors["input_ids"][0]
        return str(loaded_family(name).tokenizer.decode(ids))

    assert re.findall(r"Frame from (\d\d:\d\d):", prompt("smolvlm")) == ["00:00", "00:20", "01:00", "01:20"]
    assert "four frames from a 0:01:40 [H:MM:SS] video" in prompt("smolvlm")
    # Pairs of frames, each pair at its mean time.
    assert re.findall(r"<([\d.]+) seconds>", prompt("qwen3-vl")) == ["10.0", "70.0"]
    spacing = builder_of("qwen2.5-vl").prepare((user(VIDEO, "What?"),), (asked,)).tensors["second_per_grid_ts"]
    assert spacing.tolist() == pytest.approx([2 * 100.0 / 4])


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_a_clip_of_one_frame_and_one_whose_frames_change_size_are_taken(name: str, builder_of: Builders) -> None:
    one = builder_of(name).prepare((user(VIDEO, "What?"),), (clip(1, 1),))
    assert one.num_frames == 1
    frames = (picture(1, 48, 48), picture(2, 64, 32))
    assert builder_of(name).prepare((user(VIDEO, "?"),), (DecodedClip(frames, (0.0, 1.0), 2.0, 1.0),)).num_frames == 2


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_literals_stay_text(name: str, loaded_family: Loaded, builder_of: Builders) -> None:
    literals.test_every_added_token_of_a_family_stays_text_anywhere(name, loaded_family, builder_of)
    literals.test_all_literals_at_once_beside_images_in_every_turn_stay_text(name, loaded_family, builder_of)
    literals.test_a_literal_cut_in_two_parts_stays_text(name, loaded_family, builder_of)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_literals_beside_clips_stay_text_also_those_that_only_the_processor_knows(
    name: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    loaded, builder = loaded_family(name), builder_of(name)
    for literal in {*loaded.tokenizer.get_added_vocab(), "<video>", str(loaded.capabilities.video_token)}:
        for text in (literal, f"why {literal} here", f"{literal}{literal}"):
            literals.assert_stays_text(loaded, builder, text, lambda words: (user(VIDEO, words),), (clip(1, 2),))
            literals.assert_stays_text(loaded, builder, text, lambda words: (user(words),), ())
