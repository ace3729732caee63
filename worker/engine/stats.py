"""What the engine's caches have spared so far: snapshots that any thread may take and keep."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VisionStats:
    """Counts since boot of the vision-embedding cache and the tower behind it, and what is held now.

    hits, misses: pictures asked for; a hit is one that the tower did not have to see again.
    num_entries, num_bytes: pictures kept and the memory their features take.
    num_encoded, num_tower_calls: pictures that the tower saw, and in how many calls.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    num_entries: int = 0
    num_bytes: int = 0
    num_encoded: int = 0
    num_tower_calls: int = 0


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """Prompt tokens looked up among those that earlier prompts left, and those that were there, since boot."""

    num_queried_tokens: int = 0
    num_reused_tokens: int = 0
