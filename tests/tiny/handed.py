"""Records what a model's text decoder is handed: by its own `generate`, and by the engine in company of other rows.

Positions, entries that a token may see, and whatever else arrives are facts that the engine derives on its own; they
are compared as numbers, since a wrong one need not change a tiny model's text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.unit.worker.engine.harness import request
from worker.engine.batch import NoRoom
from worker.engine.config import SchedulerLimits
from worker.engine.model_hooks import ModelHooks
from worker.engine.request import Request
from worker.engine.runner.dense import DenseRunner
from worker.engine.runner.paged import PagedRunner
from worker.engine.runner.proof import reference
from worker.engine.scheduler import Scheduler
from worker.models.inputs import ModelInputs

#: What reaches a decoder at every step and is compared by its effect, or says nothing about a prompt.
ORDINARY = frozenset({
    "inputs_embeds", "input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache", "kv_step",
    "logits_to_keep", "return_dict", "output_attentions", "output_hidden_states", "cache_position",
})  # fmt: skip


@dataclass
class Handed:
    """What one prompt's decoder calls got.

    prompt: position ids of the prompt, [T] or [axes, T]; None: none were handed.
    positions: of each generated token that was fed, one per axis. visible: entries that it could see, its own too.
    others: names of further tensors that came with generated tokens.
    """

    prompt: Tensor | None = None
    positions: list[tuple[int, ...]] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)
    others: set[str] = field(default_factory=set)


@torch.inference_mode()
def handed_by_generate(model: PreTrainedModel, inputs: ModelInputs) -> tuple[Handed, Sequence[int]]:
    """Return what `generate` hands its decoder, and the tokens it chooses."""
    hooks, handed, window = ModelHooks(model), Handed(), _window(model)

    def note(_module: object, _args: object, kwargs: Mapping[str, Any]) -> None:
        cached = kwargs["past_key_values"].get_seq_length()
        positions = kwargs.get("position_ids")
        if not handed.visible and cached == 0:
            handed.prompt = None if positions is None else _one(positions)
            return
        handed.visible.append(min(cached + 1, window))
        handed.positions += [] if positions is None else [tuple(_one(positions).flatten().tolist())]
        handed.others |= {name for name, value in kwargs.items() if isinstance(value, Tensor)} - ORDINARY

    hook = hooks.decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        tokens = reference(hooks, inputs).tokens
    finally:
        hook.remove()
    return handed, tokens


@torch.inference_mode()
def handed_by_engine(
    runner: PagedRunner | DenseRunner, model: PreTrainedModel, prompts: Sequence[tuple[ModelInputs, Sequence[int]]]
) -> list[Handed]:
    """Return what the engine hands the decoder for prompts that run together and are fed these tokens."""
    hooks, calls = ModelHooks(model), []
    handed: dict[Request, Handed] = defaultdict(Handed)
    hook = hooks.decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    scheduler = Scheduler(SchedulerLimits(len(prompts), 48), runner)
    generations = [request(inputs, max_new_tokens=len(tokens)) for inputs, tokens in prompts]
    requests = [Request(generation, 0.0, pictures=runner.cut(generation)) for generation in generations]
    tokens_of = dict(zip(requests, (tokens for _, tokens in prompts), strict=True))
    coming = list(requests)
    try:
        for step in range(10_000):
            if coming and step % 2 == 0:
                scheduler.add(coming.pop(0))
            if scheduler.is_idle and not coming:
                break
            runner.look_ahead(scheduler.next_in_line())
            while (waiting := scheduler.next_to_start()) is not None:
                try:
                    runner.allocate(waiting)
                except NoRoom:
                    break
                handed[waiting].prompt = runner._prompts[waiting].positions if isinstance(runner, PagedRunner) else None
                scheduler.start(waiting)
            calls.clear()
            chunks = scheduler.schedule()
            streams = [chunk.request for chunk in chunks if chunk.request.is_decoding]
            if isinstance(runner, DenseRunner):
                streams = list(runner._rows)
            made = runner.run(chunks)
            assert not made.failed
            if streams:
                _note_step(calls[0], streams, handed)
            for each in made.requests:
                each.output_ids.append(tokens_of[each][len(each.output_ids)])
                if each.is_full:
                    scheduler.end(each)
    finally:
        hook.remove()
    return [handed[each] for each in requests]


def _note_step(call: Mapping[str, Any], streams: Sequence[Request], handed: Mapping[Request, Handed]) -> None:
    positions, step = call["position_ids"], call.get("kv_step")
    for row, each in enumerate(streams):
        if step is not None:
            axes = positions[..., row].flatten()
            handed[each].visible.append(int(step.decode.context_lens[row]))
        else:
            axes = positions[row] if positions.ndim == 2 else positions[:, row].flatten()
            mask = call["attention_mask"]
            mask = mask["full_attention"] if isinstance(mask, Mapping) else mask
            handed[each].visible.append(int((mask[row] if mask.dtype == torch.bool else mask[row] == 0).sum()))
        handed[each].positions.append(tuple(axes.tolist()))
        handed[each].others |= {name for name, value in call.items() if isinstance(value, Tensor)} - ORDINARY


def _one(positions: Tensor) -> Tensor:
    """Return one prompt's positions; the first of four axes is the plain count that masks are made of."""
    return positions[0] if positions.ndim == 2 else positions[-3:, 0]


def _window(model: PreTrainedModel) -> int:
    """Return the entries that a token sees at most: of a window where every layer has one."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    return 2**31 if window is None or "full_attention" in kinds else int(window)
