"""Qwen's models on paged blocks: rotary positions of three axes, and features that enter deeper layers (deepstack).

Their processors need torchvision, so the prompts are made by hand: patches of noise between words of noise.
"""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tests.unit.worker.engine.harness import request
from worker.engine.batch import Chunk
from worker.engine.config import PagedConfig, SchedulerLimits
from worker.engine.request import Request
from worker.engine.runner.build import build_runner
from worker.engine.runner.paged import PagedRunner
from worker.engine.scheduler import Scheduler
from worker.models.inputs import ModelInputs

IMAGE, VIDEO, START, END = 96, 97, 98, 99
TEXT = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
VISION = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.2}
TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip


@cache
def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "qwen2-vl":
        vision = {**VISION, "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        config = transformers.Qwen2VLConfig(vision_config=vision, text_config=TEXT, **TOKENS)
        model = transformers.Qwen2VLForConditionalGeneration(config)
    else:
        vision = {
            **VISION, "depth": 3, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_heads": 2,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
        config = transformers.Qwen3VLConfig(vision_config=vision, text_config={**TEXT, "head_dim": 16}, **TOKENS)
        model = transformers.Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt(chance: random.Random, num_images: int) -> ModelInputs:
    """Return words with images of different shapes between them."""
    generator = torch.Generator().manual_seed(chance.randrange(10_000))
    ids = [chance.randrange(1, 90) for _ in range(chance.randint(2, 9))]
    grids = [(1, chance.choice([2, 4, 6]), chance.choice([4, 8])) for _ in range(num_images)]
    for _, height, width in grids:
        ids += [START, *[IMAGE] * (height * width // 4), END, *(chance.randrange(1, 90) for _ in range(3))]
    input_ids = torch.tensor([ids])
    tensors = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).long(),
    }
    if grids:
        num_patches = sum(height * width for _, height, width in grids)
        tensors["pixel_values"] = torch.randn(num_patches, 3 * 2 * 8 * 8, generator=generator)
        tensors["image_grid_thw"] = torch.tensor(grids)
    return ModelInputs(tensors, num_images=num_images)


def run_greedily(runner: PagedRunner, requests: list[Request]) -> Scheduler:
    """Drive scheduler and runner to the end, taking the likeliest token."""
    scheduler = Scheduler(SchedulerLimits(max_num_seqs=5, max_num_batched_tokens=16), runner)
    for each in requests:
        scheduler.add(each)
    while not scheduler.is_idle:
        while (waiting := scheduler.next_to_start()) is not None:
            runner.allocate(waiting)
            scheduler.start(waiting)
        chunks: list[Chunk] = scheduler.schedule()
        made = runner.run(chunks)
        assert not made.failed
        if made.logits is None:
            continue
        for each, token in zip(made.requests, made.logits.argmax(-1).tolist(), strict=True):
            each.output_ids.append(token)
            if len(each.output_ids) == each.max_new_tokens:
                scheduler.end(each)
    return scheduler


@torch.inference_mode()
@pytest.mark.parametrize(("num_blocks", "name"), [(0, "qwen2-vl"), (0, "qwen3-vl"), (30, "qwen2-vl"), (30, "qwen3-vl")])
def test_qwen_answers_as_generate_does(name: str, num_blocks: int) -> None:
    """With few blocks, requests are sent back and read again; generated text stands alike on all axes then."""
    model, chance = model_of(name), random.Random(3)
    prompts = [prompt(chance, num_images) for num_images in (0, 1, 2, 1, 0, 3, 1, 2)]
    runner = build_runner(model, 5, 116, PagedConfig(block_size=4, num_blocks=num_blocks))
    assert isinstance(runner, PagedRunner)
    num_free = runner.num_free_blocks
    requests = [Request(request(inputs, max_new_tokens=24), submitted_at=0.0) for inputs in prompts]

    scheduler = run_greedily(runner, requests)

    for inputs, each in zip(prompts, requests, strict=True):
        expected = model.generate(**inputs.tensors, max_new_tokens=24, do_sample=False)
        assert each.output_ids == expected[0, inputs.num_prompt_tokens :].tolist()
    assert (scheduler.num_preempted > 0) == bool(num_blocks)
    assert runner.num_free_blocks == num_free


@torch.inference_mode()
@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl"])
def test_only_what_must_stay_whole_is_read_whole(name: str) -> None:
    runner = build_runner(model_of(name), 4, 128, PagedConfig())
    assert isinstance(runner, PagedRunner)
    with_image, text = (
        Request(request(prompt(random.Random(1), count), max_new_tokens=1), submitted_at=0.0) for count in (2, 0)
    )
    for each in (with_image, text):
        runner.allocate(each)
    assert text.is_chunkable
    assert with_image.is_chunkable == (name == "qwen2-vl")
    # Images are squeezed into fewer positions than they have tokens.
    assert with_image.first_position < with_image.num_prompt_cached
    assert text.first_position == text.num_prompt_cached
