"""LoRA adapters beside the linear layers of a text model, several of them and the base alone in one step.

Each adapted layer computes y + m(x A) B. A [in, R] and B [R, out] hold the factors of all adapters side by side, R
columns in all; m keeps the columns of the adapter that a token belongs to and puts zeros into all others, so a token of
the base gets exactly its base's y. Shapes depend on the adapters alone, never on who uses them, so that a step can
be recorded and what a row gets does not depend on the rows beside it.
(Hu and others: LoRA, 2021; Chen and others: Punica, multi-tenant LoRA serving, 2023.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.engine.batch import DecodeInputs, PrefillChunk
from worker.engine.model_hooks import ModelHooks
from worker.engine.request import Request
from worker.engine.tensors import to_device
from worker.errors import CannotStart
from worker.models.inputs import LoadedAdapter

#: The slot of tokens that belong to no adapter. Adapters have the slots from 1 on.
NO_ADAPTER: Final = 0


class Adapters:
    """The adapters of one engine. Engine thread only.

    Raises CannotStart for an adapter of other layers than the text model's linear ones.
    """

    def __init__(self, hooks: ModelHooks, adapters: Sequence[LoadedAdapter]) -> None:
        self._slots = {"": NO_ADAPTER} | {adapter.name: slot for slot, adapter in enumerate(adapters, start=1)}
        self._layers: list[_Layer] = []
        self._masks = _Masks(len(adapters))
        layers = _layers_of(hooks, adapters)
        for name, layer in layers.items():
            factors = [adapter.factors.get(name) for adapter in adapters]
            self._layers.append(_Layer(layer, factors, self._masks))

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are served."""
        return tuple(name for name in self._slots if name)

    def slot(self, name: str) -> int:
        """Return the slot of an adapter, `NO_ADAPTER` for an empty name."""
        return self._slots[name]

    def slots_of(self, requests: Sequence[Request], device: torch.device) -> Tensor | None:
        """Return the slots [B] of requests; None when all are the base's."""
        slots = [request.slot for request in requests]
        return to_device(torch.tensor(slots), device) if any(slots) else None

    def slots_of_step(self, inputs: DecodeInputs | None, chunks: Sequence[PrefillChunk]) -> Tensor | None:
        """Return the slots [T] of a step's tokens, decodes first; None when all are the base's."""
        has_decodes = inputs is not None and inputs.slots is not None
        if not has_decodes and not any(chunk.slot for chunk in chunks):
            return None
        num_decodes = 0 if inputs is None else inputs.ids.shape[0]
        slots = [slot for chunk in chunks for slot in [chunk.slot] * chunk.embeds.shape[0]]
        step = to_device(torch.tensor([NO_ADAPTER] * num_decodes + slots), chunks[0].embeds.device)
        if inputs is not None and inputs.slots is not None:
            step[:num_decodes] = inputs.slots
        return step

    def choosing(self, slots: Tensor | int | None) -> AbstractContextManager[None]:
        """Let the layers add, in the block, the adapters of the slots [T] that the step's T tokens belong to.

        A number stands for all tokens. None or `NO_ADAPTER`: the block runs the base alone.
        """
        if slots is None or (isinstance(slots, int) and slots == NO_ADAPTER):
            return nullcontext()
        return self._masks.of(slots)

    def remove(self) -> None:
        """Leave the model as it was."""
        for layer in self._layers:
            layer.remove()
        self._layers.clear()


class _Masks:
    """What m puts zeros into in one step: bools [T, R], or [1, R] where all tokens belong to one adapter.

    Layers differ in R when not every adapter changes every layer; those with the same ranks share a mask.
    """

    def __init__(self, num_adapters: int) -> None:
        self._num_adapters = num_adapters
        self._tables: dict[_Columns, Tensor] = {}
        self.chosen: Mapping[_Columns, Tensor] = {}

    def add(self, columns: _Columns) -> None:
        """Make the table [slots, R] from which the masks of layers with such columns are taken."""
        ranks, device = columns
        owners = torch.tensor([slot for slot, rank in enumerate(ranks, start=1) for _ in range(rank)])
        slots = torch.arange(self._num_adapters + 1)
        self._tables[columns] = (slots[:, None] != owners).to(device)

    @contextmanager
    def of(self, slots: Tensor | int) -> Iterator[None]:
        if isinstance(slots, int):
            self.chosen = {columns: table[slots][None] for columns, table in self._tables.items()}
        else:
            self.chosen = {
                columns: table.index_select(0, slots.to(table.device)) for columns, table in self._tables.items()
            }
        try:
            yield
        finally:
            self.chosen = {}


#: Ranks of a layer's factors, one per adapter, and where they are.
_Columns = tuple[tuple[int, ...], torch.device]


class _Layer:
    """One adapted layer: the factors of all adapters, and the hook that adds them."""

    def __init__(self, layer: nn.Linear, factors: Sequence[tuple[Tensor, Tensor] | None], masks: _Masks) -> None:
        dtype, device = layer.weight.dtype, layer.weight.device
        given = [pair for pair in factors if pair is not None]
        self._down = torch.cat([down for down, _ in given]).T.to(device, dtype).contiguous()
        self._up = torch.cat([up for _, up in given], dim=1).T.to(device, dtype).contiguous()
        self._columns = (tuple(0 if pair is None else pair[0].shape[0] for pair in factors), device)
        self._masks = masks
        masks.add(self._columns)
        self._handle = layer.register_forward_hook(self._add)

    def remove(self) -> None:
        self._handle.remove()

    def _add(self, _layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Return the layer's output with the adapters' change. Raises RuntimeError when it gets other than the step's
        tokens.
        """
        mask = self._masks.chosen.get(self._columns)
        if mask is None:
            return None
        low = args[0].flatten(0, -2) @ self._down
        if mask.shape[0] not in (1, low.shape[0]):
            raise RuntimeError(f"a layer gets {low.shape[0]} tokens of a step of {mask.shape[0]}")
        change: Tensor = low.masked_fill(mask, 0) @ self._up
        return output + change.view_as(output)


def _layers_of(hooks: ModelHooks, adapters: Sequence[LoadedAdapter]) -> dict[str, nn.Linear]:
    """Return the layers that any adapter changes, by name. Raises CannotStart for what cannot be served per token."""
    text_layers = dict(_text_layers(hooks))
    layers: dict[str, nn.Linear] = {}
    for adapter in adapters:
        for name in adapter.factors:
            if name not in text_layers:
                raise CannotStart(
                    f"VISIONQ_ADAPTERS: {adapter.name}: {name} is no linear layer of the text model; adapters of "
                    "towers, heads and embeddings are served merged only (VISIONQ_MODEL)"
                )
            layers[name] = text_layers[name]
    return layers


def _text_layers(hooks: ModelHooks) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of the text model that get every token of a step, by the whole model's names for them.

    A layer that lies in a list within a decoder layer is an expert, which gets some of the tokens.
    """
    own = set(map(id, hooks.decoder.modules()))
    head, text_config = hooks.model.get_output_embeddings(), type(hooks.text_config)
    others: list[str] = []
    for name, module in hooks.model.named_modules():
        if id(module) not in own or module is head:
            continue
        if isinstance(module, PreTrainedModel) and not isinstance(module.config, text_config):
            others.append(f"{name}.")
        is_expert = sum(part.isdecimal() for part in name.split(".")) > 1
        if type(module) is nn.Linear and not is_expert and not name.startswith(tuple(others)):
            yield name, module
