"""Checks that a checkpoint is a complete model: refuses adapters, unknown quantisation, missing and surplus weights.

In: the checkpoint's place, its config, the loading report. Out: nothing, or CannotStart naming the fault. transformers
only warns in these cases and continues: with random weights, or with the base model instead of the adapter's.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from os.path import lexists
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file

from worker.errors import CannotStart
from worker.settings import Quantization

logger = logging.getLogger(__name__)

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
#: Files of an adapter, as PEFT names them.
ADAPTER_FILES: Final = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin")
CONFIG: Final = "config.json"
#: In the output of a training run, which holds its checkpoints in folders.
LATEST: Final = "latest.json"
#: Files with weights of a whole model.
_WEIGHTS: Final = re.compile(r"\.safetensors(\.index\.json)?$|^pytorch_model.*\.bin$")
#: Buffers that older files hold and current models compute themselves; they may be left out.
_COMPUTED_BUFFERS: Final = re.compile(
    r"(^|\.)(inv_freq|(cos|sin)_cached|position_ids|num_batches_tracked|masked_bias|relative_position_index)$"
)
#: Modules of a tower or decoder that inference does not need: training heads, poolers, speculative decoding.
_UNUSED_PARTS: Final = re.compile(r"(^|_)(heads?|pooler|classifier|score|mtp)($|_)")
#: safetensors' names of integer types.
_INTEGER_TYPES: Final = frozenset({"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
#: Parameters that adapters add, by the names that PEFT gives them.
_ADAPTER_WEIGHTS: Final = re.compile(r"(^|\.)(lora_|ia3_|base_layer\.|modules_to_save\.)")


def refuse_adapters(name: str, source: str | Path, revision: str | None = None) -> None:
    """Raise CannotStart for a folder or hub checkpoint that is an adapter, or also holds one.

    With peft installed transformers would serve the adapter, without it the bare base model.
    """
    for file in ADAPTER_FILES:
        path = stored_file(source, file, revision)
        if path is not None:
            content = read_content(path) if file == ADAPTER_CONFIG else b""
            raise adapter_refused(name, "a whole checkpoint is needed here; merge it into its base model", content)


def is_adapter(name: str, files: Collection[str], place: str, adapter_config: Callable[[], bytes]) -> bool:
    """Return whether the files of a folder, by their names, are a LoRA adapter; else they are a whole checkpoint.

    A config of the base may lie beside an adapter. Raises CannotStart for files that are neither or both, and for
    adapters that are pickles. place: in words, for messages. adapter_config: reads adapter_config.json.
    """
    if not any(file in ADAPTER_FILES for file in files):
        if CONFIG not in files:
            run = f"; {LATEST} is a training run's: name one of the folders checkpoint-N" if LATEST in files else ""
            raise CannotStart(f"VISIONQ_MODEL={name}: no {CONFIG} {place}, so it is not a checkpoint{run}")
        return False
    content = adapter_config() if ADAPTER_CONFIG in files else b""
    if any(file not in ADAPTER_FILES and _WEIGHTS.search(file) for file in files):
        raise adapter_refused(name, "weights of a whole model lie beside it; give each a folder of its own", content)
    if not {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= set(files):
        raise adapter_refused(name, f"it needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}; pickles are not loaded", content)
    return True


def adapter_refused(name: str, problem: str, adapter_config: bytes = b"") -> CannotStart:
    """Return the error for an adapter; `adapter_config` is the content of its adapter_config.json, which names the
    base.
    """
    try:
        fields = json.loads(adapter_config or b"{}")
    except (ValueError, RecursionError):
        fields = {}
    kind, base = "LoRA", "a model that its adapter_config.json does not name"
    if isinstance(fields, Mapping):
        base = str(fields.get("base_model_name_or_path") or base)
        kind = str(fields.get("peft_type") or "LORA").replace("LORA", "LoRA")
    return CannotStart(f"VISIONQ_MODEL={name}: a {kind} adapter of {base}; {problem}")


def refuse_unknown_quantization(name: str, config: PreTrainedConfig, wanted: Quantization) -> None:
    """Raise CannotStart for weights quantised by an unknown method, or that are to be quantised a second time."""
    for part in _configs(config):
        stored: Any = getattr(part, "quantization_config", None)
        if stored is None:
            continue
        fields = stored if isinstance(stored, Mapping) else stored.to_dict()
        method = _quant_method(fields)
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            raise CannotStart(
                f"VISIONQ_MODEL={name}: its weights are quantised by {method or 'an unnamed method'} (quant_method of "
                "config.json), which transformers does not know"
            )
        if wanted is not Quantization.NONE:
            raise CannotStart(f"VISIONQ_QUANTIZATION={wanted}: the checkpoint is already quantised, by {method}")


def refuse_integer_weights(name: str, source: str | Path, revision: str | None, config: PreTrainedConfig) -> None:
    """Raise CannotStart for weights stored as integers without a quantisation config that says how to decode them.

    transformers would use the integers themselves as weights.
    """
    beside = stored_file(source, CONFIG, revision)
    if beside is None or any(getattr(part, "quantization_config", None) is not None for part in _configs(config)):
        return
    for path in sorted(beside.parent.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            types = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - no mapping
        for key, stored_as in types.items():
            if key.endswith((".weight", ".bias")) and stored_as in _INTEGER_TYPES:
                raise CannotStart(
                    f"VISIONQ_MODEL={name}: {key} is stored as {stored_as}, and config.json has no quantization_config "
                    "that says how to read it"
                )


def check_weights(name: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raise CannotStart unless the file held every weight of the model, and all of its weights belong to the model.

    report: the loading report of `from_pretrained`. Tied weights are not missing. Surplus weights are refused when they
    belong to a module of this model (a bias or norm that the config disables, a further layer); others, such as heads
    for training, are logged once.
    """
    missing = sorted(report["missing_keys"])
    misshapen = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"])
    left_over = sorted(key for key in report["unexpected_keys"] if not _COMPUTED_BUFFERS.search(key))
    adapter = [key for key in left_over if _ADAPTER_WEIGHTS.search(key)]
    if adapter:
        raise CannotStart(
            f"VISIONQ_MODEL={name}: the file holds weights of an adapter that are not merged (first: {adapter[0]})"
        )
    dropped = list(_dropped(model, left_over))
    if missing or misshapen or dropped:
        raise CannotStart(
            f"VISIONQ_MODEL={name}: the weights do not belong to the config: {len(missing)} of "
            f"{len(model.state_dict())} are missing, {len(misshapen)} have another shape, {len(dropped)} have no place "
            f"(first: {(misshapen or missing or dropped)[0]})"
        )
    if left_over:
        facts = {"action": "load", "count": len(left_over), "weights": left_over[:8]}
        logger.warning("weights of the file that the model has no place for", extra=facts)


