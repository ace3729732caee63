"""One file of the corpus and what may become of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from worker.media.sniff import MediaKind

DECODED: Final = "decoded"
CORRUPT: Final = "media_corrupt"
TOO_LARGE: Final = "media_too_large"
UNSUPPORTED: Final = "media_unsupported"
#: Mutations may leave a file whole.
ANY: Final = frozenset({DECODED, CORRUPT, TOO_LARGE, UNSUPPORTED})
REFUSED: Final = ANY - {DECODED}

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """`make` gives the bytes, the same ones in every run. `outcomes`: codes of errors, or "decoded". `colour`: what
    the middle of the picture must show when it is decoded, within 12 of 255."""

    name: str
    kind: MediaKind
    make: Callable[[], bytes]
    outcomes: frozenset[str] = ANY
    colour: Colour | None = None


def image(name: str, content: bytes, *outcomes: str, colour: Colour | None = None) -> Case:
    """A case for a job that wants an image."""
    return Case(name, MediaKind.IMAGE, lambda: content, frozenset(outcomes) or ANY, colour)


def clip(name: str, content: bytes, *outcomes: str) -> Case:
    """A case for a job that wants a clip."""
    return Case(name, MediaKind.VIDEO, lambda: content, frozenset(outcomes) or ANY)
