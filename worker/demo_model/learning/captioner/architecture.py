"""The captioner: a stock GIT whose tower starts as the shipped chat model's.

64 × 64 images in 16 patches of 16 × 16 → vision tower 192 wide, 3 layers → GIT's text layers, 128 wide, 4 of them,
which read the 17 vectors of the picture before the text. Only sizes and initial values are chosen here.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, CLIPImageProcessorPil, GitConfig, GitForCausalLM, GitProcessor

from worker.demo_model.learning.architecture import GRID, HEAD_WIDTH, PATCH, TEXT_WIDTH, VISION_WIDTH
from worker.demo_model.learning.captioner.tokenizer import MAX_LENGTH
from worker.demo_model.scenes import CANVAS

VISION_LAYERS, TEXT_LAYERS, TEXT_MLP_WIDTH = 3, 4, 256
NUM_PATCHES = GRID * GRID
INITIAL_RANGE = 0.05
#: Size of the constant that makes the first layer norm nearly linear, in units of the patch embeddings' deviation.
CONSTANT = 60.0


def build_model(tokenizer: Any) -> Any:
    """A freshly initialised model in float32; draws from torch's global generator."""
    config = GitConfig(
        vision_config={
            "hidden_size": VISION_WIDTH,
            "intermediate_size": VISION_WIDTH * 3,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": VISION_WIDTH // HEAD_WIDTH,
            "image_size": CANVAS,
            "patch_size": PATCH,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "initializer_range": INITIAL_RANGE,
        },
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_WIDTH // HEAD_WIDTH,
        intermediate_size=TEXT_MLP_WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=INITIAL_RANGE,
        layer_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GitForCausalLM(config)
    with torch.no_grad():
        model.git.embeddings.position_embeddings.weight.copy_(INITIAL_RANGE * _waves(MAX_LENGTH, TEXT_WIDTH))
    return model


def build_processor(tokenizer: Any) -> Any:
    """The stock processor: the whole picture at 64 × 64, values in −1 … 1."""
    images = CLIPImageProcessorPil(
        size={"height": CANVAS, "width": CANVAS},
        do_center_crop=False,
        resample=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return GitProcessor(images, tokenizer)


def load(directory: Path) -> tuple[Any, Any]:
    """Model (float32, training mode) and processor of a saved checkpoint."""
    model = GitForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.train(), AutoProcessor.from_pretrained(directory)


def save(model: Any, processor: Any, directory: Path) -> None:
    """Write a half-precision checkpoint that the Auto classes load; the model in memory keeps its precision."""
    copy.deepcopy(model).half().save_pretrained(directory)
    processor.save_pretrained(directory)


def see(model: Any, pixels: Tensor) -> Tensor:
    """The tower's output `[n, 17, 192]` for `[n, 3, 64, 64]`: one vector of the whole picture, then the patches."""
    output: Tensor = model.git.image_encoder(pixels).last_hidden_state
    return output


def take_over_tower(model: Any, chat_model: Any, pixels: Tensor) -> None:
    """Start the tower as the first layers of the chat model's, which is an Idefics2; `pixels` are typical pictures.

    GIT's tower has what that one lacks: a class vector, and a layer norm before the first layer, whose division by
    each patch's deviation would change everything after it. The patch dimension that varies least is therefore given a
    large constant, so that all patches have nearly the same deviation, and the norm's gain undoes the division. The
    mean that it subtracts does no harm: every later layer norm subtracts it too.
    """
    theirs, ours = chat_model.model.vision_model, model.git.image_encoder.vision_model
    with torch.no_grad():
        ours.embeddings.patch_embedding.weight.copy_(theirs.embeddings.patch_embedding.weight)
        positions = theirs.embeddings.position_embedding.weight + theirs.embeddings.patch_embedding.bias
        patches = ours.embeddings.patch_embedding(pixels).flatten(2).mT + positions
        flat = patches.reshape(-1, patches.shape[-1])
        spare = int(flat.var(0).argmin())
        constant, mean = CONSTANT * float(flat.std()), flat.mean(0)
        ours.embeddings.position_embedding.weight[0].zero_()
        ours.embeddings.position_embedding.weight[1:].copy_(positions)
        ours.embeddings.class_embedding.copy_(mean)
        ours.embeddings.patch_embedding.weight[spare].zero_()
        ours.embeddings.class_embedding[spare] = 0
        ours.embeddings.position_embedding.weight[:, spare] = constant
        normed = torch.cat([flat[:, :spare], torch.full((len(flat), 1), constant), flat[:, spare + 1 :]], dim=1)
        gain = normed.std(1, correction=0).mean()
        ours.pre_layrnorm.weight.fill_(gain)
        ours.pre_layrnorm.weight[spare] = 0
        ours.pre_layrnorm.bias.fill_(constant / flat.shape[1])
        ours.pre_layrnorm.bias[spare] = mean[spare]
        for mine, layer in zip(ours.encoder.layers, theirs.encoder.layers, strict=False):
            mine.load_state_dict(layer.state_dict())
        ours.post_layernorm.load_state_dict(theirs.post_layernorm.state_dict())


def _waves(length: int, width: int) -> Tensor:
    """Sine and cosine positions `[length, width]`: Vaswani et al. 2017 (arXiv:1706.03762) §3.5. Late positions, which
    short captions never reach, thereby start as different as early ones."""
    angles = torch.arange(length)[:, None] * torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def aim_projection(model: Any, seen: Tensor, read_outs: Tensor) -> None:
    """Start the projection from the tower's 192 dimensions to the text's 128 with what is known to matter.

    The first rows are the directions `read_outs` `[k, 192]`, the others the principal ones of `seen` `[n, 17, 192]`;
    all have the same variance over the patches.
    """
    patches = seen[:, 1:].reshape(-1, seen.shape[-1])
    centre = patches.mean(0)
    variances, directions = torch.linalg.eigh((patches - centre).mT @ (patches - centre) / len(patches))
    principal = directions.flip(1).mT / variances.flip(0).clamp(min=float(variances.mean()) / 50).sqrt()[:, None]
    read_outs = read_outs / ((patches - centre) @ read_outs.mT).std(0)[:, None]
    linear = model.git.visual_projection.visual_projection[0]
    weight = torch.cat([read_outs, principal])[: linear.out_features]
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(-weight @ centre)
