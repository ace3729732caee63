"""The tiny checkpoint that ships, the scenes and questions it knows, and the program that draws them.

`learning`, which trained and measures the checkpoint, is in the repository only: no wheel carries it.

Importing this package loads nothing heavy: `CHECKPOINT` is a directory for the ordinary loader.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
