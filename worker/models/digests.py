"""The digest of a checkpoint's weights, which tells two checkpoints apart wherever they lie and whatever their names.

A fine-tuned checkpoint's manifest, an evaluation's record and every result name the weights by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

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
    """Return the digest of the weights of a folder or of a hub checkpoint, of which they are downloaded if need be.

    name: as VISIONQ_MODEL names it, for the message. Raises CannotStart where there are none.
    """
    if isinstance(place, Path):
        if stored_file(place, CONFIG) is None:
            raise CannotStart(f"VISIONQ_MODEL={name}: no {CONFIG}, so it is not a checkpoint")
        return folder_digest(place)
    files = [stored_file(place, file, revision) for file in _files_of(place, revision)]
    if not files:
        raise CannotStart(f"VISIONQ_MODEL={name}: no {SAFE_WEIGHTS_NAME}, so it is not a checkpoint that is served")
    return weights_digest({file.name: sha256_of(file) for file in files if file is not None})


def _files_of(place: str, revision: str | None) -> list[str]:
    """Return the names of the files of weights that transformers loads of a hub checkpoint."""
    if stored_file(place, SAFE_WEIGHTS_NAME, revision) is not None:
        return [SAFE_WEIGHTS_NAME]
    index = stored_file(place, SAFE_WEIGHTS_INDEX_NAME, revision)
    return [] if index is None else sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
