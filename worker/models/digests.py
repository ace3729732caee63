"""The digest of a checkpoint's weights, which tells two checkpoints apart wherever they lie and whatever their names.

A fine-tuned checkpoint's manifest, an evaluation's record and every result name the weights by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from worker.errors import CannotStart
from worker.models.checkpoint import CONFIG, stored_file

_WEIGHTS: Final = ".safetensors"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def weights_digest(sha256s: Mapping[str, str]) -> str:
    """Return the digest of the weights among a checkpoint's files, given as sha256 by name."""
    weights = [(name, each) for name, each in sorted(sha256s.items()) if "/" not in name and name.endswith(_WEIGHTS)]
    return hashlib.sha256(repr(weights).encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """Return the digest of the weights in a folder, a whole model's or an adapter's. Reads all of them."""
    return weights_digest({path.name: sha256_of(path) for path in folder.iterdir() if path.name.endswith(_WEIGHTS)})


def checkpoint_digest(name: str, place: str | Path, revision: str | None) -> str:
    """Return the digest of the weights of a folder or of a hub checkpoint that was downloaded.

    name: as VISIONQ_MODEL names it, for the message. Raises CannotStart where there is none.
    """
    config = stored_file(place, CONFIG, revision)
    if config is None:
        raise CannotStart(f"VISIONQ_MODEL={name}: no {CONFIG}, so it is not a checkpoint")
    return folder_digest(config.parent)
