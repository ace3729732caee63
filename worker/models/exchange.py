"""Whether a checkpoint can take the place of the loaded one in the same tensors, and the copying.

It can if all but the weights is the same: config, tokenizer, processor, prompt format, defaults of generation. In: two
loaded models. Out: the first one's tensors with the second one's values. Knows no engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.errors import CannotStart
from worker.models.loader import LoadedModel

#: Of a config: where it came from, and what the loading process chose.
_NOT_OF_THE_MODEL: Final = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "use_cache"}
)


def difference(former: LoadedModel, new: LoadedModel) -> str | None:
    """Return what differs beside the weights, so that a process must load the checkpoint anew; None: nothing does."""
    pairs = {
        "architecture": (type(former.model), type(new.model)),
        "config": (_plain(former.model.config.to_dict()), _plain(new.model.config.to_dict())),
        "tokenizer": (_tokenizer(former), _tokenizer(new)),
        "processor": (_plain(former.processor.to_dict()), _plain(new.processor.to_dict())),
        "chat template": (former.processor.chat_template, new.processor.chat_template),
        "generation config": (former.generation, new.generation),
        "prompt format": (former.capabilities.captioner, new.capabilities.captioner),
    }
    return next((what for what, (one, other) in pairs.items() if one != other), None)


def check_finite(loaded: LoadedModel, name: str) -> None:
    """Raise CannotStart for weights with values that are not finite; `name` is the checkpoint's, for the message."""
    for key, tensor in loaded.model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CannotStart(f"VISIONQ_MODEL={name}: {key} has values that are not finite")


def copy_to_host(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return copies of a model's tensors in host memory, by name."""
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in model.state_dict().items()}


@torch.no_grad()
def copy_into(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Give a model's own tensors the values of others, by name; they keep their places and types.

    Raises ValueError for other names or shapes, before anything is copied.
    """
    own = model.state_dict()
    if own.keys() != tensors.keys():
        raise ValueError(f"other tensors: {sorted(own.keys() ^ tensors.keys())[:3]}")
    if wrong := [key for key, tensor in own.items() if tensor.shape != tensors[key].shape]:
        raise ValueError(f"{wrong[0]} has another shape: {tuple(tensors[wrong[0]].shape)}")
    for key, tensor in own.items():
        tensor.copy_(tensors[key])


def _tokenizer(loaded: LoadedModel) -> object:
    tokenizer: Any = loaded.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        sorted(tokenizer.get_vocab().items()) if backend is None else _without_state(backend.to_str()),
        tokenizer.special_tokens_map,
        tokenizer.padding_side,
    )


def _without_state(dumped: str) -> object:
    """Return a dumped tokenizer without what calls of it leave behind."""
    return {key: value for key, value in json.loads(dumped).items() if key not in ("padding", "truncation")}


def _plain(value: Any) -> Any:
    """Return a dumped config without what is not of the model."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if key not in _NOT_OF_THE_MODEL}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else str(value)
