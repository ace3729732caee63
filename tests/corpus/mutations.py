"""Good files, broken at random: cut where their parts begin, and with bits flipped. Seeded: the same in every run."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.corpus import clips, images
from tests.corpus.blocks import boundaries
from tests.corpus.case import ANY, Case
from worker.media.sniff import MediaKind

#: Flips beyond headers mostly change a colour; most of them go where structure is.
HEAD_BYTES = 400
FLIPS_PER_FILE = 6
CUTS_PER_FILE = 6


def mutations(seed: int = 20) -> Iterator[Case]:
    """Return cut and flipped forms of every base file."""
    rng = random.Random(seed)
    for kind, files in ((MediaKind.IMAGE, images.bases()), (MediaKind.VIDEO, clips.bases())):
        for name, content in files.items():
            for place in _cuts(content, rng):
                yield _case(f"cut-{place}-{name}", kind, content[:place])
            for number in range(FLIPS_PER_FILE):
                yield _case(f"flip-{number}-{name}", kind, _flipped(content, rng))


def _case(name: str, kind: MediaKind, content: bytes) -> Case:
    return Case(name, kind, lambda: content, ANY)


def _cuts(content: bytes, rng: random.Random) -> list[int]:
    places = boundaries(content)
    chosen = rng.sample(places, min(CUTS_PER_FILE - 2, len(places)))
    return sorted({*chosen, len(content) // 2, len(content) - 1})


def _flipped(content: bytes, rng: random.Random) -> bytes:
    flipped = bytearray(content)
    # The tables of an MP4 that was written in one go stand at its end.
    ranges = [(0, HEAD_BYTES), (len(content) - HEAD_BYTES, len(content)), (0, len(content))]
    for _ in range(rng.choice((1, 4, 16))):
        first, last = rng.choice(ranges)
        place = rng.randrange(max(0, first), min(len(content), last))
        flipped[place] ^= 1 << rng.randrange(8)
    return bytes(flipped)
