"""What serving reads of the manifest that fine-tuning leaves in a checkpoint: its files' digests and its smoke set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from api_stub.contract.conversation import Turn
from api_stub.contract.wire import ReadModel
from worker.errors import CannotStart
from worker.models.digests import sha256_of

MANIFEST: Final = "manifest.json"
_NEEDED: Final = ".safetensors"


class FileEntry(ReadModel):
    """One file of a checkpoint."""

    num_bytes: int
    sha256: str


class SmokeQuestion(ReadModel):
    """A question with its right answers.

    turns: the conversation up to the answer. pictures: PNG files in base64, in the order of the turns' media parts.
    answers: any of them is right, white space aside. max_new_tokens: as it was asked when it was answered right.
    """

    turns: tuple[Turn, ...]
    pictures: tuple[str, ...] = ()
    answers: tuple[str, ...]
    max_new_tokens: int

    def is_wrong(self, text: str) -> bool:
        """Whether a text is none of the right answers."""
        return " ".join(text.split()) not in {" ".join(answer.split()) for answer in self.answers}


class ServedManifest(ReadModel):
    """What serving reads. files: by name with slashes; below `state/` they are of training alone."""

    files: Mapping[str, FileEntry] = {}
    smoke: tuple[SmokeQuestion, ...] = ()


def read_checked(name: str, folder: Path) -> ServedManifest:
    """Return the manifest of a checkpoint in a folder after comparing the files; an empty one where there is none.

    name: as VISIONQ_MODEL names it, for the message. Raises CannotStart for a file that is missing or differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return ServedManifest()
    try:
        manifest = ServedManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CannotStart(f"VISIONQ_MODEL={name}: {MANIFEST} cannot be read") from error
    for file, entry in manifest.files.items():
        if "/" in file:
            continue
        stored = folder / file
        if not stored.is_file():
            if file.endswith(_NEEDED):
                raise CannotStart(f"VISIONQ_MODEL={name}: {file} is missing, which its {MANIFEST} names")
        elif stored.stat().st_size != entry.num_bytes or sha256_of(stored) != entry.sha256:
            raise CannotStart(f"VISIONQ_MODEL={name}: {file} is not the file that its {MANIFEST} names: digests differ")
    return manifest
