"""Chooses and builds the KV back end of a model, and lets it prove itself before anything is served from it.

Paged blocks need a text model that calls the registered attention function in every layer. Rows need one that keeps
all its state in the keys and values of its own layers. Whether a back end answers as the model does is found out by
trying, see `proof`; a model that none of them answers for is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.adapters import Adapters
from worker.engine.attention.choose import choose_kernels
from worker.engine.attention.kernels import SDPA, Kernels
from worker.engine.attention.paged import LAYOUT, Call, attending
from worker.engine.cache_scope import CacheScopes
from worker.engine.config import EngineConfig, PagedConfig, VisionConfig
from worker.engine.kv_cache.blocks import LayerShape, PagedKV
from worker.engine.kv_cache.dense import FULL, SLIDING
from worker.engine.model_hooks import ModelHooks
from worker.engine.request import Unsuited
from worker.engine.runner.cuda_graphs import CudaGraphRecorder, DecodeGraphs, graph_sizes
from worker.engine.runner.dense import DenseRunner
from worker.engine.runner.paged import FlatForward, PagedRunner
from worker.engine.runner.proof import Reference, first_line, prove, references, trial_length
from worker.engine.tensors import computing_dtype
from worker.engine.vision.stage import VisionStage
from worker.errors import CannotStart
from worker.models.inputs import LoadedAdapter, ModelInputs

logger = logging.getLogger(__name__)

#: Tokens of the forward that tells the shapes of the layers.
PROBE_TOKENS: Final = 12


def runner_of(model: PreTrainedModel, config: EngineConfig, trials: Sequence[ModelInputs]) -> PagedRunner | DenseRunner:
    """Return the runner of an engine, see `build_runner`."""
    sizes = config.max_num_seqs, config.max_model_len, config.paged, config.vision
    return build_runner(model, *sizes, trials, adapters=config.adapters, checkpoint=config.checkpoint)


@torch.inference_mode()
def build_runner(
    model: PreTrainedModel,
    max_num_seqs: int,
    max_model_len: int,
    paged: PagedConfig | None,
    vision: VisionConfig | None = None,
    trials: Sequence[ModelInputs] = (),
    *,
    adapters: Sequence[LoadedAdapter] = (),
    checkpoint: str = "",
) -> PagedRunner | DenseRunner:
    """Return a paged runner if it is asked for and the model is suited, else rows.

    trials: prompts about which a back end must answer as the model's own `generate` does, see `proof`; adapters,
    checkpoint: see `Adapters`. Raises CannotStart when memory does not hold one full request, or when neither back end
    can serve the model, with the reasons, and for an adapter that cannot be served.
    """
    try:
        hooks = ModelHooks(model)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise _cannot_serve(model, {"its text decoder": first_line(error)}) from error
    layers = Adapters(hooks, adapters) if adapters else None
    scopes = CacheScopes(checkpoint, adapters)
    plan = _Plan(hooks, layers, scopes, vision or VisionConfig(), max_num_seqs, max_model_len)
    try:
        return _proven_runner(plan, paged, trials)
    except BaseException:
        if layers is not None:
            layers.remove()
        raise


def _proven_runner(plan: _Plan, paged: PagedConfig | None, trials: Sequence[ModelInputs]) -> PagedRunner | DenseRunner:
    reasons: dict[str, str] = {}
    model = plan.hooks.model
    try:
        plan.expected += references(plan.hooks, trials, plan.max_model_len, plan.adapters)
    except Unsuited as reason:
        raise _cannot_serve(model, {"its text decoder": str(reason)}) from reason
    if paged is not None:
        try:
            return _paged_runner(plan, paged)
        except Unsuited as reason:
            reasons["paged blocks"] = str(reason)
            facts = {"action": "engine.prove", "kv_backend": "slots", "reason": str(reason)}
            logger.warning("model cannot be served from paged blocks", extra=facts)
    try:
        return _dense_runner(plan, reasons.get("paged blocks"))
    except Unsuited as reason:
        reasons["rows"] = str(reason)
        raise _cannot_serve(model, reasons) from reason


def _cannot_serve(model: PreTrainedModel, reasons: Mapping[str, str]) -> CannotStart:
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return CannotStart(f"VISIONQ_MODEL: {type(model).__name__} cannot be served here ({why})")


@dataclass(slots=True)
class _Plan:
    """What both back ends are made of, and what they must answer."""

    hooks: ModelHooks
    adapters: Adapters | None
    scopes: CacheScopes
    vision: VisionConfig
    max_num_seqs: int
    max_model_len: int
    expected: list[Reference] = field(default_factory=list)

    @property
    def num_trial_rows(self) -> int:
        return min(self.max_num_seqs, len(self.expected) + 1)

    def stage(self) -> VisionStage:
        return VisionStage(self.hooks, self.vision, self.scopes)


def _dense_runner(plan: _Plan, why_not_paged: str | None) -> DenseRunner:
    """Prove rows on a few short ones. Raises Unsuited."""
    hooks, adapters, num_rows = plan.hooks, plan.adapters, plan.num_trial_rows
    trial = DenseRunner(hooks, plan.stage(), num_rows, trial_length(plan.expected), adapters=adapters)
    prove(trial, plan.expected, num_rows, computing_dtype(hooks.model))
    return DenseRunner(hooks, plan.stage(), plan.max_num_seqs, plan.max_model_len, why_not_paged, adapters)


def _paged_runner(plan: _Plan, config: PagedConfig) -> PagedRunner:
    """Choose the attention code, prove it, take the memory, record decode steps: in this order. Raises Unsuited."""
    hooks = plan.hooks
    layout = probe(hooks)
    num_heads = hooks.text_config.num_attention_heads
    kernels = choose_kernels(layout, num_heads, config.block_size) if config.tries_kernels else SDPA
    _prove_paged(plan, layout, kernels, config)
    stage = plan.stage()
    free_bytes = _free_bytes(layout, hooks.model.device, stage.cache_bytes)
    num_blocks = count_blocks(config, layout, plan.max_num_seqs, plan.max_model_len, free_bytes)
    kv = PagedKV(layout, num_blocks, config.block_size)
    forward = FlatForward(hooks, kv, kernels, plan.adapters)
    facts = {"action": "engine.probe", "kv_backend": "paged", "num_blocks": str(num_blocks)}
    logger.info("serving from paged blocks", extra=facts)
    return PagedRunner(
        hooks,
        kv,
        stage,
        plan.max_num_seqs,
        plan.max_model_len,
        reads_whole=config.reads_whole,
        reuses_prefixes=config.reuses_prefixes,
        forward=forward,
        graphs=_graphs(plan, config, forward, layout),
    )


def _prove_paged(plan: _Plan, layout: Mapping[int, LayerShape], kernels: Kernels, config: PagedConfig) -> None:
    """Prove paged blocks on as few as hold the trial prompts. Raises Unsuited."""
    length, num_rows = trial_length(plan.expected), plan.num_trial_rows
    kv = PagedKV(layout, num_rows * -(-length // config.block_size) + 1, config.block_size)
    trial = PagedRunner(
        plan.hooks,
        kv,
        plan.stage(),
        num_rows,
        length,
        reads_whole=config.reads_whole,
        reuses_prefixes=config.reuses_prefixes,
        forward=FlatForward(plan.hooks, kv, kernels, plan.adapters),
    )
    prove(trial, plan.expected, num_rows, computing_dtype(plan.hooks.model))


def _graphs(
    plan: _Plan, config: PagedConfig, forward: FlatForward, layout: Mapping[int, LayerShape]
) -> DecodeGraphs | None:
    """Record decode steps where that can be done: on one GPU."""
    devices = {shape.device for shape in layout.values()}
    device = next(iter(devices))
    wanted = forward.has_kernel if config.records is None else config.records
    if not wanted or len(devices) > 1 or device.type != "cuda":
        return None
    width = -(-plan.max_model_len // config.block_size)
    graphs = DecodeGraphs(forward, graph_sizes(plan.max_num_seqs), width, device, CudaGraphRecorder())
    try:
        graphs.record()
    except RuntimeError:
        # Raises if the device is lost; otherwise some operator of this model cannot be recorded.
        torch.cuda.synchronize(device)
        logger.warning("decode steps cannot be recorded", extra={"action": "engine.record"}, exc_info=True)
        return None
    return graphs


@dataclass(frozen=True, slots=True)
class LayoutStep:
    """Stores nothing and notes the shape of every layer's keys and values."""

    layout: dict[int, LayerShape] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """Note the layer's shape and return zeros. The call's mask is that of `window_mask`.

        Raises NotImplementedError for a layer whose mask would be missed where none is built.
        """
        if call.mask is not None and (call.mask.numel() > 1 or call.mask.dtype != torch.long):
            raise NotImplementedError("masks of the model's own making")
        if call.mask is not None and int(call.mask) != (call.window or 0):
            raise NotImplementedError(f"a layer whose mask looks {int(call.mask)} tokens back, and says {call.window}")
        _, num_heads, _, key_dim = key.shape
        self.layout[layer] = LayerShape(num_heads, key_dim, value.shape[-1], key.dtype, key.device)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])


