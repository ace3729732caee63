"""Loads the one checkpoint that a worker serves: its model, its processor and its capabilities.

In: settings. Out: a `LoadedModel` in eval mode on its device. Any fault of the settings or the checkpoint is
CannotStart with the variable's name. A folder is loaded without network access; pickles are never loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.logging import disable_progress_bar

from worker.errors import CannotStart
from worker.models import checkpoint
from worker.models.capabilities import Capabilities, probe
from worker.models.context import max_context, max_positions
from worker.models.generation_defaults import NEUTRAL, GenerationDefaults, eos_token_ids, read_generation_defaults
from worker.models.inputs import LoadedAdapter
from worker.models.placement import Placement, attention_name, free_gpu_bytes, place, require_on_gpus
from worker.models.quantization import choose_layers, expected_bytes, guard_inputs, quantization_config
from worker.models.served_adapters import read_adapters
from worker.models.source import Source, find_checkpoint, find_model
from worker.models.templates import ChatTemplate, settle_template
from worker.settings import Dtype, Quantization, Switch, WorkerSettings, export

logger = logging.getLogger(__name__)

#: transformers would have a public service convert a hub checkpoint that has pickles only.
_LIBRARY_ENVIRONMENT = {"DISABLE_SAFETENSORS_CONVERSION": "1"}


@dataclass(frozen=True)
class LoadedModel:
    """A loaded checkpoint. Shared by all threads, and not changed by them.

    attention: transformers' name of the attention implementation.
    max_context: tokens of prompt and answer that the text model's positions allow.
    generation: the checkpoint's defaults for what a job leaves open. checkpoint: digest of the weights. adapters: those
    that are served beside it.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    tokenizer: PreTrainedTokenizerBase
    capabilities: Capabilities
    device: torch.device
    dtype: torch.dtype
    attention: str
    max_context: int
    generation: GenerationDefaults = NEUTRAL
    checkpoint: str = ""
    adapters: tuple[LoadedAdapter, ...] = ()


def load(settings: WorkerSettings) -> LoadedModel:
    """Load the checkpoint that the settings name. Raises CannotStart."""
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    export(_LIBRARY_ENVIRONMENT)
    disable_progress_bar()
    found = find_model(settings)
    source, revision = found.place, found.revision
    config = _read_config(settings, source, revision)
    checkpoint.refuse_unknown_quantization(settings.model, config, settings.quantization)
    architecture: type[PreTrainedModel] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    free_bytes = free_gpu_bytes()
    dtype = _dtype(settings, found, is_on_gpu=bool(free_bytes))
    empty = cache(partial(_empty_model, architecture, config))
    placement = place(
        settings.device,
        free_bytes,
        lambda: expected_bytes(empty(), settings.quantization, dtype, torch.device("cuda")),
    )
    processor = _load_processor(settings, found.processor, found.processor_revision)
    template = settle_template(settings, processor, found.processor)
    _check_generation_config(settings, source, revision)
    with ThreadPoolExecutor(1, "digest") as pool:  # beside the loading: both read all weights
        digest = pool.submit(found.digest, settings.model)
        model = _load_model(settings, source, revision, architecture, empty, placement, dtype)
    checkpoint.refuse_integer_weights(settings.model, source, revision, config)
    if found.adapter is not None:
        found.adapter.merge_into(model)
    return LoadedModel(
        model=model,
        processor=processor,
        tokenizer=processor.tokenizer,
        capabilities=_probe(settings, processor, model.config, template),
        device=placement.device,
        dtype=dtype,
        attention=str(model.config._attn_implementation),
        max_context=_max_context(settings, model),
        generation=_generation(settings, model, processor),
        checkpoint=digest.result(),
        adapters=read_adapters(settings, settings.adapter_uris, model, digest.result()),
    )


