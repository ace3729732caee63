"""Limits for pixels: what a job asks for is what the model gets, made by the family's own processor, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

from api_stub.contract.job import CaptionJob, VqaJob
from api_stub.contract.media import MediaOptions
from tests.tiny.families import IDEFICS_TURNS, new_tokenizer
from tests.unit.worker.engine.harness import request, running_engine
from tests.unit.worker.prompting.conversations import IMAGE, VIDEO, clip, image, user
from worker.check import check
from worker.engine.config import PagedConfig
from worker.errors import CannotStart, InvalidRequest, PromptTooLong
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel
from worker.prompting.pixels import LongestEdge, NumTiles, PixelCounts, TilesOfLongestEdge
from worker.prompting.prepare import PromptBuilder
from worker.settings import WorkerSettings

Builders = Callable[[str], PromptBuilder]
Loaded = Callable[[str], LoadedModel]

LIMITED = ("idefics2", "idefics2-splitting", "idefics3")
FIXED = ("llava", "gemma3", "git", "blip2", "paligemma")
SHAPES = ((64, 64), (200, 50), (50, 200), (300, 300), (20, 30), (7, 7))
#: What a caller of the processor writes for the same limit.
UPSTREAM: dict[str, dict[int, dict[str, int]]] = {
    "idefics2": {1024: {"shortest_edge": 13, "longest_edge": 32}, 64: {"shortest_edge": 8, "longest_edge": 8}},
    "idefics2-splitting": {1280: {"shortest_edge": 8, "longest_edge": 16}},
    "idefics3": {1024: {"longest_edge": 32}, 4999: {"longest_edge": 32}, 5120: {"longest_edge": 64}},
}


def asked(seed: int, *sizes: tuple[int, int]) -> tuple[tuple[object, ...], tuple[object, ...]]:
    pictures = tuple(image(seed + number, *size) for number, size in enumerate(sizes))
    return (user(*[IMAGE] * len(sizes), "What is this?"),), pictures


def num_pixels(inputs: ModelInputs) -> int:
    return int(inputs.tensors["pixel_attention_mask"].sum())


@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_no_picture_gets_more_pixels_than_asked_save_for_one_patch_or_tile(
    name: str, size: tuple[int, int], builder_of: Builders
) -> None:
    builder = builder_of(name)
    assert builder.limits.pictures is not None
    least = builder.limits.pictures.least
    turns, media = asked(1, size)
    whole = num_pixels(builder.prepare(turns, media))
    for most in (1, 100, 700, 1024, 1500, 2500, 4999, 5120, 100_000):
        pixels = num_pixels(builder.prepare(turns, media, MediaOptions(max_pixels=most)))
        assert pixels <= max(most, least)
        assert pixels <= whole, "a most enlarges nothing"


@pytest.mark.parametrize("name", LIMITED)
def test_limited_pictures_are_what_the_processor_makes_and_answered_as_generate_does(
    name: str, builder_of: Builders, loaded_family: Loaded, tiny_checkpoint: Callable[[str], Path]
) -> None:
    loaded, builder = loaded_family(name), builder_of(name)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint(name))
    prompts, expected = [], []
    for most, size in UPSTREAM[name].items():
        for shapes in (((64, 64),), ((200, 50), (30, 90))):
            turns, media = asked(most, *shapes)
            inputs = builder.prepare(turns, media, MediaOptions(max_pixels=most))
            plain = builder.prepare(turns, media)
            text = "User:" + "<image>" * len(shapes) + "What is this?<end_of_utterance>\nAssistant:"
            made = processor(
                text=text,
                images=[[medium.pixels for medium in media]],
                images_kwargs={"size": size},
                return_tensors="pt",
            )
            assert inputs.tensors.keys() == made.keys()
            assert all(torch.equal(inputs.tensors[key], made[key]) for key in made)
            is_whole = size["longest_edge"] == 64
            assert inputs.tensors["pixel_values"].shape == plain.tensors["pixel_values"].shape or not is_whole
            with torch.inference_mode():
                tokens = loaded.model.generate(**made, max_new_tokens=12, do_sample=False)
            prompts.append(inputs)
            expected.append(loaded.tokenizer.decode(tokens[0, made["input_ids"].shape[1] :], skip_special_tokens=True))
            # The same picture without a limit is another job's: nothing cached may mix the two up.
            with torch.inference_mode():
                tokens = loaded.model.generate(**plain.tensors, max_new_tokens=12, do_sample=False)
            prompts.append(plain)
            expected.append(loaded.tokenizer.decode(tokens[0, plain.num_prompt_tokens :], skip_special_tokens=True))
    for paged in (None, PagedConfig(block_size=8)):
        requests = [request(inputs, 12) for inputs in prompts * 2]
        with running_engine(loaded, paged=paged) as (engine, outbox):
            for each in requests:
                engine.submit(each)
            for each in requests:
                assert outbox.finish(each.request_id).error is None
        assert [outbox.text(each.request_id) for each in requests] == [text.lstrip() for text in expected * 2]
    assert len(set(expected)) > len(expected) // 2


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_a_small_picture_is_enlarged_where_the_processor_can(size: tuple[int, int], builder_of: Builders) -> None:
    turns, media = asked(1, size)
    for least in (600, 1024, 2000, 3136):
        inputs = builder_of("idefics2").prepare(turns, media, MediaOptions(min_pixels=least))
        assert num_pixels(inputs) >= least
        both = builder_of("idefics2").prepare(turns, media, MediaOptions(min_pixels=least, max_pixels=3136))
        assert least <= num_pixels(both) <= 3136


def test_options_that_ask_nothing_change_nothing(builder_of: Builders) -> None:
    turns, media = asked(1, (64, 64))
    plain = builder_of("idefics2").prepare(turns, media)
    for options in (None, MediaOptions(), MediaOptions(max_pixels=10**6)):
        inputs = builder_of("idefics2").prepare(turns, media, options)
        assert all(torch.equal(inputs.tensors[key], plain.tensors[key]) for key in plain.tensors)


@pytest.mark.parametrize("name", FIXED)
def test_a_processor_that_takes_no_limit_refuses_it_by_field_and_model(
    name: str, builder_of: Builders, loaded_family: Loaded
) -> None:
    for field in ("min_pixels", "max_pixels"):
        options = MediaOptions.model_validate({field: 1000})
        reason = f"media_options.{field}: {type(loaded_family(name).model).__name__} cannot be asked for it"
        with pytest.raises(InvalidRequest, match=f"^{reason}"):
            builder_of(name).turns(CaptionJob(media=("s3://media/a.png",), media_options=options))
        with pytest.raises(InvalidRequest, match=f"^{reason}"):
            builder_of(name).prepare(*asked(1, (64, 64)), options)
        with pytest.raises(CannotStart, match=f"^VISIONQ_{field.upper()}=1000: "):
            PromptBuilder(loaded_family(name), options)


def test_a_minimum_is_refused_where_every_picture_is_enlarged_anyway(
    builder_of: Builders, loaded_family: Loaded
) -> None:
    with pytest.raises(InvalidRequest, match=r"^media_options.min_pixels: .* only max_pixels"):
        builder_of("idefics3").turns(VqaJob(question="Why?", media_options=MediaOptions(min_pixels=1)))
    with pytest.raises(CannotStart, match=r"^VISIONQ_MIN_PIXELS=1: .* only max_pixels"):
        PromptBuilder(loaded_family("idefics3"), MediaOptions(min_pixels=1))


def test_without_image_splitting_idefics3_makes_one_size_of_every_picture(loaded_family: Loaded) -> None:
    loaded = loaded_family("idefics3")
    processor = AutoProcessor.from_pretrained(loaded.model.name_or_path)
    processor.image_processor.do_image_splitting = False
    assert PromptBuilder(replace(loaded, processor=processor)).limits.pictures is None


def test_a_jobs_limits_lie_within_the_workers_and_absent_ones_are_the_workers(loaded_family: Loaded) -> None:
    builder = PromptBuilder(loaded_family("idefics2"), MediaOptions(min_pixels=400, max_pixels=1600))
    turns, media = asked(1, (300, 300))
    plain = PromptBuilder(loaded_family("idefics2"))
    for given, effective in (
        (None, MediaOptions(min_pixels=400, max_pixels=1600)),
        (MediaOptions(max_pixels=900), MediaOptions(min_pixels=400, max_pixels=900)),
        (MediaOptions(min_pixels=300), MediaOptions(min_pixels=400, max_pixels=1600)),
        (MediaOptions(min_pixels=900), MediaOptions(min_pixels=900, max_pixels=1600)),
    ):
        inputs, expected = builder.prepare(turns, media, given), plain.prepare(turns, media, effective)
        assert all(torch.equal(inputs.tensors[key], expected.tensors[key]) for key in expected.tensors)
    for refused, words in (
        (MediaOptions(max_pixels=1601), "max_pixels: 1601 is above the most that this worker gives a picture, 1600"),
        (MediaOptions(max_pixels=399), "max_pixels: 399 is below the least that this worker gives a picture, 400"),
        (MediaOptions(min_pixels=1601), "min_pixels: 1601 is above the most that this worker gives a picture, 1600"),
    ):
        with pytest.raises(InvalidRequest, match=f"^media_options.{words}"):
            builder.turns(CaptionJob(media=("s3://media/a.png",), media_options=refused))


def test_pictures_are_not_enlarged_beyond_what_a_job_may_have(loaded_family: Loaded) -> None:
    builder = PromptBuilder(loaded_family("idefics2"), max_job_pixels=5000)
    options = MediaOptions(min_pixels=1000)
    assert builder.prepare((user(VIDEO, "What?"),), (clip(1, 5),), options)
    with pytest.raises(InvalidRequest, match="6 pictures and frames of 1000 pixels are 6000, the limit is 5000"):
        builder.prepare((user(VIDEO, IMAGE, "What?"),), (clip(1, 5), image(2)), options)
    with pytest.raises(InvalidRequest, match=r"media_options: min_pixels of 4000 is above .* most, 3136"):
        builder.prepare(*asked(1, (64, 64)), MediaOptions(min_pixels=4000))


def smolvlm_sized(loaded: LoadedModel) -> PromptBuilder:
    """The tiny Idefics3 with SmolVLM's real sizes: 2048 pixels cut into tiles of 512, 64 tokens each."""
    image_processor = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}, do_image_splitting=True
    )
    processor = transformers.Idefics3Processor(
        image_processor, loaded.tokenizer, image_seq_len=64, chat_template=IDEFICS_TURNS
    )
    return PromptBuilder(replace(loaded, processor=processor))


