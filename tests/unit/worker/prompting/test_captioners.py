"""GIT, BLIP-2 and PaliGemma, asked the way their families are: prompts, answers, and what they refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from api_stub.contract.conversation import Message
from api_stub.contract.job import CaptionJob, Job, VideoQaJob, VqaJob
from tests.tiny.families import picture
from tests.unit.worker.engine.harness import request, running_engine
from tests.unit.worker.prompting.conversations import IMAGE, assistant, clip, image, user
from worker.errors import CannotStart, InvalidRequest
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel
from worker.prompting.prepare import PromptBuilder

# PaliGemma's processor makes labels in a way NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Builders = Callable[[str], PromptBuilder]
Loaded = Callable[[str], LoadedModel]

CAPTIONERS = ("git", "blip2", "paligemma")
URI, OTHER_URI = "s3://media/a.png", "s3://media/b.png"
TEXTS = ("", "a photo of", "Question: how many people? Answer:", "What’s this?\n猫")


def upstream(loaded: LoadedModel, images: Sequence[Image.Image], text: str) -> Mapping[str, Any]:
    """Return the arguments of `generate` as each family's model card passes them; nothing that may be left out."""
    processor, name = loaded.processor, type(loaded.processor).__name__
    if name == "PaliGemmaProcessor":
        return dict(processor(text="<image>" * len(images) + text, images=images, return_tensors="pt"))
    pixels = dict(processor(images=images, return_tensors="pt"))
    if not text:
        return pixels
    if name == "GitProcessor":
        ids = [loaded.tokenizer.bos_token_id, *processor.tokenizer(text, add_special_tokens=False).input_ids]
        return {"input_ids": torch.tensor([ids]), **pixels}
    return dict(processor(images=images, text=text, return_tensors="pt"))


def sequential(loaded: LoadedModel, images: Sequence[Image.Image], text: str, max_new_tokens: int) -> list[int]:
    """Return the new tokens of `generate`."""
    arguments = dict(upstream(loaded, images, text))
    arguments.pop("labels", None)
    with torch.inference_mode():
        ids = loaded.model.generate(**arguments, max_new_tokens=max_new_tokens, do_sample=False)[0].tolist()
    if "input_ids" in arguments:
        return ids[arguments["input_ids"].shape[1] :]
    return ids[1 if ids[0] == loaded.tokenizer.bos_token_id and "Git" in type(loaded.model).__name__ else 0 :]


def batched(loaded: LoadedModel, prompts: Sequence[ModelInputs], max_new_tokens: int) -> list[str]:
    """Return the texts of an engine that runs all prompts at once."""
    requests = [request(inputs, max_new_tokens) for inputs in prompts]
    with running_engine(loaded, max_num_seqs=5, max_model_len=200) as (engine, outbox):
        for each in requests:
            engine.submit(each)
        for each in requests:
            assert outbox.finish(each.request_id).error is None
    return [outbox.text(each.request_id) for each in requests]