def load_processor(settings: WorkerSettings) -> ProcessorMixin:
    """Load the checkpoint's processor alone, with the chat template that serving uses. Raises CannotStart."""
    source, revision = find_checkpoint(settings)
    processor = _load_processor(settings, source, revision)
    settle_template(settings, processor, source)
    return processor


def _dtype(settings: WorkerSettings, found: Source, *, is_on_gpu: bool) -> torch.dtype:
    """Return the dtype of the weights. On a CPU `auto` is float32: half-precision kernels are slower there.

    A QLoRA adapter belongs to weights that were quantised from one dtype.
    """
    wanted = settings.dtype
    if found.adapter is not None and found.adapter.quantized_base is not None:
        needed = found.adapter.quantized_base.load_as
        if wanted not in (Dtype.AUTO, needed):
            raise CannotStart(
                f"VISIONQ_DTYPE={wanted}: VISIONQ_MODEL={settings.model} was trained beside weights that were "
                f"quantised from {needed}; use auto"
            )
        wanted = needed
    if wanted is Dtype.AUTO:
        return torch.bfloat16 if is_on_gpu and settings.device != "cpu" else torch.float32
    named: torch.dtype = getattr(torch, wanted.value)
    return named


def _read_config(settings: WorkerSettings, source: str | Path, revision: str | None) -> PreTrainedConfig:
    """Read the config and refuse an architecture that is not served, before gigabytes are downloaded or read."""
    problem = (
        "its config cannot be read"
        if isinstance(source, Path)
        else "no such folder, nor a readable hub checkpoint (gated ones need HF_TOKEN)"
    )
    if revision is not None:
        problem += f" at VISIONQ_MODEL_REVISION={revision}"
    with _refusing(settings, problem):
        if not isinstance(source, Path):
            checkpoint.refuse_adapters(settings.model, source, revision)
        config = AutoConfig.from_pretrained(source, revision=revision, local_files_only=isinstance(source, Path))
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise CannotStart(f"VISIONQ_MODEL={settings.model}: {config.model_type} is not a vision-language architecture")
    return config


