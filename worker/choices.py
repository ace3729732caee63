"""What some settings of the worker choose between."""

from __future__ import annotations

from enum import StrEnum


class Switch(StrEnum):
    """A setting with an automatic choice."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"

    @property
    def choice(self) -> bool | None:
        """What was chosen, None for automatic."""
        return None if self is Switch.AUTO else self is Switch.ON


class Dtype(StrEnum):
    """Weights' type; auto is bfloat16 on a GPU and float32 on a CPU."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Attention(StrEnum):
    """Attention code; auto takes flash-attn when it can be imported and used, else SDPA."""

    AUTO = "auto"
    SDPA = "sdpa"
    EAGER = "eager"
    FLASH = "flash_attention_2"


class Quantization(StrEnum):
    """Weight quantisation at load."""

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"


class KVBackend(StrEnum):
    """Where keys and values live; auto is paged, and slots for a model that blocks cannot serve."""

    AUTO = "auto"
    SLOTS = "slots"
    PAGED = "paged"


class LogFormat(StrEnum):
    """How log lines look."""

    JSON = "json"
    TEXT = "text"
