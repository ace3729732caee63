"""Where an unmodified vision-language model can be entered: its forward, the call of its text decoder, its embedding.

Nothing here knows a model family. The hooks and the attention's name belong to the model, so two engines would disturb
each other: `ModelLock` allows one engine at a time per model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from worker.models.inputs import ModelInputs

_MARK: Final = "_visionq_lock"


class ModelLock:
    """Held by the engine that serves a model, from its making to its end. Any thread.

    Raises ValueError when another engine holds the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # One operation of a dict, so of two threads one wins.
        if vars(model).setdefault(_MARK, self) is not self:
            raise ValueError("another engine serves this model: stop that one first, or load the model twice")
        self._model = model

    def release(self) -> None:
        """Leave the model to others."""
        if vars(self._model).get(_MARK) is self:
            del vars(self._model)[_MARK]


class _DecoderReached(Exception):
    """Ends a forward where the text decoder would begin."""


class ModelHooks:
    """One model, as the engine calls it. Engine thread only; a model serves one engine at a time.

    decoder: the text model whose forward gets embeddings and positions.
    text_config: what the text model's layers read.
    is_causal: its attention hides what comes later also where it is handed no mask; PaliGemma's does not.
    text_forward: takes embeddings of text and returns logits; the model itself, unless its forward insists on an image
        (BLIP-2): then the decoder, which has the head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder: nn.Module = model.get_decoder()
        self.is_causal = all(getattr(module, "is_causal", True) for module in self.decoder.modules())
        self.text_config: PreTrainedConfig = model.config.get_text_config(decoder=True)
        parameters = inspect.signature(model.forward).parameters
        pixel_values = parameters.get("pixel_values")
        needs_image = pixel_values is not None and pixel_values.default is inspect.Parameter.empty
        self.text_forward: nn.Module = self.decoder if needs_image else model
        self.last_logits_only: Mapping[str, int] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings [n, hidden] of text tokens [n]."""
        embeddings: Tensor = self.model.get_input_embeddings()(ids[None])[0]
        return embeddings

    def on_device(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """Return a prompt's tensors where the model is and, pixels, in its type."""
        device, dtype = self.model.device, self.model.dtype
        return {
            name: tensor.to(device, dtype) if torch.is_floating_point(tensor) else tensor.to(device)
            for name, tensor in inputs.tensors.items()
        }

    @contextmanager
    def handing(self, **arguments: Any) -> Iterator[None]:
        """Hand the decoder these keyword arguments in the block, whatever the model makes of those that it is given."""

        def put(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            return args, {**kwargs, **arguments}

        hook = self.decoder.register_forward_pre_hook(put, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def recording(self) -> Iterator[list[dict[str, Any]]]:
        """Yield a list that gets the decoder's keyword arguments of each call."""
        calls: list[dict[str, Any]] = []

        def note(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(kwargs)

        hook = self.decoder.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield calls
        finally:
            hook.remove()

    @contextmanager
    def watching(self) -> Iterator[dict[str, Any]]:
        """Yield a dict that gets the decoder's keyword arguments when it is called."""
        seen: dict[str, Any] = {}

        def note(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)

        hook = self.decoder.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield seen
        finally:
            hook.remove()

    def run_to_decoder(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Run the model's own forward on a prompt, images and all, and return what its decoder would get.

        arguments: of the forward, on the model's device.
        """
        seen: dict[str, Any] = {}

        def stop(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)
            raise _DecoderReached

        hook = self.decoder.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(**arguments, use_cache=False)
        except _DecoderReached:
            return seen
        finally:
            hook.remove()
        raise RuntimeError(f"{type(self.model).__name__} does not call its decoder")
