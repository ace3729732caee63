"""Proves a KV back end at boot: it must answer trial prompts as the model's own `generate` does.

In: a model, trial prompts and a runner. Out: nothing, or Unsuited with what differs. The prompts run together, joining
one after the other, are read in chunks where the runner reads in chunks, and are fed the tokens that `generate` chose,
so that every step is compared: positions exactly, logits within the tolerance of the model's type.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from api_stub.contract.sampling import SamplingParams
from worker.engine.adapters import Adapters
from worker.engine.batch import NoRoom, Runner, StepLogits
from worker.engine.config import SchedulerLimits
from worker.engine.model_hooks import ModelHooks
from worker.engine.request import GenerationRequest, Request, Unsuited
from worker.engine.scheduler import Scheduler
from worker.engine.tensors import TOLERANCE
from worker.errors import CannotStart
from worker.models.context import max_context
from worker.models.inputs import ModelInputs

logger = logging.getLogger(__name__)

#: Tokens generated per trial prompt: the first comes from prefill, the others from decode steps.
NUM_TOKENS: Final = 6
#: Chunks that the longest prompt is read in, where prompts can be read in chunks.
NUM_CHUNKS: Final = 3
#: Lengths of the prompts of plain token ids that stand in where no trial prompts are given.
PLAIN_LENGTHS: Final = (12, 7)
#: More steps than any proof takes; ends a runner that makes no progress.
MAX_STEPS: Final = 20_000


@dataclass(frozen=True, slots=True)
class Reference:
    """What `generate` does with one prompt, with an adapter or (empty) without.

    num_cached: KV entries that the prompt takes.
    tokens: those it chose, [N]. logits: those they were chosen by, [N, V], float32 on the CPU.
    positions: the position id at which each token but the last was fed, [N − 1]; None: the text decoder is handed none.
    """

    inputs: ModelInputs
    adapter: str
    num_cached: int
    tokens: Sequence[int]
    logits: Tensor
    positions: Sequence[int] | None


def references(
    hooks: ModelHooks, trials: Sequence[ModelInputs], max_model_len: int, adapters: Adapters | None
) -> list[Reference]:
    """Ask the model's own `generate` about the trial prompts that `_chosen` takes, in their order, and then, with each
    adapter, about the first of them.

    Without any trials, prompts of plain token ids are taken, for models whose forward takes text alone. Raises
    CannotStart when `generate` itself fails on the first prompt, or when no trial fits the model's context; of the
    others, those on which it fails are left out. Raises Unsuited for a model that keeps another state than keys and
    values between tokens.
    """
    prompts = _chosen(trials or _plain(hooks), max_model_len, max_context(hooks.model.config))
    if trials and not prompts:
        shortest = min(each.num_prompt_tokens for each in trials)
        raise CannotStart(
            f"VISIONQ_MODEL: the shortest trial prompt takes {shortest} tokens and {NUM_TOKENS} for its answer, more "
            f"than the model's context of {max_context(hooks.model.config)}; nothing can be proven"
        )
    found: list[Reference] = []
    for prompt in prompts:
        try:
            found.append(reference(hooks, prompt))
        except (Unsuited, torch.AcceleratorError):
            raise
        except Exception as error:
            if not found:
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise CannotStart(
                    f"VISIONQ_MODEL: the model's own generate fails on a trial prompt: {reason}"
                ) from error
            facts = {"action": "engine.prove", "reason": type(error).__name__}
            logger.warning("generate fails on a trial prompt, which is left out", extra=facts, exc_info=True)
    if adapters is not None and found:
        for name in adapters.names:
            with adapters.choosing(adapters.slot(name)):
                found.append(reference(hooks, found[0].inputs, name))
    return found


def reference(hooks: ModelHooks, inputs: ModelInputs, adapter: str = "") -> Reference:
    """Return what the model's own greedy `generate` does with a prompt, as it is now.

    adapter: the one that its layers add. Raises whatever the model raises.
    """
    with _neutral_generation(hooks.model) as config, hooks.recording() as calls:
        output: Any = hooks.model.generate(**hooks.on_device(inputs), generation_config=config)
    logits = torch.cat(output.logits).float().cpu()
    tokens: list[int] = output.sequences[0, -len(logits) :].tolist()
    # The newest token's keys and values are not written yet.
    num_cached = _num_entries(output.past_key_values) - (len(tokens) - 1)
    return Reference(inputs, adapter, num_cached, tokens, logits, _positions(calls[1:]))


def trial_length(expected: Sequence[Reference]) -> int:
    """Return the KV entries that the longest trial prompt and its answer take."""
    return max((each.num_cached + len(each.tokens) for each in expected), default=1)


def prove(runner: Runner, expected: Sequence[Reference], max_num_seqs: int, dtype: torch.dtype) -> None:
    """Let the runner answer the prompts together; raise Unsuited when it does not answer as `expected`.

    dtype: what the model computes in; its tolerance holds. The runner must be idle, and is idle afterwards. Raises
    torch.AcceleratorError when the device is lost.
    """
    longest = max((each.inputs.num_prompt_tokens for each in expected), default=0)
    scheduler = Scheduler(SchedulerLimits(max_num_seqs, max_num_seqs + 1 + longest // NUM_CHUNKS), runner)
    proof = _Proof(runner, scheduler, TOLERANCE.get(dtype, 0.0))
    try:
        # The first once more at the end, when its blocks may be found again.
        for each in [*expected, *expected[:1]]:
            proof.add(each)
            # The next prompt joins while this one is being read or answered.
            proof.step()
            proof.step()
        proof.finish()
    except (Unsuited, torch.AcceleratorError):
        raise
    except Exception as error:
        raise Unsuited(f"{type(error).__name__} in the trial: {first_line(error)}") from error
    finally:
        for request in scheduler.everything():
            scheduler.end(request)
    facts = {"action": "engine.prove", "kv_backend": runner.kv_backend, "error": f"{proof.largest_error:.1e}"}
    logger.info("back end answers as generate does", extra=facts)


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return (str(error).strip().splitlines() or [""])[0]


class _Proof:
    """Requests of one proof, driven step by step. largest_error: so far, as a share of the largest logit."""

    def __init__(self, runner: Runner, scheduler: Scheduler, tolerance: float) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._tolerance = tolerance
        self._expected: dict[Request, Reference] = {}
        self.largest_error = 0.0

    def add(self, expected: Reference) -> None:
        """Queue one prompt."""
        sampling = SamplingParams(max_new_tokens=len(expected.tokens), seed=0)
        generation = GenerationRequest(f"trial-{len(self._expected)}", expected.inputs, sampling, expected.adapter)
        request = Request(generation, submitted_at=0.0, pictures=self._runner.cut(generation))
        self._expected[request] = expected
        self._scheduler.add(request)

    def finish(self) -> None:
        """Step until every prompt has its tokens."""
        for _ in range(MAX_STEPS):
            if self._scheduler.is_idle:
                return
            self.step()
        raise Unsuited("the trial prompts came to no end")

    def step(self) -> None:
        """Start what fits, feed one batch, compare what it makes, hand out the tokens that `generate` chose."""
        self._runner.look_ahead(self._scheduler.next_in_line())
        while (waiting := self._scheduler.next_to_start()) is not None:
            try:
                self._runner.allocate(waiting)
            except NoRoom:
                break
            self._scheduler.start(waiting)
        chunks = self._scheduler.schedule()
        made = self._runner.run(chunks) if chunks else StepLogits()
        for _, failure in made.failed:
            raise failure
        if made.logits is None:
            return
        for request, logits in zip(made.requests, made.logits.float().cpu(), strict=True):
            expected = self._expected[request]
            self._compare(request, expected, logits)
            request.output_ids.append(expected.tokens[len(request.output_ids)])
            if request.is_full:
                self._scheduler.end(request)

    def _compare(self, request: Request, expected: Reference, logits: Tensor) -> None:
        """Compare a request's new logits [V] and, with its first ones, its length and the positions of its tokens."""
        number = len(request.output_ids)
        if number == 0 and request.num_prompt_cached != expected.num_cached:
            raise Unsuited(f"a prompt takes {request.num_prompt_cached} entries, {expected.num_cached} in generate")
        if number == 0 and expected.positions is not None:
            positions = [request.first_position + step for step in range(len(expected.positions))]
            if positions != list(expected.positions):
                raise Unsuited(f"its tokens would stand at {positions}, generate puts them at {expected.positions}")
        error = _difference(logits, expected.logits[number])
        # Not a number is no agreement.
        if not error <= self._tolerance:
            raise Unsuited(f"logits of token {number + 1} differ from generate's by {error:.1e} of the largest")
        self.largest_error = max(self.largest_error, error)


