"""The parts that read and decode media, which serving and training share."""

from __future__ import annotations

from dataclasses import dataclass

from worker.media.decoders import Decoders
from worker.media.fetch import ObjectFetcher
from worker.media.types import MediaPolicy


@dataclass(frozen=True, slots=True)
class MediaAccess:
    """What reads objects and decodes files. Any thread, but one process: a fork must have decoders of its own."""

    policy: MediaPolicy
    fetcher: ObjectFetcher
    decoders: Decoders
