"""What the engine is given beside the model: the inputs of each job, of batch size 1 on the CPU, and LoRA adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A LoRA adapter that is served beside its base, unmerged.

    digest: of its weights. factors: A [r, in] and, scaled, B [out, r] of each layer, by the layer's name in the model.
    """

    name: str
    digest: str
    factors: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Tensors of one prompt.

    tensors: keyword arguments of the model's forward, batch dimension 1: `input_ids` and `attention_mask` [1, T],
        and whatever the family adds (`pixel_values`, `image_sizes`, …). Owned by the receiver.
    num_images, num_frames: stills and clip frames in the prompt, for `usage`.
    is_continuation: the prompt ends inside an assistant's turn; leading white space of the answer is kept.
    num_media_tokens: the prompt's tokens that stand for media, with those that enclose them.
    can_take_fewer: a smaller `media_options.max_pixels` would reduce them.
    """

    tensors: Mapping[str, Tensor]
    num_images: int = 0
    num_frames: int = 0
    is_continuation: bool = False
    num_media_tokens: int = 0
    can_take_fewer: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt as the tokenizer and processor counted it."""
        return int(self.tensors["input_ids"].shape[1])

    @property
    def cost_of_media(self) -> str:
        """The share of media, for the message about a prompt that is too long; empty without media."""
        if not self.num_media_tokens:
            return ""
        advice = " (media_options.max_pixels makes them fewer)" if self.can_take_fewer else ""
        return f"; {self.num_media_tokens} of the prompt's tokens are media{advice}"
