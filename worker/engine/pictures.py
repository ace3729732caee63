"""Cuts the pixels of a prompt into pictures that the vision tower can see one by one, and names each by what it is.

In: a prompt's tensors. Out: `Picture`s in the order in which the tower gets them. Knows the argument names of
transformers' `get_image_features` and `get_video_features`, no model family.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import compress
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from worker.engine.cache_scope import CacheScope
from worker.models.inputs import ModelInputs

MODALITIES: Final = ("image", "video")
#: Which of a picture's pixels count, where processors pad pictures to one size.
MASK: Final = "pixel_attention_mask"
KEY_BYTES: Final = 32


class Cut(StrEnum):
    """How a picture came out of its prompt: how much there is to get wrong."""

    NONE = "none"  # it is all of the prompt's pixels of its modality, untouched
    SET = "set"  # the same of several images which the tower sees with an eye on each other
    ROW = "row"
    RUN = "run"  # of patches
    FRAME = "frame"
    FRAME_OF_CLIPS = "frame of clips"


@dataclass(frozen=True, slots=True)
class Picture:
    """The least that the tower can be given: one image, one crop of it where the processor splits, or one clip.

    key: a digest of the scope and of everything that the tower would get, so of the medium as every setting of the
        processor left it; equal keys mean equal features. No name, version or size of an object takes part in it.
    tensors: the arguments of the tower, to be joined with other pictures' along the first dimension.
    num_outputs: how many entries of the tower's output are its.
    """

    modality: str
    key: bytes
    tensors: Mapping[str, Tensor]
    num_outputs: int
    cut: Cut

    @property
    def num_values(self) -> int:
        """Numbers that the tower has to read."""
        return sum(tensor.numel() for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class TowerHook:
    """A model's own way into its tower for one modality.

    encode: `get_image_features` or `get_video_features`.
    names: its arguments; pixels: those of them that hold pixels.
    """

    modality: str
    encode: Callable[..., Any]
    names: tuple[str, ...]
    pixels: str

    def arguments(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the tower gets of a prompt; nothing if the prompt has no such pixels."""
        return {name: tensors[name] for name in self.names if name in tensors} if self.pixels in tensors else {}


def tower_hooks(model: PreTrainedModel) -> dict[str, TowerHook]:
    """Return the towers whose output the model takes in place of pixels, by modality; GIT has none."""
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return {}
    found = {}
    for modality in MODALITIES:
        encode = getattr(model.base_model, f"get_{modality}_features", None)
        names = () if encode is None else tuple(inspect.signature(encode).parameters)
        pixels = next((name for name in names if name.startswith("pixel_values")), None)
        if encode is not None and pixels is not None:
            found[modality] = TowerHook(modality, encode, names, pixels)
    return found


def cut(tower_hooks: Mapping[str, TowerHook], inputs: ModelInputs, scope: CacheScope) -> tuple[Picture, ...]:
    """Return the pictures of a prompt, whose keys hold in one scope. Any thread; reads every pixel, so not the
    engine's.
    """
    beginning = scope.of_tower.key
    pictures: list[Picture] = []
    for modality, hook in tower_hooks.items():
        arguments = hook.arguments(inputs.tensors)
        if not arguments:
            continue
        how, pieces = _pieces(arguments, arguments[hook.pixels])
        num_outputs = len(arguments[hook.pixels]) if how is Cut.SET else 1
        for piece in pieces:
            tensors = _trimmed(piece)
            is_all = num_outputs == 1 and all(tensors[name].shape == arguments[name].shape for name in arguments)
            key = _key(beginning, modality, tensors)
            pictures.append(Picture(modality, key, tensors, num_outputs, Cut.NONE if is_all else how))
    return tuple(pictures)


def _pieces(arguments: Mapping[str, Tensor], pixels: Tensor) -> tuple[Cut, list[dict[str, Tensor]]]:
    """Return the arguments of each picture, in the order of the tower's outputs."""
    grid = next((tensor for name, tensor in arguments.items() if name.endswith("_grid_thw")), None)
    if grid is not None:
        lengths = grid.prod(-1).tolist()
        runs = {name: torch.split(tensor, lengths if tensor is pixels else 1) for name, tensor in arguments.items()}
        return Cut.RUN, [{name: run[at] for name, run in runs.items()} for at in range(len(lengths))]
    if is_framed(arguments):
        # [1, N, C, H, W] is one prompt of N pictures (SmolVLM: [clips, frames, …]); N prompts of one do as well.
        flat = {name: tensor.flatten(0, 1)[:, None] for name, tensor in arguments.items()}
        # Clips are padded to one length with frames of zeros, whatever the mask says; the tower leaves them out too.
        is_real = pixels.flatten(0, 1).flatten(1).any(-1).tolist()
        frames = list(compress(_rows(flat, len(is_real)), is_real))
        return (Cut.FRAME if len(pixels) == 1 else Cut.FRAME_OF_CLIPS), frames
    if all(len(tensor) == len(pixels) for tensor in arguments.values()):
        return Cut.ROW, _rows(arguments, len(pixels))
    # Some argument is about all of them together: LLaVA-OneVision gets the number of images.
    return Cut.SET, [dict(arguments)]


def _rows(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    return [{name: tensor[at : at + 1] for name, tensor in tensors.items()} for at in range(count)]


def _trimmed(piece: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Cut off what only pads a picture to the size of another, so that it is the same picture in every prompt."""
    if not is_framed(piece):
        return piece
    mask = piece[MASK]
    height, width = int(mask.any(-1).sum()), int(mask.any(-2).sum())
    if (height, width) == mask.shape[-2:] or not mask[..., :height, :width].all():
        return piece
    return {name: tensor[..., :height, :width] for name, tensor in piece.items()}


def _key(beginning: bytes, modality: str, tensors: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(beginning + modality.encode(), digest_size=KEY_BYTES)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def is_framed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether pictures are rectangles of pixels beside a mask of the pixels that count, as Idefics has them."""
    return MASK in tensors and all(tensor.ndim in (4, 5) for tensor in tensors.values())


def joined(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """Return the arguments of a call with all of these pictures, padded where they differ in size."""
    return {name: _cat([picture.tensors[name] for picture in pictures]) for name in pictures[0].tensors}


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    height, width = (max(tensor.shape[axis] for tensor in tensors) for axis in (-2, -1))
    return torch.cat([pad(each, (0, width - each.shape[-1], 0, height - each.shape[-2])) for each in tensors])