def test_a_64_by_64_picture_costs_1128_tokens_at_smolvlms_sizes_and_few_with_a_limit(loaded_family: Loaded) -> None:
    builder = smolvlm_sized(loaded_family("idefics3"))
    assert builder.limits.pictures == TilesOfLongestEdge(512, 2048)
    cost = {
        most: builder.prepare(*asked(1, (64, 64)), most and MediaOptions(max_pixels=most)).num_media_tokens
        for most in (None, 2048 * 2048 * 2, 5 * 512 * 512, 512 * 512, 64 * 64)
    }
    # 17 tiles; 5 tiles; one tile. Their row and column marks are tokens too.
    assert list(cost.values()) == [1128, 1128, 334, 67, 67]


def with_words(text: str, named: dict[str, str] | None = None) -> transformers.PreTrainedTokenizerFast:
    return new_tokenizer(text.split(), bos="<s>", eos="</s>", pad="<pad>", adds_bos=False, named=named)


def llava_next() -> ProcessorMixin:
    grids = [[32, 32], [32, 64], [64, 32], [64, 64]]
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "image_grid_pinpoints": grids}
    return transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessorPil(**sizes), with_words("<image>"), patch_size=8,
        vision_feature_select_strategy="default", chat_template=IDEFICS_TURNS,
    )  # fmt: skip


