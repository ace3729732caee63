"""LoRA adapters of noise, put into a model by PEFT itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


def with_noisy_adapters(
    model: PreTrainedModel, ranks: Mapping[str, int], *, targets: str, std: float, base: str, seed: int = 5
) -> PeftModel:
    """Put an adapter of each rank into a model, by name, and return it in eval mode.

    targets: a regular expression of the layers' names. base: what the adapters' configs name as their base.
    """
    torch.manual_seed(seed)
    configs = {name: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets) for name, rank in ranks.items()}
    first, *others = configs
    peft = get_peft_model(model, configs[first], adapter_name=first)
    for name in others:
        peft.add_adapter(name, configs[name])
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=std)
    for config in peft.peft_config.values():
        config.base_model_name_or_path = base
    return peft.eval()
