"""A LoRA adapter as PEFT writes it: the base that it names, and merging it into the base's weights.

In: a folder with `adapter_config.json` and `adapter_model.safetensors`. Merged is W + (alpha / r) B A, in float32 and
rounded once to the weight's own type. What would make the merged model another one than the trained is refused by its
name: fields of the config that change more than such sums, weights that have no place in the base, tied weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.errors import CannotStart
from worker.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from worker.models.inputs import LoadedAdapter
from worker.models.manifest import MANIFEST
from worker.models.quantized_base import QuantizedBase, read_quantized_base

_KEY: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
#: A module's name, or its end; PEFT would take anything else for a regular expression.
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.]+")
#: Fields that say how the adapter was made, or where its weights are: the weights themselves show that.
_WITHOUT_EFFECT: Final = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules",
        "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
    }
)  # fmt: skip
#: Ways to begin that leave the base's weights as they are.
_PLAIN_BEGINNINGS: Final = (True, False, "gaussian")


class _LoraConfig(BaseModel):
    """What is read of adapter_config.json; `model_extra` holds the other fields."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    peft_type: str
    base_model_name_or_path: str = Field(min_length=1)
    revision: str | None = None
    r: int = Field(ge=1)
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = Field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = Field(default_factory=dict)
    bias: str = "none"
    init_lora_weights: bool | str = True


class _Plan(BaseModel):
    base_digest: str | None = None


