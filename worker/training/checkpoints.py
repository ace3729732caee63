"""The checkpoints of one output: committed whole or not at all, found again, verified, and removed when superseded.

`OUTPUT/checkpoint-N/` holds the files, its manifest last; `OUTPUT/latest.json` names the newest and the best one and is
written by a conditional, fenced write: an attempt that has lost its job to another one is refused. Knows no trainer.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from worker.models.digests import sha256_of
from worker.training.manifest import LATEST, MANIFEST, Latest, Manifest, read_latest, read_manifest
from worker.training.objects import Objects
from worker.training.progress import Stopped, StopReason, TrainingRefused

logger = logging.getLogger(__name__)

_MANIFEST_NAME: Final = re.compile(rf"checkpoint-(\d{{1,9}})/{re.escape(MANIFEST)}")
_FOLDER_NAME: Final = re.compile(r"checkpoint-(\d{1,9})/")
#: Written twice under the same condition at the start of a run: a store that takes both ignores conditions.
_TRIAL: Final = ".conditional-write-trial"
#: Claims of other attempts that may come in between our reading and our writing of `latest.json`.
_WRITE_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class Found:
    """A whole checkpoint that was copied to this machine and verified."""

    folder: Path
    manifest: Manifest
    uri: str


class Checkpoints:
    """The checkpoints below one place. One thread; several attempts of one job may have one each.

    job, fence: of the attempt that writes; the fence grows with every attempt of the job. Empty and 0: no job.
    save_total_limit: the newest ones that are kept, beside the best.
    """

    def __init__(self, objects: Objects, *, job: str = "", fence: int = 0, save_total_limit: int = 3) -> None:
        self._objects = objects
        self._job = job
        self._fence = fence
        self._limit = save_total_limit
        self._claim = 0

    @property
    def uri(self) -> str:
        """Where they are, with a slash at the end."""
        return self._objects.uri

    def uri_of(self, step: int) -> str:
        """Return the place of the checkpoint of one step."""
        return f"{self._objects.uri}{name_of(step)}/"

    def claim(self) -> None:
        """Make this attempt the only one that may write from now on.

        Raises Stopped when a later attempt of the job has, and TrainingRefused when the store ignores conditions.
        """
        self._require_conditions()
        for _ in range(_WRITE_ATTEMPTS):
            latest, tag = self._read_latest()
            if latest.job == self._job and latest.fence > self._fence:
                raise Stopped(StopReason.LOST)
            self._claim = latest.claim + 1
            claimed = latest.model_copy(update={"claim": self._claim, "job": self._job, "fence": self._fence})
            if self._objects.write_if(LATEST, claimed.to_json().encode(), tag):
                return
        raise TrainingRefused(f"{self.uri}{LATEST}: others keep writing it; give every run an output of its own")

    def newest(self, directory: Path) -> Found | None:
        """Copy the newest whole checkpoint into a folder below `directory`; None: there is none.

        One whose files are missing or differ from its manifest is passed over, and logged. Raises TrainingRefused when
        there are checkpoints and all of them are broken.
        """
        steps = self.steps()
        for step in reversed(steps):
            found = self.fetch(step, directory)
            if found is not None:
                return found
        if steps:
            raise TrainingRefused(f"{self.uri}: none of its {len(steps)} checkpoints is whole")
        return None

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints that have a manifest, in order."""
        return sorted(int(name[1]) for name in map(_MANIFEST_NAME.fullmatch, self._objects.names()) if name)

    def fetch(self, step: int, directory: Path) -> Found | None:
        """Copy one checkpoint and verify every file of it; None, and a warning, unless it is whole."""
        return fetch_checkpoint(self._objects, f"{name_of(step)}/", directory / name_of(step))

    def manifest(self, step: int) -> Manifest | None:
        """Read the manifest of one checkpoint; None: there is none, or it is broken."""
        stored = self._objects.read(f"{name_of(step)}/{MANIFEST}")
        return None if stored is None else read_manifest(stored[0])

    def commit(self, folder: Path, manifest: Manifest, best_step: int | None) -> str:
        """Store a checkpoint's files, then its manifest, then `latest.json`; return the checkpoint's URI.

        Raises Stopped when another attempt has taken over: then nothing names what was stored.
        """
        name = name_of(manifest.step)
        self._own_latest()
        self._objects.delete(f"{name}/{MANIFEST}")
        for file in manifest.files:
            self._objects.upload(folder / file, f"{name}/{file}")
        written = folder / MANIFEST
        written.write_text(manifest.to_json(), encoding="utf-8")
        self._objects.upload(written, f"{name}/{MANIFEST}")
        self._name_newest(manifest.step, best_step)
        return self.uri_of(manifest.step)

    def prune(self, best_step: int | None) -> None:
        """Remove all but the newest checkpoints and the best one, each one's manifest first, and unfinished ones."""
        steps = self.steps()
        kept = {*steps[-self._limit :], best_step}
        names = self._objects.names()
        for step in sorted({int(found[1]) for name in names if (found := _FOLDER_NAME.match(name))} - kept):
            own = [name for name in names if name.startswith(f"{name_of(step)}/")]
            for name in sorted(own, key=lambda name: not name.endswith(f"/{MANIFEST}")):
                self._objects.delete(name)

    def _require_conditions(self) -> None:
        self._objects.delete(_TRIAL)
        self._objects.write_if(_TRIAL, b"{}", None)  # false also when its answer was lost and it was repeated
        was_taken_again = self._objects.write_if(_TRIAL, b"{}", None)
        self._objects.delete(_TRIAL)
        if was_taken_again:
            raise TrainingRefused(
                f"{self.uri}: this store ignores conditional writes (If-None-Match), so two attempts could overwrite "
                "each other's checkpoints"
            )

    def _read_latest(self) -> tuple[Latest, str | None]:
        stored = self._objects.read(LATEST)
        if stored is None:
            return Latest(), None
        latest = read_latest(stored[0])
        if latest is None:
            raise TrainingRefused(f"{self.uri}{LATEST}: not the file of a training run; use another output")
        return latest, stored[1]

    def _own_latest(self) -> tuple[Latest, str | None]:
        """Raises Stopped unless this attempt still is the one that may write."""
        latest, tag = self._read_latest()
        if latest.claim != self._claim:
            raise Stopped(StopReason.LOST)
        return latest, tag

    def _name_newest(self, step: int, best_step: int | None) -> None:
        latest, tag = self._own_latest()
        best = None if best_step is None else name_of(best_step)
        named = latest.model_copy(update={"step": step, "checkpoint": name_of(step), "best": best})
        # When the answer to a write is lost, its repetition is refused: by what the write itself has left.
        if not self._objects.write_if(LATEST, named.to_json().encode(), tag) and self._read_latest()[0] != named:
            raise Stopped(StopReason.LOST)  # only a claim of another attempt can have come in between


