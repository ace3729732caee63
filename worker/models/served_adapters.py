"""Reads the LoRA adapters that are served beside their base, each under the name that jobs give.

In: the loaded base and where the adapters are. Out: their factors. A fault is CannotStart with the adapter's name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from transformers import PreTrainedModel

from worker.errors import CannotStart
from worker.models.digests import folder_digest
from worker.models.inputs import LoadedAdapter
from worker.models.source import find_adapter
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)


def read_adapters(
    settings: WorkerSettings, uris: Mapping[str, str], model: PreTrainedModel, checkpoint: str
) -> tuple[LoadedAdapter, ...]:
    """Return the adapters by name; `checkpoint` is the digest of the weights that `model` has.

    Raises CannotStart for one that is no LoRA adapter, does not fit or was trained on other weights.
    """
    return tuple(_read(settings, name, uri, model, checkpoint) for name, uri in uris.items())


def _read(settings: WorkerSettings, name: str, uri: str, model: PreTrainedModel, checkpoint: str) -> LoadedAdapter:
    try:
        adapter = find_adapter(settings.model_copy(update={"model": uri, "model_revision": ""}))
        if adapter.base_digest is None:
            facts = {"action": "load", "adapter": name, "uri": uri}
            logger.warning("the adapter does not say which weights it was trained on", extra=facts)
        elif adapter.base_digest != checkpoint:
            raise CannotStart(
                f"VISIONQ_MODEL={uri}: the adapter was trained on other weights of {adapter.base}: their digest was "
                f"{adapter.base_digest}, {checkpoint} are served"
            )
        return adapter.beside(model, name, folder_digest(adapter.folder))
    except CannotStart as error:
        told = str(error).replace(f"VISIONQ_MODEL={uri}", f"VISIONQ_ADAPTERS: {name}={uri}")
        raise CannotStart(told) from error