class _Manifest(BaseModel):
    """What is read of a fine-tuned checkpoint's manifest."""

    plan: _Plan = _Plan()


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter in a folder.

    name: how VISIONQ_MODEL names it, for messages. quantized_base: what it was trained beside, if not whole weights.
    base_digest: of the weights that it was trained on, where its manifest says so.
    """

    name: str
    folder: Path
    config: _LoraConfig
    quantized_base: QuantizedBase | None
    base_digest: str | None = None

    @property
    def base(self) -> str:
        """The base as VISIONQ_MODEL would name it: `demo`, a folder, a hub id or `s3://bucket/prefix/`."""
        return self.config.base_model_name_or_path

    @property
    def has_processor(self) -> bool:
        """Whether a processor lies beside it: then that is the one it was trained with."""
        names = ("processor_config.json", "preprocessor_config.json")
        return (self.folder / "tokenizer.json").is_file() and any((self.folder / name).is_file() for name in names)

    @torch.no_grad()
    def merge_into(self, model: PreTrainedModel) -> None:
        """Add it to the weights of its base, which become those of the trained model. Raises CannotStart."""
        if self.quantized_base is not None:
            self.quantized_base.apply(model, self.name)
        for name, layer, down, up in self._fitting(model):
            device = layer.weight.device
            change = (up.to(device).float() @ down.to(device).float()) * self._scale(name, down.shape[0])
            merged = layer.weight.float() + change
            if not bool(torch.isfinite(merged).all()):
                raise self._refused(f"{name}: the merged weight has values that are not finite")
            layer.weight.copy_(merged)

    @torch.no_grad()
    def beside(self, model: PreTrainedModel, name: str, digest: str) -> LoadedAdapter:
        """Return the factors of its layers, to be served beside the base under a name. Raises CannotStart.

        They get the type of the base's weights, in which they are computed.
        """
        if self.quantized_base is not None:
            raise self._refused("it was trained beside quantised weights; it is served merged only (VISIONQ_MODEL)")
        factors = {}
        for layer_name, layer, down, up in self._fitting(model):
            dtype = layer.weight.dtype
            pair = down.to(dtype), (up.float() * self._scale(layer_name, down.shape[0])).to(dtype)
            if not all(bool(torch.isfinite(factor).all()) for factor in pair):
                raise self._refused(f"{layer_name}: its factors have values that are not finite in {dtype}")
            factors[layer_name] = pair
        return LoadedAdapter(name, digest, factors)

    def _fitting(self, model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear, Tensor, Tensor]]:
        """Yield each adapted layer with its name and its factors A and B. Raises CannotStart for what does not fit."""
        uses = [id(weight) for _, weight in model.named_parameters(remove_duplicate=False)]
        for name, (down, up) in self._factors().items():
            layer = self._layer(model, name)
            if uses.count(id(layer.weight)) > 1:
                raise self._refused(f"{name} shares its weight with another module, which the adapter does not change")
            rank = _of_module(self.config.rank_pattern, name, self.config.r)
            if (down.shape, up.shape) != ((rank, layer.in_features), (layer.out_features, rank)):
                raise self._refused(
                    f"{name}: factors of {tuple(down.shape)} and {tuple(up.shape)} do not fit rank {rank} and the "
                    f"base's layer of {layer.in_features} to {layer.out_features}"
                )
            yield name, layer, down, up

    def _factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A and B of each adapted module, by the module's name."""
        try:
            tensors = load_file(self.folder / ADAPTER_WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise self._refused(f"{ADAPTER_WEIGHTS} is no whole safetensors file") from error
        factors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            found = _KEY.fullmatch(key)
            if found is None:
                raise self._refused(f"{key} is no factor of a linear layer; other weights are not merged")
            factors.setdefault(found["module"], {})[found["factor"]] = tensor
        lone = [name for name, pair in factors.items() if len(pair) < 2]
        if lone or not factors:
            raise self._refused(f"{lone[0]} has one of its two factors" if lone else f"{ADAPTER_WEIGHTS} is empty")
        return {name: (pair["A"], pair["B"]) for name, pair in sorted(factors.items())}

    def _layer(self, model: PreTrainedModel, name: str) -> nn.Linear:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise self._refused(f"{name} is no module of {type(model).__name__}, the model of its base") from None
        # Others have a weight that is laid out differently, or an owner that reads it.
        if type(layer) is not nn.Linear:
            raise self._refused(f"{name} is a {type(layer).__name__}; linear layers are merged")
        return layer

    def _scale(self, name: str, rank: int) -> float:
        alpha: float = _of_module(self.config.alpha_pattern, name, self.config.lora_alpha)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def _refused(self, problem: str) -> CannotStart:
        return CannotStart(f"VISIONQ_MODEL={self.name}: the adapter does not fit its base {self.base}: {problem}")


def read_adapter(name: str, folder: Path) -> Adapter:
    """Read the adapter in a folder that has both of its files. Raises CannotStart for all that is no plain LoRA."""
    where = f"VISIONQ_MODEL={name}: {ADAPTER_CONFIG}"
    try:
        config = _LoraConfig.model_validate_json((folder / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValidationError, RecursionError) as error:
        problem = "cannot be read"
        if isinstance(error, ValidationError):
            problem = ", ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
        raise CannotStart(f"{where}: {problem}") from error
    for problem in _unsupported(config):
        raise CannotStart(f"{where}: {problem}; plain LoRA adapters are merged, no others")
    return Adapter(name, folder, config, read_quantized_base(name, folder), _base_digest(name, folder))


def _base_digest(name: str, folder: Path) -> str | None:
    """Return the digest of the base's weights that fine-tuning left in its manifest; None: there is none.

    Raises CannotStart for a manifest that cannot be read.
    """
    try:
        return _Manifest.model_validate_json((folder / MANIFEST).read_bytes()).plan.base_digest
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, RecursionError) as error:
        raise CannotStart(f"VISIONQ_MODEL={name}: {MANIFEST} cannot be read") from error


def _unsupported(config: _LoraConfig) -> Iterator[str]:
    """Name what is more, or other, than a sum of two factors."""
    if config.peft_type != "LORA":
        yield f"peft_type {config.peft_type}"
    if config.bias != "none":
        yield f"bias {config.bias!r}"
    if config.init_lora_weights not in _PLAIN_BEGINNINGS:
        yield f"init_lora_weights {config.init_lora_weights!r}, which may have changed the base's weights"
    for field, value in sorted((config.model_extra or {}).items()):
        if field not in _WITHOUT_EFFECT and value:
            yield f"{field} is {str(value)[:60]}"
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not _PLAIN_NAME.fullmatch(pattern):
            yield f"the pattern {pattern[:60]!r} is no module's name"


def _of_module(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that is the module's name or its end, as PEFT chooses."""
    fitting = (value for pattern, value in patterns.items() if f".{name}".endswith(f".{pattern}"))
    return next(fitting, otherwise)
