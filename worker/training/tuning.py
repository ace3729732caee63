"""The model that is trained: its base as serving loads it, and the weights of it, or beside it, that learn.

In: a base or a checkpoint to resume, and the method. Out: a `TunedModel` in training mode. Safetensors only, no code of
checkpoints. Knows no data and no trainer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from api_stub.contract.finetune import FinetuneMethod
from worker.models.digests import checkpoint_digest
from worker.models.loader import LoadedModel, load
from worker.models.quantized_base import QuantizedBase, describe_quantized_base, write_quantized_base
from worker.models.source import find_checkpoint
from worker.settings import Dtype, Quantization, WorkerSettings
from worker.training.manifest import Plan
from worker.training.progress import TrainingRefused

#: Of bitsandbytes' 4-bit layers: whether they pack their weights on this CPU.
_PACKS: Final = "support_avx512bf16_for_cpu"
#: Files of PEFT; serving does not read the second.
_ADAPTER_CONFIG: Final = "adapter_config.json"
_MODEL_CARD: Final = "README.md"


@dataclass(frozen=True, slots=True)
class TunedModel:
    """A model in training.

    loaded: what serving knows of the base; its `model` is the one that is trained, without the adapter around it.
    model: what the trainer calls and saves: the base itself, or PEFT's model around it.
    quantized_base: what a QLoRA adapter learns beside; serving must have the same again.
    """

    loaded: LoadedModel
    model: Any
    method: FinetuneMethod
    quantized_base: QuantizedBase | None = None

    def save(self, folder: Path) -> None:
        """Write a checkpoint that serving loads: weights or adapter, config, processor and tokenizer."""
        if self.method is FinetuneMethod.FULL:
            self.model.save_pretrained(folder)
        else:
            # PEFT would look for the base on the hub to find out whether embeddings were resized.
            self.model.save_pretrained(folder, save_embedding_layers=False)
            _sort_modules(folder / _ADAPTER_CONFIG)
        if self.quantized_base is not None:
            write_quantized_base(folder, self.quantized_base)
        self.loaded.processor.save_pretrained(folder)
        (folder / _MODEL_CARD).unlink(missing_ok=True)

    def checkpoint_gradients(self) -> None:
        """Keep fewer activations and compute them again.

        What is not reentrant needs no embeddings that ask for gradients, as transformers makes them beside an adapter;
        a model that changes them in place (GIT) would fail with them.
        """
        self.loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with suppress(AttributeError):  # earlier versions know none
            self.loaded.model.disable_input_require_grads()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch dropout off for a while, and no gradients."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()


def base_digest(settings: WorkerSettings) -> str:
    """Return the digest of the weights that `settings.model` names. Raises CannotStart."""
    return checkpoint_digest(settings.model, *find_checkpoint(settings))


def training_settings(settings: WorkerSettings, base: str, method: FinetuneMethod) -> WorkerSettings:
    """Return the settings with which the base is loaded.

    Weights that learn are float32, whatever the device: an optimizer's step is smaller than what bfloat16 resolves.
    An adapter's are float32 also beside a base that is not.
    """
    dtype = Dtype.FLOAT32 if method is FinetuneMethod.FULL else settings.dtype
    quantization = Quantization.NF4 if method is FinetuneMethod.QLORA else Quantization.NONE
    return settings.model_copy(update={"model": base, "dtype": dtype, "quantization": quantization})


def tune(settings: WorkerSettings, plan: Plan, checkpoint: Path | None) -> TunedModel:
    """Load the base and what learns. `settings` are those of `training_settings`; `checkpoint` is one to resume.

    The adapter's first weights depend on the plan's seed. Raises CannotStart and TrainingRefused.
    """
    if plan.method is FinetuneMethod.FULL:
        loaded = load(settings if checkpoint is None else settings.model_copy(update={"model": str(checkpoint)}))
        if getattr(loaded.model, "is_quantized", False):
            raise TrainingRefused(f"method full: the weights of {plan.base} are quantised and cannot learn; use lora")
        loaded.model.requires_grad_(True)
        for name in _frozen(loaded.model, plan):
            loaded.model.get_submodule(name).requires_grad_(False)
        return TunedModel(loaded, loaded.model.train(), plan.method)
    if find_spec("peft") is None:
        raise TrainingRefused(f"method {plan.method}: needs peft; install the `train` extra")
    loaded = load(settings)
    loaded.model.requires_grad_(False)
    keep_unpacked(loaded.model)
    quantized_base = None
    if plan.method is FinetuneMethod.QLORA:
        layers = [(name, layer) for name, layer in loaded.model.named_modules() if hasattr(layer, _PACKS)]
        quantized_base = describe_quantized_base(layers)
    torch.manual_seed(plan.seed)
    return TunedModel(loaded, _with_adapter(loaded, plan, checkpoint).train(), plan.method, quantized_base)


def keep_unpacked(model: nn.Module) -> None:
    """Never let bitsandbytes pack nf4 weights of a model that is trained.

    On a CPU with AVX512-BF16 it packs them at the first forward in evaluation mode, and packed weights have no backward
    (bitsandbytes 0.50, `Linear4bit.forward`).
    """
    for module in model.modules():
        if hasattr(module, _PACKS):
            setattr(module, _PACKS, False)


def _with_adapter(loaded: LoadedModel, plan: Plan, checkpoint: Path | None) -> Any:
    """Return PEFT's model around the base: a new adapter, or that of a checkpoint."""
    peft = import_module("peft")  # of the `train` extra
    if checkpoint is not None:
        return peft.PeftModel.from_pretrained(loaded.model, str(checkpoint), is_trainable=True)
    config = peft.LoraConfig(
        r=plan.lora_rank,
        lora_alpha=plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        target_modules=_linear_layers(loaded.model, _frozen(loaded.model, plan)),
        bias="none",
    )
    adapted = peft.get_peft_model(loaded.model, config)
    adapted.peft_config["default"].base_model_name_or_path = plan.base
    return adapted


def _sort_modules(config: Path) -> None:
    """Sort the names of modules: PEFT writes a set, whose order is another one in every process."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["target_modules"] = sorted(fields["target_modules"])
    config.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")


def _frozen(model: PreTrainedModel, plan: Plan) -> list[str]:
    """Return the names of the modules that learn nothing: the vision towers, where the plan says so.

    A tower is told by its configuration. Raises TrainingRefused for a model without one.
    """
    if not plan.freeze_vision:
        return []
    vision = getattr(model.config, "vision_config", None)
    towers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and vision is not None and isinstance(module.config, type(vision))
    ]
    if not towers:
        raise TrainingRefused(f"options.freeze_vision: {type(model).__name__} has no vision tower of its own")
    return towers


def _linear_layers(model: PreTrainedModel, frozen: Sequence[str]) -> list[str]:
    """Return the full names of all linear layers but the output head, also of those quantised to nf4.

    Other subclasses of nn.Linear have a forward of their own or, as in nn.MultiheadAttention, an owner that reads
    their weight: an adapter there would learn nothing, or be ignored.
    """
    head = model.get_output_embeddings()
    is_quantised = {name for name, module in model.named_modules() if hasattr(module, _PACKS)}
    return [
        name
        for name, module in model.named_modules()
        if module is not head
        and (type(module) is nn.Linear or name in is_quantised)
        and not any(name.startswith(f"{tower}.") for tower in frozen)
    ]
