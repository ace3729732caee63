"""Finds the checkpoint that the settings name: a folder, a hub id with its revision, or one to download from S3.

A folder or prefix may also hold a LoRA adapter, which names its base as VISIONQ_MODEL would.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from worker.errors import CannotStart
from worker.models import checkpoint
from worker.models.adapter import Adapter, read_adapter
from worker.models.digests import checkpoint_digest, folder_digest
from worker.models.remote import download
from worker.settings import Quantization, WorkerSettings

logger = logging.getLogger(__name__)

_DEMO_MODELS: Final = Path(__file__).parent.parent / "demo_model"
#: The checkpoints that ship, by the names that `VISIONQ_MODEL` gives them.
SHIPPED: Final = {"demo": _DEMO_MODELS / "checkpoint", "demo-captioner": _DEMO_MODELS / "captioner"}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files are.

    place: of the weights and the config, a local folder or a hub id. revision: of a hub id; None: the default one.
    adapter: to be merged into the weights.
    """

    place: str | Path
    revision: str | None
    adapter: Adapter | None = None

    def digest(self, name: str) -> str:
        """Return the digest of the weights, of a base and its adapter joined by `+`. Reads all of them.

        name: as VISIONQ_MODEL names them. Raises CannotStart where there are none.
        """
        whole = checkpoint_digest(name, self.place, self.revision)
        return whole if self.adapter is None else f"{whole}+{folder_digest(self.adapter.folder)}"

    @property
    def processor(self) -> str | Path:
        """Where the processor's files are."""
        return self.adapter.folder if self.adapter is not None and self.adapter.has_processor else self.place

    @property
    def processor_revision(self) -> str | None:
        """The revision at which the processor's files are read."""
        return self.revision if self.processor == self.place else None


def find_model(settings: WorkerSettings) -> Source:
    """Return where the files of a whole model or of an adapter and its base are.

    What is in S3 is downloaded. Raises CannotStart, also for an adapter beside VISIONQ_QUANTIZATION: the quantised
    weights would be other ones than those it was trained for.
    """
    place, revision = _find(settings)
    if not isinstance(place, Path) or not _is_adapter(settings.model, place):
        return Source(place, revision)
    adapter = read_adapter(settings.model, place)
    if settings.quantization is not Quantization.NONE:
        raise CannotStart(
            f"VISIONQ_QUANTIZATION={settings.quantization}: VISIONQ_MODEL={settings.model} is an adapter, which is "
            "merged into whole weights; use none"
        )
    of_base = {"model": adapter.base, "model_revision": adapter.config.revision or ""}
    try:
        base, base_revision = find_checkpoint(settings.model_copy(update=of_base))
    except CannotStart as error:
        raise CannotStart(f"VISIONQ_MODEL={settings.model}: the base of the adapter is not served: {error}") from error
    _refuse_other_base(adapter, base, base_revision)
    return Source(base, base_revision, adapter)


def find_adapter(settings: WorkerSettings) -> Adapter:
    """Return the LoRA adapter that the settings name as their model; one in S3 is downloaded. Raises CannotStart."""
    place, _ = _find(settings)
    if not isinstance(place, Path) or not _is_adapter(settings.model, place):
        raise CannotStart(f"VISIONQ_MODEL={settings.model}: no {checkpoint.ADAPTER_CONFIG}, so it is no adapter")
    return read_adapter(settings.model, place)


def _refuse_other_base(adapter: Adapter, base: str | Path, revision: str | None) -> None:
    """Raise CannotStart when the base has other weights than those that the adapter was trained on, as far as it says.

    On other weights it would be another model than the one that was judged, without a sign.
    """
    facts = {"action": "load", "adapter": adapter.name, "base": adapter.base}
    if adapter.base_digest is None:
        logger.warning("the adapter does not say which weights it was trained on", extra=facts)
        return
    found = checkpoint_digest(adapter.name, base, revision)
    if found != adapter.base_digest:
        raise CannotStart(
            f"VISIONQ_MODEL={adapter.name}: the adapter was trained on other weights of {adapter.base}: their digest "
            f"was {adapter.base_digest}, it is {found} now"
        )


def find_checkpoint(settings: WorkerSettings) -> tuple[str | Path, str | None]:
    """Return a local folder, or a hub id, and the revision at which its files are read (None: the default one).

    A checkpoint in S3 is downloaded. Raises CannotStart, also for an adapter.
    """
    place, revision = _find(settings)
    if isinstance(place, Path):
        checkpoint.refuse_adapters(settings.model, place)
    return place, revision


def _find(settings: WorkerSettings) -> tuple[str | Path, str | None]:
    source = None if settings.model.startswith("s3://") else _source(settings.model)
    revision = _revision(settings, is_of_hub=isinstance(source, str))
    return (source if source is not None else download(settings)), revision


def _source(value: str) -> str | Path:
    """Return the folder of a checkpoint, or the hub id unchanged."""
    folder = SHIPPED.get(value) or Path(value).expanduser()
    is_folder_name = value in SHIPPED or value.startswith(("/", ".", "~"))
    if not folder.is_dir():
        if is_folder_name:
            raise CannotStart(f"VISIONQ_MODEL={value}: there is no folder {folder}")
        return value
    _is_adapter(value, folder)
    return folder


def _is_adapter(name: str, folder: Path) -> bool:
    files = [path.name for path in folder.iterdir()]
    config = folder / checkpoint.ADAPTER_CONFIG
    return checkpoint.is_adapter(name, files, f"in {folder}", lambda: checkpoint.read_content(config))


def _revision(settings: WorkerSettings, *, is_of_hub: bool) -> str | None:
    """Return the revision at which all files of a hub checkpoint are read; None: the hub's default."""
    if settings.model_revision and not is_of_hub:
        raise CannotStart(
            f"VISIONQ_MODEL_REVISION={settings.model_revision}: only checkpoints of the model hub have revisions, "
            f"VISIONQ_MODEL={settings.model} is none"
        )
    return settings.model_revision or None