def _difference(logits: Tensor, wanted: Tensor) -> float:
    """Return how far logits [V] lie apart, as a share of the largest that may be chosen; NaN when that is no number.

    Models put those of tokens that must not be chosen at the lowest number, or far below the others: such a one is
    measured by itself and is no measure for the others.
    """
    ordinary = wanted[wanted > torch.finfo(wanted.dtype).min / 2]
    likely = ordinary.topk(-(-len(ordinary) // 8)).values.abs()
    if not (len(likely) and bool(likely.isfinite().all())):
        return float("nan")
    apart = (logits - wanted).abs() / wanted.abs().clamp(min=likely.max())
    return float(torch.where(logits == wanted, 0.0, apart).max())


def _chosen(trials: Sequence[ModelInputs], max_model_len: int, context: int | None) -> list[ModelInputs]:
    """Return the prompts that fit `max_model_len`, and of each kind that has none the shortest that fits the model.

    A limit below the trials' lengths still lets other prompts of their kind in, about smaller pictures or with less
    text. Prompts are of one kind when the model is handed the same arguments for them.
    """
    fitting = {number for number, each in enumerate(trials) if _length(each) <= max_model_len}
    shortest: dict[frozenset[str], int] = {}
    for number, each in enumerate(trials):
        kind = frozenset(each.tensors)
        if kind not in shortest or _length(each) < _length(trials[shortest[kind]]):
            shortest[kind] = number
    fitting |= {number for number in shortest.values() if context is None or _length(trials[number]) <= context}
    return [trials[number] for number in sorted(fitting)]


def _length(inputs: ModelInputs) -> int:
    return inputs.num_prompt_tokens + NUM_TOKENS


def _num_entries(cache: Cache | None) -> int:
    """Return the KV entries of a cache. Raises Unsuited for one that holds another state than keys and values."""
    layers = getattr(cache, "layers", ())
    lengths = {int(layer.keys.shape[-2]) if isinstance(getattr(layer, "keys", None), Tensor) else 0 for layer in layers}
    if not lengths or 0 in lengths:
        raise Unsuited("its state between tokens is not keys and values alone")
    return int(cache.get_seq_length()) if cache is not None else 0


def _plain(hooks: ModelHooks) -> list[ModelInputs]:
    """Return prompts of plain token ids; none for a model whose forward insists on an image."""
    if hooks.text_forward is not hooks.model:
        return []
    vocab_size = hooks.text_config.vocab_size
    prompts = [torch.arange(1, length + 1)[None] * length % vocab_size for length in PLAIN_LENGTHS]
    return [ModelInputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}) for ids in prompts]


def _positions(calls: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """Return the positions of the tokens that the decoder was called with, one each; None where it was handed none."""
    given = [call.get("position_ids") for call in calls]
    if any(each is None or each.shape[-1] != 1 for each in given):
        return None
    # The first of four axes is the plain count that masks are made of.
    return [int(each[-1:].flatten()[0]) for each in given if each is not None]


@contextmanager
def _neutral_generation(model: PreTrainedModel) -> Iterator[GenerationConfig]:
    """Yield settings for a plain greedy `generate` and hide the checkpoint's own, which it would fill gaps from."""
    before = model.generation_config
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        bos_token_id=before.bos_token_id,
        pad_token_id=before.pad_token_id,
    )
    model.generation_config = GenerationConfig()
    try:
        yield config
    finally:
        model.generation_config = before