def _dropped(model: PreTrainedModel, keys: list[str]) -> Iterator[str]:
    """Yield the keys of surplus weights that belong to a module of the model, or to a further one of a list of
    modules.
    """
    modules = {name for name, _ in model.named_modules()}
    places = {_any_number(key) for key, _ in model.named_parameters()}
    for key in keys:
        names = key.split(".")
        num_known = max(count for count in range(len(names)) if ".".join(names[:count]) in modules)
        owner, part = ".".join(names[:num_known]), names[num_known]
        # A module beside the towers and the decoder is none of theirs; a single parameter belongs to its owner.
        is_apart = owner in ("", model.base_model_prefix) and num_known < len(names) - 1
        is_in_a_layer = any(name.isdecimal() for name in names[:num_known])
        is_unused = not is_in_a_layer and _UNUSED_PARTS.search(part)
        if _any_number(key) in places or (owner and not (is_apart or is_unused)):
            yield key


def _any_number(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key)


def _quant_method(fields: Mapping[str, Any]) -> str:
    """Return the method's name as transformers looks it up; older bitsandbytes configs do not have it."""
    if fields.get("load_in_8bit") or fields.get("load_in_4bit"):
        return "bitsandbytes_4bit" if fields.get("load_in_4bit") else "bitsandbytes_8bit"
    method = fields.get("quant_method")
    return str(getattr(method, "value", method) or "")


def read_content(path: Path) -> bytes:
    """Return what is in a file; nothing if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _configs(part)


def stored_file(source: str | Path, file: str, revision: str | None = None) -> Path | None:
    """Return the path of a file of a folder or hub checkpoint, readable or not; None if there is none."""
    if isinstance(source, Path):
        return source / file if lexists(source / file) else None
    found = cached_file(
        source,
        file,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
