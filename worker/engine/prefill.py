"""Prefill: one prompt through the model's own, unmodified forward, images and all.

Nothing here knows a model family. Where the first generated token stands is read at the decoder's door, from the
position ids that the model hands to its own text decoder; that covers multi-axis rotary positions too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from worker.models.inputs import ModelInputs


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt that the model has read.

    logits: of the first new token, [1, V].
    cache: the prompt's KV, batch 1.
    first_position: position id of the first new token.
    """

    logits: Tensor
    cache: DynamicCache
    first_position: int


class Prefill:
    """Runs prompts through one model, one at a time. Engine thread only."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder: nn.Module = model.get_decoder()
        parameters = inspect.signature(model.forward).parameters
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def run(self, inputs: ModelInputs) -> Prefilled:
        """Read one prompt. Raises whatever the model raises."""
        cache = DynamicCache()
        seen: list[Tensor | None] = []

        def read_positions(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(kwargs.get("position_ids"))

        hook = self._decoder.register_forward_pre_hook(read_positions, with_kwargs=True)
        try:
            output = self._model(
                **self._on_device(inputs.tensors), past_key_values=cache, use_cache=True, **self._extra
            )
        finally:
            hook.remove()
        positions = seen[0] if seen else None
        # Models that hand no positions down count the tokens of the text, as `generate` does for them.
        first_position = inputs.num_prompt_tokens if positions is None else int(positions.max()) + 1
        return Prefilled(output.logits[:, -1], cache, first_position)

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device, dtype = self._model.device, self._model.dtype
        return {
            name: tensor.to(device, dtype) if torch.is_floating_point(tensor) else tensor.to(device)
            for name, tensor in tensors.items()
        }
