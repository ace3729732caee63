"""Limits for pixels in the families whose processors need torchvision: pictures, and every frame of native clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoProcessor, ProcessorMixin

from api_stub.contract.media import MediaOptions
from tests.tiny.families import IDEFICS_TURNS
from tests.unit.worker.engine.harness import request, running_engine
from tests.unit.worker.prompting import test_pixels as pixels
from tests.unit.worker.prompting.conversations import IMAGE, VIDEO, clip, image, metadata_of, user
from tests.unit.worker.prompting.test_pixels import asked, found, with_words
from worker.engine.config import PagedConfig
from worker.errors import CannotStart, InvalidRequest
from worker.media.types import DecodedClip
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel, load
from worker.prompting.pixels import FixedSize, LongestEdge, NumTiles, PixelCounts
from worker.prompting.prepare import PromptBuilder
from worker.settings import WorkerSettings

Builders = Callable[[str], PromptBuilder]
Loaded = Callable[[str], LoadedModel]

QWEN = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
LIMITS = (
    MediaOptions(max_pixels=1024),
    MediaOptions(max_pixels=1500),
    MediaOptions(min_pixels=3500),
    MediaOptions(max_pixels=9216),
    MediaOptions(min_pixels=2048, max_pixels=6400),
)


def size_of(limits: MediaOptions, own: tuple[int, int], frames: int = 1) -> dict[str, int]:
    """What a caller of the processor writes for the same limits."""
    least = own[0] if limits.min_pixels is None else limits.min_pixels * frames
    most = own[1] if limits.max_pixels is None else limits.max_pixels * frames
    return {"shortest_edge": min(least, most), "longest_edge": most}


def answers(loaded: LoadedModel, prompts: list[ModelInputs]) -> tuple[list[str], list[str]]:
    """What an engine says to all of them at once, and `generate` to each alone."""
    expected = []
    for inputs in prompts:
        with torch.inference_mode():
            tokens = loaded.model.generate(**inputs.tensors, max_new_tokens=8, do_sample=False)
        expected.append(loaded.tokenizer.decode(tokens[0, inputs.num_prompt_tokens :], skip_special_tokens=True))
    requests = [request(inputs, 8) for inputs in prompts]
    with running_engine(loaded, max_model_len=1024, paged=PagedConfig(block_size=8)) as (engine, outbox):
        for each in requests:
            engine.submit(each)
        for each in requests:
            assert outbox.finish(each.request_id).error is None
    return [outbox.text(each.request_id) for each in requests], [text.lstrip() for text in expected]


@pytest.mark.parametrize("name", QWEN)
def test_pictures_are_what_the_processor_makes_of_the_same_limits_and_answered_as_generate_does(
    name: str, builder_of: Builders, loaded_family: Loaded, tiny_checkpoint: Callable[[str], Path]
) -> None:
    builder, processor = builder_of(name), AutoProcessor.from_pretrained(tiny_checkpoint(name))
    own = processor.image_processor.size
    prompts = []
    for size in ((40, 40), (200, 100), (64, 256)):
        turns, media = asked(1, size)
        prompts.append(plain := builder.prepare(turns, media))
        for limits in LIMITS:
            inputs = builder.prepare(turns, media, limits)
            made = processor(
                text=processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
                    add_generation_prompt=True,
                ),
                images=[media[0].pixels],
                images_kwargs={"size": size_of(limits, (own["shortest_edge"], own["longest_edge"]))},
                return_tensors="pt",
            )
            assert all(torch.equal(inputs.tensors[key], made[key]) for key in inputs.tensors)
            _, height, width = inputs.tensors["image_grid_thw"][0].tolist()
            assert height * width * 64 <= (limits.max_pixels or 10**9)
            # A larger picture is rounded down from the most, whatever the least is.
            assert height * width * 64 >= (limits.min_pixels or 0) or size != (40, 40)
            assert inputs.num_media_tokens - plain.num_media_tokens == (
                inputs.num_prompt_tokens - plain.num_prompt_tokens
            )
            prompts.append(inputs)
    said, expected = answers(loaded_family(name), prompts)
    assert said == expected


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("size", [(64, 64), (200, 50), (300, 300), (20, 30), (7, 7), (30, 40)], ids=str)
def test_no_picture_gets_more_pixels_than_asked(name: str, size: tuple[int, int], builder_of: Builders) -> None:
    for most in (64, 256, 257, 300, 500, 900, 1100, 2000, 100_000):
        inputs = builder_of(name).prepare(*asked(1, size), MediaOptions(max_pixels=most))
        _, height, width = inputs.tensors["image_grid_thw"][0].tolist()
        assert height * width * 64 <= max(most, 256 if size != (200, 50) else 1024)


@pytest.mark.parametrize(("patch", "least"), [(14, 3136), (16, 65_536)])
def test_a_checkpoints_own_least_near_the_limit_gives_small_pictures_no_more(
    patch: int, least: int, loaded_family: Loaded
) -> None:
    loaded = loaded_family("qwen2-vl")
    processor = AutoProcessor.from_pretrained(loaded.model.name_or_path)
    size = {"shortest_edge": least, "longest_edge": 16_777_216}
    processor.image_processor = transformers.Qwen2VLImageProcessor(size=size, patch_size=patch)
    unit = (2 * patch) ** 2
    builder = PromptBuilder(replace(loaded, processor=processor))
    assert builder.limits.pictures == PixelCounts(least, 16_777_216, unit)
    assert builder.limits.clips is not None
    for most in (least // 2, least + least // 8, 2 * least):
        for shown in ((30, 40), (90, 90), (300, 200)):
            inputs = builder.prepare(*asked(1, shown), MediaOptions(max_pixels=most))
            _, height, width = inputs.tensors["image_grid_thw"][0].tolist()
            assert height * width * patch**2 <= most, "edges are rounded up to the least"


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("num_frames", [2, 3, 4, 5, 8, 9])
def test_every_frame_of_a_clip_stays_within_the_limits_for_any_number_of_frames(
    name: str, num_frames: int, builder_of: Builders
) -> None:
    for limits in LIMITS:
        inputs = builder_of(name).prepare((user(VIDEO, "What?"),), (clip(1, num_frames),), limits)
        _, height, width = inputs.tensors["video_grid_thw"][0].tolist()
        assert height * width * 64 <= (limits.max_pixels or 10**9)
        assert height * width * 64 >= (limits.min_pixels or 0)


@pytest.mark.parametrize("name", QWEN)
def test_clips_are_what_the_processor_makes_of_the_same_limits_and_answered_as_generate_does(
    name: str, builder_of: Builders, loaded_family: Loaded, tiny_checkpoint: Callable[[str], Path]
) -> None:
    builder, processor = builder_of(name), AutoProcessor.from_pretrained(tiny_checkpoint(name))
    own = processor.video_processor.size
    shown, prompts = clip(1, 4), []
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}],
        add_generation_prompt=True,
    )
    for limits in LIMITS:
        inputs = builder.prepare((user(VIDEO, "What moves?"),), (shown,), limits)
        frames = 4 if name == "qwen3-vl" else 1
        made = processor(
            text=prompt,
            videos=[list(shown.frames)],
            video_metadata=[metadata_of(shown)],
            do_sample_frames=False,
            videos_kwargs={"size": size_of(limits, (own["shortest_edge"], own["longest_edge"]), frames)},
            return_tensors="pt",
        )
        assert all(torch.equal(inputs.tensors[key], made[key]) for key in inputs.tensors)
        prompts.append(inputs)
    mixed = (user(IMAGE, VIDEO, "and", VIDEO, "?"),), (image(3, 90, 40), clip(1, 5), clip(2, 2))
    prompts += [builder.prepare(*mixed, limits) for limits in (None, *LIMITS)]
    said, expected = answers(loaded_family(name), prompts)
    assert said == expected


@pytest.mark.parametrize("name", QWEN)
def test_clips_of_different_lengths_in_one_prompt_all_stay_below_the_most(name: str, builder_of: Builders) -> None:
    media: tuple[DecodedClip, ...] = (clip(1, 3), clip(2, 8))
    inputs = builder_of(name).prepare((user(VIDEO, VIDEO, "?"),), media, MediaOptions(max_pixels=1024))
    assert all(height * width * 64 <= 1024 for _, height, width in inputs.tensors["video_grid_thw"].tolist())


def test_smolvlms_pictures_take_a_most_and_its_clips_have_one_tile_per_frame_anyway(builder_of: Builders) -> None:
    builder = builder_of("smolvlm")
    assert (builder.limits.clips, builder.limits.least_tokens) == (FixedSize(32 * 32), 7)
    options = MediaOptions(max_pixels=1024)
    assert builder.prepare(*asked(1, (64, 64)), options).tensors["pixel_values"].shape[1] == 1
    asked_clip = (user(VIDEO, "What?"),), (clip(1, 4),)
    inputs, plain = builder.prepare(*asked_clip, options), builder.prepare(*asked_clip)
    assert all(torch.equal(inputs.tensors[key], plain.tensors[key]) for key in plain.tensors)


def test_onevisions_grids_take_no_limit(builder_of: Builders, loaded_family: Loaded) -> None:
    with pytest.raises(InvalidRequest, match=r"media_options.max_pixels: LlavaOnevisionForConditionalGeneration"):
        builder_of("onevision").prepare(*asked(1, (64, 64)), MediaOptions(max_pixels=1024))
    with pytest.raises(CannotStart, match="VISIONQ_MAX_PIXELS=1024"):
        PromptBuilder(loaded_family("onevision"), MediaOptions(max_pixels=1024))


@pytest.mark.parametrize("name", pixels.LIMITED)
def test_the_other_families_keep_their_limits_with_torchvision_too(name: str, builder_of: Builders) -> None:
    for size in pixels.SHAPES:
        pixels.test_no_picture_gets_more_pixels_than_asked_save_for_one_patch_or_tile(name, size, builder_of)


def pixtral(spatial_merge_size: int) -> ProcessorMixin:
    sizes = {"size": {"longest_edge": 256}, "patch_size": {"height": 16, "width": 16}}
    return transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(**sizes), with_words("[IMG] [IMG_BREAK] [IMG_END]"), patch_size=16,
        spatial_merge_size=spatial_merge_size, chat_template=IDEFICS_TURNS.replace("<image>", "[IMG]"),
    )  # fmt: skip


def internvl() -> ProcessorMixin:
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = with_words("<img> </img> <IMG_CONTEXT> <video>", names)
    tiles = transformers.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, max_patches=12)
    return transformers.InternVLProcessor(
        tiles, tokenizer, transformers.InternVLVideoProcessor(size={"height": 32, "width": 32}), image_seq_length=4,
        chat_template=IDEFICS_TURNS.replace("<image>", "<IMG_CONTEXT>"),
    )  # fmt: skip


def aya() -> ProcessorMixin:
    words = "<image> <|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> TILE TILE_GLOBAL"
    tiles = transformers.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, max_patches=6)
    return transformers.AyaVisionProcessor(
        tiles, with_words(words), patch_size=14, img_size=28, chat_template=IDEFICS_TURNS
    )


def glm4v() -> ProcessorMixin:
    tokens = [f"<|{kind}|>" for kind in ("image", "video")]
    tokens += [f"<|{end}_of_{kind}|>" for end in ("begin", "end") for kind in ("image", "video")]
    size = {"shortest_edge": 2 * 784, "longest_edge": 2 * 784 * 1000}
    return transformers.Glm4vProcessor(
        transformers.Glm4vImageProcessor(size=size), with_words(" ".join(tokens)), transformers.Glm4vVideoProcessor(),
        chat_template=IDEFICS_TURNS.replace("<image>", "<|image|>"),
    )  # fmt: skip


FOREIGN: dict[str, tuple[Callable[[], ProcessorMixin], object]] = {
    "pixtral": (lambda: pixtral(1), LongestEdge(None, 256, 16)),
    "mistral3": (lambda: pixtral(2), LongestEdge(None, 256, 32)),
    "aya": (aya, NumTiles(28 * 28, 6)),
    # It counts a picture as two frames.
    "glm4v": (glm4v, PixelCounts(2 * 784, 2 * 784 * 1000, 784, factor=2)),
    "internvl": (internvl, NumTiles(32 * 32, 12)),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("make", "way"), FOREIGN.values(), ids=FOREIGN.keys())
def test_processors_of_other_families_are_found_out_by_trial(
    make: Callable[[], ProcessorMixin], way: object, loaded_family: Loaded
) -> None:
    builder = found(loaded_family("llava"), make())
    assert builder.limits.pictures == way
    assert builder.limits.least_tokens is not None


def test_an_operators_template_is_taken_for_clips_too_where_the_processor_has_one_of_its_own(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    template = AutoProcessor.from_pretrained(tiny_checkpoint("smolvlm")).chat_template
    (file := tmp_path / "own.jinja").write_text("Other. " + template)
    loaded = load(WorkerSettings(model=str(tiny_checkpoint("smolvlm")), chat_template=file))
    assert loaded.capabilities.native_video
    for turns, media in (((user(IMAGE, "a"),), (image(1),)), ((user(VIDEO, "a"),), (clip(1, 2),))):
        ids = PromptBuilder(loaded).prepare(turns, media).tensors["input_ids"][0]
        assert loaded.tokenizer.decode(ids).startswith("Other. ")