def _empty_model(architecture: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model on the meta device, without weights; it has a copy of the config, which models may change."""
    with init_empty_weights():
        empty = architecture(deepcopy(config))
    empty.tie_weights()
    return empty


def _load_processor(settings: WorkerSettings, source: str | Path, revision: str | None) -> ProcessorMixin:
    with _refusing(settings, "its processor cannot be loaded"):
        processor = AutoProcessor.from_pretrained(source, revision=revision, local_files_only=isinstance(source, Path))
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise CannotStart(
            f"VISIONQ_MODEL={settings.model}: {type(processor).__name__} takes no images; "
            "this worker serves vision-language checkpoints"
        )
    if not processor.tokenizer.is_fast:
        raise CannotStart(f"VISIONQ_MODEL={settings.model}: no tokenizer.json; convert the tokenizer to a fast one")
    if settings.image_splitting is not Switch.AUTO:
        _set_image_splitting(processor, settings.image_splitting)
    return processor


def _set_image_splitting(processor: ProcessorMixin, switch: Switch) -> None:
    """Set image splitting for pixels and placeholder text alike: Idefics processors read both from here."""
    if hasattr(processor.image_processor, "do_image_splitting"):
        processor.image_processor.do_image_splitting = switch is Switch.ON
    elif switch is Switch.ON:
        raise CannotStart(
            f"VISIONQ_IMAGE_SPLITTING={switch}: {type(processor).__name__} has no image splitting; use auto or off"
        )


def _load_model(
    settings: WorkerSettings,
    source: str | Path,
    revision: str | None,
    architecture: type[PreTrainedModel],
    empty: Callable[[], PreTrainedModel],
    placement: Placement,
    dtype: torch.dtype,
) -> PreTrainedModel:
    attention = attention_name(settings.attention, architecture, placement.device, dtype)
    options: dict[str, Any] = {
        "dtype": dtype,
        "revision": revision,
        "local_files_only": isinstance(source, Path),
        "use_safetensors": True,  # a pickle may hold code
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # check_weights refuses them, naming one
        **_quantization_options(settings, empty, placement, dtype),
        **placement.options,
        **({"attn_implementation": attention} if attention else {}),
    }
    with _refusing(settings, "its weights cannot be loaded"):
        model, report = AutoModelForImageTextToText.from_pretrained(source, **options)
    checkpoint.check_weights(settings.model, model, report)
    require_on_gpus(settings.device, model)
    model.eval()
    if settings.quantization is not Quantization.NONE:
        guard_inputs(model)
    return model


def _quantization_options(
    settings: WorkerSettings, empty: Callable[[], PreTrainedModel], placement: Placement, dtype: torch.dtype
) -> dict[str, Any]:
    if settings.quantization is Quantization.NONE:
        return {}
    choice = choose_layers(empty(), settings.quantization, dtype, placement.device)
    if choice.unserved:
        logger.warning(
            "Layers left unquantised: the library cannot compute their sizes here",
            extra={"action": "load", "quantization": str(settings.quantization), "layers": list(choice.unserved)},
        )
    # Quantisers need a device_map, also for a CPU.
    config = quantization_config(settings.quantization, dtype, choice)
    return {"device_map": {"": placement.device}, "quantization_config": config}


def _probe(
    settings: WorkerSettings, processor: ProcessorMixin, config: PreTrainedConfig, template: ChatTemplate | None
) -> Capabilities:
    try:
        return probe(processor, config, template)
    except ValueError as error:
        where = template.source if template is not None else "none"
        raise CannotStart(f"VISIONQ_MODEL={settings.model}: {error} ({where})") from error


def _max_context(settings: WorkerSettings, model: PreTrainedModel) -> int:
    positions, context = max_positions(model.config), max_context(model.config)
    if positions is None or context is None:
        raise CannotStart(
            f"VISIONQ_MODEL={settings.model}: the text config of {type(model).__name__} has no max_position_embeddings"
        )
    if context < positions:
        facts = {"action": "load", "max_context": context, "max_position_embeddings": positions}
        logger.warning("context bounded: longer sequences would change the positions of others", extra=facts)
    return context


def _check_generation_config(settings: WorkerSettings, source: str | Path, revision: str | None) -> None:
    """Refuse a file that cannot be read: transformers would continue without it, and without its end tokens."""
    if checkpoint.stored_file(source, GENERATION_CONFIG_NAME, revision) is not None:
        with _refusing(settings, f"its {GENERATION_CONFIG_NAME} cannot be read"):
            GenerationConfig.from_pretrained(source, revision=revision, local_files_only=isinstance(source, Path))


def _generation(settings: WorkerSettings, model: PreTrainedModel, processor: ProcessorMixin) -> GenerationDefaults:
    """Return the checkpoint's defaults, and log once which of its fields are ignored."""
    eos_token_ids(model, processor.tokenizer)  # raises CannotStart for invalid ones
    if settings.generation_config == "off":
        return NEUTRAL
    defaults = read_generation_defaults(model)
    if defaults.ignored:
        logger.warning("generation_config fields ignored: %s", ", ".join(defaults.ignored), extra={"action": "load"})
    return defaults


@contextmanager
def _refusing(settings: WorkerSettings, problem: str) -> Iterator[None]:
    """Turn any exception of transformers for an unusable checkpoint into CannotStart with its first line."""
    try:
        yield
    except CannotStart:
        raise
    except Exception as error:  # neither library documents what it raises; tokenizers raises plain Exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # Without torchvision some processors are empty stubs, others raise when they are constructed.
        may_be_torchvision = isinstance(error, AttributeError) or "orchvision" in reason
        if may_be_torchvision and find_spec("torchvision") is None:
            reason = f"the family may need torchvision, install the `vision` extra ({reason})"
        raise CannotStart(f"VISIONQ_MODEL={settings.model}: {problem}: {reason}") from error