def found(loaded: LoadedModel, processor: ProcessorMixin) -> PromptBuilder:
    """A builder for a processor alone: the model is another family's and is not run."""
    can = replace(loaded.capabilities, image_token=getattr(processor, "image_token", "<image>"))
    return PromptBuilder(replace(loaded, processor=processor, tokenizer=processor.tokenizer, capabilities=can))


def test_grids_that_the_models_own_config_repeats_take_no_limit(loaded_family: Loaded) -> None:
    assert found(loaded_family("llava"), llava_next()).limits.pictures is None


class Forgetful(transformers.Idefics2ImageProcessorPil):
    """Takes any size and keeps to its own."""

    def preprocess(self, images: Sequence[Image.Image], **options: object) -> object:
        options.pop("size", None)
        return super().preprocess(images, **options)


class Generous(transformers.Idefics2ImageProcessorPil):
    """Gives pictures somewhat more than is asked."""

    def preprocess(self, images: Sequence[Image.Image], **options: object) -> object:
        edges = dict(options.pop("size", None) or {})
        more = {name: edge + edge // 4 for name, edge in edges.items()}
        return super().preprocess(images, size=more or dict(self.size), **options)


@pytest.mark.parametrize("image_processor", [Forgetful, Generous])
def test_a_processor_that_takes_a_limit_and_does_not_keep_it_is_refused(
    image_processor: type[transformers.Idefics2ImageProcessorPil], loaded_family: Loaded
) -> None:
    loaded = loaded_family("idefics2")
    processor = AutoProcessor.from_pretrained(loaded.model.name_or_path)
    processor.image_processor = image_processor(size={"shortest_edge": 24, "longest_edge": 56})
    assert PromptBuilder(replace(loaded, processor=processor)).limits.pictures is None


def test_a_prompt_that_is_too_long_tells_what_its_media_cost_and_what_would_help(
    builder_of: Builders, loaded_family: Loaded
) -> None:
    helped, unhelped = builder_of("idefics3"), builder_of("idefics2")
    assert (helped.limits.least_tokens, unhelped.limits.least_tokens) == (7, None)
    for name, options, words in (
        ("idefics3", None, r"; 34 of the prompt's tokens are media \(media_options.max_pixels makes them fewer\)$"),
        ("idefics3", MediaOptions(max_pixels=1), "; 7 of the prompt's tokens are media$"),
        ("idefics2", None, "; 6 of the prompt's tokens are media$"),
    ):
        inputs = builder_of(name).prepare(*asked(1, (64, 64)), options)
        with running_engine(loaded_family(name), max_model_len=32) as (engine, _), pytest.raises(PromptTooLong) as long:
            engine.submit(request(inputs, 200))
        assert long.match(words)
    text = builder_of("idefics3").prepare((user("How many?"),), ())
    assert (text.num_media_tokens, text.cost_of_media) == (0, "")


def test_check_tells_what_its_picture_costs_and_which_limits_jobs_may_ask_for(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    told = check(WorkerSettings(model=str(tiny_checkpoint("idefics3"))))
    assert "tokens, 34 for a picture of 64×64\n" in told
    assert "media options        max_pixels; a picture has 1024 pixels and 7 tokens at least\n" in told
    told = check(WorkerSettings(model=str(tiny_checkpoint("idefics3")), max_pixels=1024))
    assert "tokens, 7 for a picture of 64×64\n" in told
    assert "media options        none: " in check(WorkerSettings(model=str(tiny_checkpoint("llava"))))
    with pytest.raises(CannotStart, match="VISIONQ_MAX_PIXELS=1024: LlavaForConditionalGeneration cannot be asked"):
        check(WorkerSettings(model=str(tiny_checkpoint("llava")), max_pixels=1024))


def test_ways_of_asking_are_computed_within_their_bounds() -> None:
    for most in range(1, 3000, 7):
        limits = MediaOptions(max_pixels=most)
        edge = LongestEdge(None, 980, 14).arguments(limits)["size"]["longest_edge"]
        assert edge % 14 == 0
        assert edge**2 <= max(most, 14**2) < (edge + 14) ** 2
        tiles = NumTiles(100, 12).arguments(limits)["max_patches"]
        assert tiles == 1 or (tiles + 1) * 100 <= most
        counts = PixelCounts(3136, 10**6, 784, step=2).arguments(limits, (3, 8))["size"]
        assert counts == {"shortest_edge": max(1, min(3136, most * 3 // 4)), "longest_edge": most * 3}
