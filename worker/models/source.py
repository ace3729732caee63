"""Finds the checkpoint that the settings name: a folder, a hub id with its revision, or one to download from S3."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from worker.errors import CannotStart
from worker.models import checkpoint
from worker.models.remote import download
from worker.settings import WorkerSettings

DEMO_CHECKPOINT: Final = Path(__file__).parent.parent / "demo_model" / "checkpoint"


def find_checkpoint(settings: WorkerSettings) -> tuple[str | Path, str | None]:
    """Return a local folder, or a hub id, and the revision at which its files are read (None: the default one).

    A checkpoint in S3 is downloaded. Raises CannotStart.
    """
    source = None if settings.model.startswith("s3://") else _source(settings.model)
    revision = _revision(settings, is_of_hub=isinstance(source, str))
    return (source if source is not None else download(settings)), revision


def _source(value: str) -> str | Path:
    """Return the folder of a checkpoint, or the hub id unchanged."""
    folder = DEMO_CHECKPOINT if value == "demo" else Path(value).expanduser()
    is_folder_name = value == "demo" or value.startswith(("/", ".", "~"))
    if not folder.is_dir():
        if is_folder_name:
            raise CannotStart(f"VISIONQ_MODEL={value}: there is no folder {folder}")
        return value
    checkpoint.refuse_adapters(value, folder)
    if not (folder / "config.json").is_file():
        raise CannotStart(f"VISIONQ_MODEL={value}: no config.json in {folder}, so it is not a checkpoint")
    return folder


def _revision(settings: WorkerSettings, *, is_of_hub: bool) -> str | None:
    """Return the revision at which all files of a hub checkpoint are read; None: the hub's default."""
    if settings.model_revision and not is_of_hub:
        raise CannotStart(
            f"VISIONQ_MODEL_REVISION={settings.model_revision}: only checkpoints of the model hub have revisions, "
            f"VISIONQ_MODEL={settings.model} is none"
        )
    return settings.model_revision or None
