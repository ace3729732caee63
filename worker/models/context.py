"""How many tokens of prompt and answer a model can tell apart, by its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the positions that the text model has, None when its config does not say."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def max_context(config: PreTrainedConfig) -> int | None:
    """Return the positions of the text model, as far as they do not depend on how long a sequence is.

    Beyond the length it was first trained on, `longrope` turns all keys of a batch by other frequencies (Ding et al.:
    LongRoPE, 2024): one long request would change the answers of the others.
    """
    positions = max_positions(config)
    if positions is None:
        return None
    text_config = config.get_text_config(decoder=True)
    first_trained: list[int] = [
        rope["original_max_position_embeddings"] for rope in _ropes(text_config) if rope["rope_type"] == "longrope"
    ]
    return min([positions, *first_trained])


def _ropes(text_config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """Return the parameters of the rotary positions, of each layer type where they differ."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    return [each for each in (parameters, *parameters.values()) if isinstance(each, Mapping) and "rope_type" in each]
