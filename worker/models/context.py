"""The longest context of a model, by its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions of the text model; None when its config has none."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def max_context(config: PreTrainedConfig) -> int | None:
    """Return the longest context in which a position's embedding does not depend on the sequence's length.

    Beyond the length that it was first trained on, `longrope` rotates all keys of a batch by other frequencies (Ding et
    al.: LongRoPE, 2024): one long request would change the answers of the others.
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
    """Return the parameters of the rotary embeddings, one per layer type where they differ."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    return [each for each in (parameters, *parameters.values()) if isinstance(each, Mapping) and "rope_type" in each]
