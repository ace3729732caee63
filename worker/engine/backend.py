"""Chooses and builds the KV back end of a model, by trying it at load time.

Paged blocks need a text model that calls the registered attention function in every layer and attends as it does;
whether that holds is found out by feeding a few tokens both ways. Rows serve every model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from worker.engine.attention import FLAT, LayoutStep
from worker.engine.cuda_graphs import CudaGraphRecorder, DecodeGraphs, graph_sizes
from worker.engine.entrances import Entrances
from worker.engine.flat import DecodeInputs, FlatForward, PromptPiece
from worker.engine.kernel_choice import choose_kernels
from worker.engine.kernels import SDPA
from worker.engine.kv_paged import LayerShape, PagedKV
from worker.engine.kv_slots import FULL, SLIDING
from worker.engine.runner_paged import PagedRunner
from worker.engine.runner_slots import SlotRunner
from worker.engine.tolerance import TOLERANCE
from worker.engine.vision import VisionConfig, VisionStage
from worker.errors import CannotStart

logger = logging.getLogger(__name__)

#: Tokens of the load-time probe and where it cuts them: a piece, a piece that continues it, one decode step.
PROBE_TOKENS: Final = 12
PROBE_CUT: Final = 5
PROBE_BLOCK_SIZE: Final = 4


@dataclass(frozen=True, slots=True)
class PagedConfig:
    """Sizes of a paged back end.

    block_size: tokens of a block. num_blocks: 0 takes what `max_num_seqs` full requests need, on a GPU at most
    `memory_fraction` of the memory that is free. reads_whole, reuses_prefixes: see `PagedRunner`.
    tries_kernels: look for better attention code than SDPA, see `choose_kernels`.
    records: replay recorded decode steps on a GPU; None does where attention has a kernel, which reads no more than it
        must. compiles: see `FlatForward`.
    """

    block_size: int = 16
    num_blocks: int = 0
    memory_fraction: float = 0.9
    reads_whole: bool = False
    reuses_prefixes: bool = True
    tries_kernels: bool = True
    records: bool | None = None
    compiles: bool = False


class Unsuited(Exception):
    """Raised when a model cannot be served from paged blocks."""


@torch.inference_mode()
def build_runner(
    model: PreTrainedModel,
    max_num_seqs: int,
    max_model_len: int,
    paged: PagedConfig | None,
    vision: VisionConfig | None = None,
) -> PagedRunner | SlotRunner:
    """Return a paged runner if it is asked for and the model is suited, else rows.

    Raises CannotStart when memory does not hold one full request, or when neither back end can serve the model.
    """
    why_not_paged: str | None = None
    entrances = Entrances(model)
    stage = VisionStage(entrances, vision or VisionConfig())
    if paged is not None:
        try:
            layout = probe(entrances)
        except Unsuited as reason:
            why_not_paged = str(reason)
            facts = {"action": "engine.probe", "kv_backend": "slots", "reason": why_not_paged}
            logger.warning("model cannot be served from paged blocks", extra=facts)
        else:
            return _paged_runner(entrances, stage, layout, paged, max_num_seqs, max_model_len)
    return SlotRunner(entrances, stage, max_num_seqs, max_model_len, why_not_paged)


def _paged_runner(
    entrances: Entrances,
    stage: VisionStage,
    layout: Mapping[int, LayerShape],
    config: PagedConfig,
    max_num_seqs: int,
    max_model_len: int,
) -> PagedRunner:
    """Choose the attention code, take the memory, record decode steps: in this order."""
    num_heads = entrances.text_config.num_attention_heads
    kernels = choose_kernels(layout, num_heads, config.block_size) if config.tries_kernels else SDPA
    free_bytes = _free_bytes(layout, entrances.model.device, stage.cache_bytes)
    num_blocks = count_blocks(config, layout, max_num_seqs, max_model_len, free_bytes)
    kv = PagedKV(layout, num_blocks, config.block_size)
    forward = FlatForward(entrances, kv, kernels, compiles=config.compiles)
    facts = {"action": "engine.probe", "kv_backend": "paged", "num_blocks": str(num_blocks)}
    logger.info("serving from paged blocks", extra=facts)
    return PagedRunner(
        entrances,
        kv,
        stage,
        max_num_seqs,
        max_model_len,
        reads_whole=config.reads_whole,
        reuses_prefixes=config.reuses_prefixes,
        forward=forward,
        graphs=_graphs(config, forward, layout, max_num_seqs, max_model_len),
    )


def _graphs(
    config: PagedConfig,
    forward: FlatForward,
    layout: Mapping[int, LayerShape],
    max_num_seqs: int,
    max_model_len: int,
) -> DecodeGraphs | None:
    """Record decode steps where that can be done: on one GPU."""
    devices = {shape.device for shape in layout.values()}
    device = next(iter(devices))
    wanted = forward.has_kernel if config.records is None else config.records
    if not wanted or len(devices) > 1 or device.type != "cuda":
        return None
    width = -(-max_model_len // config.block_size)
    graphs = DecodeGraphs(forward, graph_sizes(max_num_seqs), width, device, CudaGraphRecorder())
    try:
        graphs.record()
    except RuntimeError:
        # Raises if the device is lost; otherwise some operator of this model cannot be recorded.
        torch.cuda.synchronize(device)
        logger.warning("decode steps cannot be recorded", extra={"action": "engine.record"}, exc_info=True)
        return None
    return graphs


def probe(entrances: Entrances) -> Mapping[int, LayerShape]:
    """Return the shapes of the layers' keys and values after a trial. Raises Unsuited with the reason."""
    config = entrances.text_config
    unknown = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if unknown:
        raise Unsuited(f"layers of type {', '.join(sorted(unknown))}")
    try:
        layout = _layout(entrances)
        if len(layout) != config.num_hidden_layers:
            raise Unsuited(f"{len(layout)} of {config.num_hidden_layers} layers call the attention function")
        _compare(entrances, layout)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, KeyError, IndexError) as error:
        raise Unsuited(f"{type(error).__name__} in the trial") from error
    return layout


