"""Decoder processes that the tests of one run share, and that end with it."""

from __future__ import annotations

import atexit
from functools import cache

from worker.media.decoder_process import DecodeLimits
from worker.media.decoders import Decoders

LIMITS = DecodeLimits(memory_bytes=2 << 30, image_s=30.0, video_s=120.0)


@cache
def shared_decoders() -> Decoders:
    """Return two decoder processes with the limits of the default settings."""
    decoders = Decoders(2, LIMITS)
    atexit.register(decoders.close)
    return decoders
