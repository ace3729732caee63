"""The tiny checkpoint that ships, the scenes it knows, and the programs that train, measure and draw.

Importing this package loads nothing heavy: `CHECKPOINT` is a directory for the ordinary loader.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