@pytest.mark.parametrize("name", CAPTIONERS)
def test_concurrent_captions_equal_sequential_generate_with_and_without_a_text(
    name: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    loaded, builder = loaded_family(name), builder_of(name)
    default = loaded.capabilities.default_caption_prompt
    asked = [(picture(seed, 40 + 8 * (seed % 3), 56), TEXTS[seed % len(TEXTS)]) for seed in range(12)]
    prompts = []
    for pixels, text in asked:
        turns = builder.turns(CaptionJob(media=(URI,), prompt=text or None))
        prompts.append(builder.prepare(turns, (replace(image(0), pixels=pixels),)))

    texts = batched(loaded, prompts, 24)

    expected = [sequential(loaded, [pixels], text or default, 24) for pixels, text in asked]
    assert texts == [loaded.tokenizer.decode(ids, skip_special_tokens=True).lstrip() for ids in expected]
    assert len(set(texts)) > len(texts) // 2, "answers must depend on the prompt for this test to mean something"
    assert {inputs.num_images for inputs in prompts} == {1}


def test_git_without_a_text_says_what_generate_says_of_pixels_alone_within_max_length(
    loaded_family: Loaded, builder_of: Builders
) -> None:
    """The start token counts into `max_length`: 50 of it are 49 new tokens."""
    loaded, builder = loaded_family("git"), builder_of("git")
    inputs = builder.prepare(builder.turns(CaptionJob(media=(URI,))), (image(3),))
    assert inputs.tensors["input_ids"].tolist() == [[loaded.tokenizer.bos_token_id]]
    pixels = loaded.processor(images=image(3).pixels, return_tensors="pt").pixel_values
    with torch.inference_mode():
        ids = loaded.model.generate(pixel_values=pixels, max_length=50, do_sample=False)[0]
    assert batched(loaded, [inputs], 49) == [loaded.tokenizer.decode(ids, skip_special_tokens=True).lstrip()]


@pytest.mark.parametrize("name", CAPTIONERS)
def test_a_prompt_is_what_the_family_documents(name: str, loaded_family: Loaded, builder_of: Builders) -> None:
    loaded = loaded_family(name)
    inputs = builder_of(name).prepare((user(IMAGE, "a photo of"),), (image(1),))
    expected = upstream(loaded, [image(1).pixels], "a photo of")
    for tensor in set(inputs.tensors) - {"attention_mask"}:
        assert torch.equal(inputs.tensors[tensor], expected[tensor]), tensor
    assert inputs.tensors["attention_mask"].all()
    assert "labels" not in inputs.tensors
    assert inputs.num_media_tokens == {"git": 0, "blip2": 4, "paligemma": 16}[name]
    decoded = loaded.tokenizer.decode(inputs.tensors["input_ids"][0])
    tokens = {"git": "[CLS]a photo of", "blip2": "<image>" * 4 + "<s>a photo of"}
    assert decoded == tokens.get(name, "<image>" * 16 + "<bos>a photo of\n")


def test_paligemma_looks_at_several_images_and_answers_questions(loaded_family: Loaded, builder_of: Builders) -> None:
    loaded, builder = loaded_family("paligemma"), builder_of("paligemma")
    turns = builder.turns(VqaJob(media=(URI, OTHER_URI), question="answer en which is wider?"))
    inputs = builder.prepare(turns, (image(1), image(2)))
    expected = sequential(loaded, [image(1).pixels, image(2).pixels], "answer en which is wider?", 12)
    assert batched(loaded, [inputs], 12) == [loaded.tokenizer.decode(expected, skip_special_tokens=True).lstrip()]
    assert inputs.num_images == 2


IN_TURNS = Message.model_validate(
    {"role": "user", "content": [{"type": "image", "uri": URI}, {"type": "text", "text": "What?"}]}
)


@pytest.mark.parametrize(
    ("name", "job", "why"),
    [
        ("git", VqaJob(media=(URI,), question="What?"), "task: GIT makes captions and answers no questions"),
        ("blip2", VqaJob(media=(URI,), question="What?"), "task: BLIP-2 makes captions and answers no questions"),
        ("paligemma", VqaJob(messages=(IN_TURNS,)), "messages: PaliGemma has no chat template"),
        ("git", VideoQaJob(media=(URI,), question="What?"), "task: GIT takes images only, got visionq.video_qa"),
        ("paligemma", VideoQaJob(media=(URI,), question="What?"), "task: PaliGemma takes images only"),
        ("git", CaptionJob(media=(URI, OTHER_URI)), "media: GIT takes exactly 1 image, got 2"),
        ("blip2", CaptionJob(media=(URI,) * 3), "media: BLIP-2 takes exactly 1 image, got 3"),
        ("paligemma", VqaJob(question="What?"), "media: PaliGemma takes at least 1 image, got 0"),
    ],
)
def test_what_a_family_has_no_form_for_is_refused_before_anything_is_fetched(
    name: str, job: Job, why: str, builder_of: Builders
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        builder_of(name).turns(job)
    assert str(refused.value).startswith(why)


@pytest.mark.parametrize("name", CAPTIONERS)
def test_prepare_itself_refuses_turns_clips_and_missing_images(name: str, builder_of: Builders) -> None:
    builder = builder_of(name)
    with pytest.raises(InvalidRequest, match="no chat template"):
        builder.prepare((user(IMAGE, "What?"), assistant("A cat.")), (image(1),))
    with pytest.raises(InvalidRequest, match="no chat template"):
        builder.prepare((user("What", IMAGE),), (image(1),))
    with pytest.raises(InvalidRequest, match="images only, got a video"):
        builder.prepare((user(IMAGE, "What?"),), (clip(1, 2),))
    with pytest.raises(InvalidRequest, match="1 image, got 0"):
        builder.prepare((user("What?"),), ())


@pytest.mark.parametrize("name", CAPTIONERS)
def test_every_added_token_in_a_prompt_stays_text(name: str, loaded_family: Loaded, builder_of: Builders) -> None:
    loaded = loaded_family(name)
    added = loaded.tokenizer.get_added_vocab()
    literals = [token for token in added if not token.startswith(("<loc", "<seg"))] + ["<loc0001>", "<seg001>"]
    for literal in literals:
        for text in (literal, f"a {literal} b", f"{literal}{literal}\n"):
            ids = builder_of(name).prepare((user(IMAGE, text),), (image(1),)).tensors["input_ids"][0]
            harmless = builder_of(name).prepare((user(IMAGE, "zebra"),), (image(1),)).tensors["input_ids"][0]
            assert control_counts(added, ids) == control_counts(added, harmless)
            assert text in loaded.tokenizer.decode(ids)


def control_counts(added: Mapping[str, int], ids: torch.Tensor) -> Counter[int]:
    """Count the added tokens, without the unknown token."""
    return Counter(token for token in ids.tolist() if token in set(added.values()))


def test_a_family_that_nobody_knows_how_to_ask_cannot_start(loaded_family: Loaded) -> None:
    loaded = loaded_family("llava")
    silent = replace(loaded, capabilities=replace(loaded.capabilities, has_chat_template=False))
    with pytest.raises(CannotStart, match="LlavaProcessor has no chat template"):
        PromptBuilder(silent)