def _probe_embeds(entrances: Entrances) -> Tensor:
    device = entrances.model.device
    return entrances.embed(torch.arange(1, PROBE_TOKENS + 1, device=device) % entrances.text_config.vocab_size)


def _layout(entrances: Entrances) -> Mapping[int, LayerShape]:
    embeds, step = _probe_embeds(entrances), LayoutStep()
    positions = torch.arange(PROBE_TOKENS, device=embeds.device)[None]
    with entrances.attending(FLAT):
        entrances.text_forward(inputs_embeds=embeds[None], position_ids=positions, use_cache=False, kv_step=step)
    return step.layout


def _compare(entrances: Entrances, layout: Mapping[int, LayerShape]) -> None:
    """Feed tokens in two pieces and a decode step; the decoder must end each as when it gets them one by one."""
    embeds = _probe_embeds(entrances)
    positions = torch.arange(PROBE_TOKENS, device=embeds.device)
    expected = _one_by_one(entrances, embeds)
    num_blocks = PROBE_TOKENS // PROBE_BLOCK_SIZE
    # Backwards, so that a back end which ignored the table would be found out.
    blocks = torch.arange(num_blocks, 0, -1, device=embeds.device)
    forward = FlatForward(entrances, PagedKV(layout, num_blocks + 1, PROBE_BLOCK_SIZE))
    last = PROBE_TOKENS - 1
    with entrances.listening() as said:
        for start, end in ((0, PROBE_CUT), (PROBE_CUT, last)):
            entries = positions[start:end]
            slots = blocks[entries // PROBE_BLOCK_SIZE] * PROBE_BLOCK_SIZE + entries % PROBE_BLOCK_SIZE
            used = blocks[: -(-end // PROBE_BLOCK_SIZE)]
            forward.mixed(None, [PromptPiece(embeds[start:end], entries, slots, used, end, is_last=True)])
        newest = positions[last:]
        ids = (newest + 1) % entrances.text_config.vocab_size
        forward.decode(DecodeInputs(ids, newest, newest, blocks[None]))
    expected = expected[[PROBE_CUT - 1, last - 1, last]]
    got = torch.cat([each[0, -1:].to(expected.device) for each in said]).float()
    error = (got - expected).abs().max() / expected.abs().max()
    if not error <= TOLERANCE.get(entrances.model.dtype, 0.0):
        raise Unsuited(f"the decoder's output differs by {float(error):.1e} of its largest value")


def _one_by_one(entrances: Entrances, embeds: Tensor) -> Tensor:
    """Return what the decoder itself says of each token, [n, dim]. More at a time might see what comes after them."""
    cache = DynamicCache()
    said = []
    for place in range(embeds.shape[0]):
        positions = torch.tensor([[place]], device=embeds.device)
        newest = embeds[None, place : place + 1]
        output = entrances.decoder(inputs_embeds=newest, position_ids=positions, past_key_values=cache, use_cache=True)
        said.append(output[0][0, -1])
    return torch.stack(said).float()


def count_blocks(
    config: PagedConfig,
    layout: Mapping[int, LayerShape],
    max_num_seqs: int,
    max_model_len: int,
    free_bytes: Mapping[torch.device, int],
) -> int:
    """Return how many blocks to take, the trash block included.

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