def probe(hooks: ModelHooks) -> Mapping[int, LayerShape]:
    """Return the shapes of the layers' keys and values after a trial. Raises Unsuited with the reason."""
    config = hooks.text_config
    unknown = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if unknown:
        raise Unsuited(f"layers of type {', '.join(sorted(unknown))}")
    try:
        layout = _layout(hooks)
    except torch.AcceleratorError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise Unsuited(f"{type(error).__name__} in the trial: {first_line(error)}") from error
    if len(layout) != config.num_hidden_layers:
        raise Unsuited(f"{len(layout)} of {config.num_hidden_layers} layers call the attention function")
    return layout


def _layout(hooks: ModelHooks) -> Mapping[int, LayerShape]:
    device, step = hooks.model.device, LayoutStep()
    positions = torch.arange(PROBE_TOKENS, device=device)
    embeds = hooks.embed((positions + 1) % hooks.text_config.vocab_size)
    with attending(hooks.text_config, LAYOUT):
        hooks.text_forward(inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False, kv_step=step)
    return step.layout


def count_blocks(
    config: PagedConfig,
    layout: Mapping[int, LayerShape],
    max_num_seqs: int,
    max_model_len: int,
    free_bytes: Mapping[torch.device, int],
) -> int:
    """Return how many blocks to take, the null block included.

    free_bytes: of each device whose memory bounds them; a block takes its layers' share on each. Raises CannotStart
    when one full request does not fit.
    """
    per_request = -(-max_model_len // config.block_size)
    num_blocks = config.num_blocks or max_num_seqs * per_request + 1
    if not config.num_blocks:
        for device, num_bytes in free_bytes.items():
            entry_bytes = sum(shape.num_bytes for shape in layout.values() if shape.device == device)
            num_blocks = min(num_blocks, int(num_bytes * config.memory_fraction // (config.block_size * entry_bytes)))
    if num_blocks <= per_request:
        raise CannotStart(
            f"VISIONQ_MAX_MODEL_LEN: a request of {max_model_len} tokens takes {per_request} blocks of keys and values "
            f"beside a spare one, memory has room for {num_blocks}"
        )
    return num_blocks


def _free_bytes(
    layout: Mapping[int, LayerShape], device: torch.device, set_aside_bytes: int
) -> Mapping[torch.device, int]:
    """Return what is free on the layers' GPUs; `set_aside_bytes` of the model's own are for something else."""
    devices = {shape.device for shape in layout.values() if shape.device.type == "cuda"}
    if devices:
        # What the trials took and gave back counts as free again.
        torch.cuda.empty_cache()
    return {each: torch.cuda.mem_get_info(each)[0] - (set_aside_bytes if each == device else 0) for each in devices}
