"""`visionq-worker check`: does this checkpoint load and answer on this machine, and what does it cost?"""

from __future__ import annotations

import resource
from collections.abc import Iterable

import torch

from worker.bootstrap import engine_config, prompt_builder
from worker.engine.engine import Engine
from worker.errors import CannotStart, WorkerError
from worker.lifecycle.self_test import PLAIN_SIZE, TriedOut, try_out
from worker.models.generation_defaults import GenerationDefaults
from worker.models.loader import LoadedModel, load
from worker.models.quantization import describe_layers, weight_bytes
from worker.prompting.prepare import PromptBuilder, trial_prompts
from worker.settings import Quantization, WorkerSettings

MEBIBYTE = 1024 * 1024
STOP_TIMEOUT_S = 10.0


def check(settings: WorkerSettings) -> str:
    """Load the model, ask it about one picture, return a report. Raises CannotStart when any of it fails."""
    loaded = load(settings)
    prompts = prompt_builder(settings, loaded)
    trials = trial_prompts(prompts, loaded.capabilities)
    engine = Engine(loaded.model, loaded.tokenizer, engine_config(settings, loaded), trials=trials)
    engine.start()
    try:
        tried = try_out(engine, prompts)
    except WorkerError as error:
        raise CannotStart(f"VISIONQ_MODEL: the model does not answer: {error}") from error
    finally:
        engine.stop(STOP_TIMEOUT_S)
    return "\n".join(f"{name:<20} {value}" for name, value in _facts(settings, loaded, engine, prompts, tried))


def _facts(
    settings: WorkerSettings, loaded: LoadedModel, engine: Engine, prompts: PromptBuilder, tried: TriedOut
) -> Iterable[tuple[str, object]]:
    config = engine_config(settings, loaded)
    revision = f" at {settings.model_revision}" if settings.model_revision else ""
    yield "model", f"{settings.model}{revision} ({type(loaded.model).__name__})"
    yield "chat template", _asked(loaded)
    yield "device", f"{loaded.device}, {str(loaded.dtype).removeprefix('torch.')}, attention {loaded.attention}"
    yield "weights", f"{weight_bytes(loaded.model) / MEBIBYTE:.1f} MiB"
    if settings.quantization is not Quantization.NONE:
        yield "quantised", describe_layers(loaded.model, settings.quantization)
    yield "context", f"{loaded.max_context} tokens, {config.max_model_len} per job, {config.max_num_seqs} jobs at once"
    fallback = "" if engine.why_not_paged is None else f", not paged: {engine.why_not_paged}"
    yield "keys and values", engine.kv_backend + fallback
    yield "generation config", _generation(settings, loaded.generation)
    yield "buckets", ", ".join(sorted(settings.readable_buckets))
    yield "peak memory", f"{_peak_bytes(loaded) / MEBIBYTE:.0f} MiB"
    yield "media options", _limits(prompts)
    cost = f", {tried.num_media_tokens} for a picture of {PLAIN_SIZE}×{PLAIN_SIZE}"
    yield "prompt", f"{tried.finish.num_prompt_tokens} tokens{cost if tried.num_media_tokens else ''}"
    yield "first token", f"{tried.finish.first_token_s:.3f} s"
    yield "answer", f"{tried.text!r} ({tried.finish.num_completion_tokens} tokens)"


def _generation(settings: WorkerSettings, defaults: GenerationDefaults) -> str:
    """Say what of the checkpoint's generation config counts beyond its end tokens, and what does not."""
    if settings.generation_config == "off":
        return "off: end tokens only"
    in_force = ", ".join(f"{name} {value!r}" for name, value in defaults.in_force.items()) or "end tokens only"
    return in_force + (f"; ignored: {', '.join(defaults.ignored)}" if defaults.ignored else "")


def _asked(loaded: LoadedModel) -> str:
    """Return where the chat template came from, or whose way of asking stands in for it."""
    can = loaded.capabilities
    return can.template_source or f"none; asked as {'nobody' if can.captioner is None else can.captioner.family} is"


def _limits(prompts: PromptBuilder) -> str:
    """Return which limits jobs may ask for."""
    way, tokens = prompts.limits.pictures, prompts.limits.least_tokens
    if way is None:
        return "none: the processor sizes pictures in its own way only"
    cost = "" if tokens is None else f" and {tokens} tokens"
    return f"{'min_pixels, ' if way.takes_min else ''}max_pixels; a picture has {way.least} pixels{cost} at least"


def _peak_bytes(loaded: LoadedModel) -> int:
    """Peak memory of the device, or of the process on a CPU (Linux counts it in KiB)."""
    if loaded.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(loaded.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
