"""The tiny checkpoints that ship, the scenes and questions they know, and the program that draws them.

`learning`, which trained and measures the checkpoints, is in the repository only: no wheel carries it.

Importing this package loads nothing heavy: `CHECKPOINT`, which chats, and `CAPTIONER`, which describes pictures, are
directories for the ordinary loader.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
CAPTIONER = Path(__file__).parent / "captioner"