def name_of(step: int) -> str:
    """Return the name of a checkpoint's folder, as transformers' Trainer names it."""
    return f"checkpoint-{step}"


def fetch_checkpoint(objects: Objects, prefix: str, folder: Path) -> Found | None:
    """Copy the checkpoint below `prefix` into `folder` and verify it; None, and a warning, unless it is whole."""
    stored = objects.read(prefix + MANIFEST)
    manifest = None if stored is None else read_manifest(stored[0])
    problem = "it has no manifest" if manifest is None else None
    if manifest is not None:
        shutil.rmtree(folder, ignore_errors=True)
        problem = next(_problems(objects, prefix, folder, manifest), None)
    if manifest is None or problem is not None:
        facts = {"action": "train.resume", "checkpoint": objects.uri + prefix, "problem": problem}
        logger.warning("a checkpoint is not whole and is not used", extra=facts)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Found(folder, manifest, objects.uri + prefix)


def _problems(objects: Objects, prefix: str, folder: Path, manifest: Manifest) -> Iterator[str]:
    """Fetch file by file; yield what is wrong with each."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            yield f"{name}: not a name below the checkpoint"
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            objects.download(prefix + name, path)
        except FileNotFoundError:
            yield f"{name}: missing"
            continue
        if path.stat().st_size != entry.num_bytes or sha256_of(path) != entry.sha256:
            yield f"{name}: its bytes are not those of the manifest"
