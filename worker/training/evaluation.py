"""How good a model in training is: its loss, and the scores of what it writes, on examples that it does not learn.

Answers are generated greedily by the model's own `generate`, from the prompts that serving would build. Prompts of
equal shape are generated together, so that no padding can change an answer.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any, Final

import torch
from torch import Tensor

from api_stub.contract.conversation import Turn
from worker.media.types import DecodedImage, DecodedMedia
from worker.prompting.prepare import PromptBuilder
from worker.prompting.processors import cast
from worker.training.dataset import Dataset, Example
from worker.training.labels import Encoder, encode
from worker.training.manifest import Plan, SmokeQuestion
from worker.training.question import question_of
from worker.training.scores import Answered, normalise, score
from worker.training.trainer import num_learnt
from worker.training.tuning import TunedModel

logger = logging.getLogger(__name__)

#: Examples of one forward of an evaluation.
_BATCH_SIZE: Final = 16
#: Of a checkpoint's manifest, which is read as one file.
NUM_SMOKE_QUESTIONS: Final = 4
MAX_SMOKE_CHARS: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Question:
    """One example's prompt and what would be right."""

    turns: tuple[Turn, ...]
    media: tuple[DecodedMedia, ...]
    prompt: Mapping[str, Tensor]
    references: tuple[str, ...]
    kind: str | None

    @property
    def shape(self) -> object:
        """Equal for prompts that can be stacked."""
        return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(self.prompt.items()))


class Evaluation:
    """Measures a model on up to `plan.eval_examples` examples of the validation split, always the same ones."""

    def __init__(
        self, tuned: TunedModel, dataset: Dataset, encoder: Encoder, prompts: PromptBuilder, plan: Plan
    ) -> None:
        self._tuned = tuned
        self._dataset = dataset
        self._encoder = encoder
        self._prompts = prompts
        self._max_new_tokens = plan.max_new_tokens
        shuffled = list(dataset.validation)
        Random(f"{plan.seed} validation").shuffle(shuffled)
        self._examples = shuffled[: plan.eval_examples]
        #: Questions that were answered right in the last measurement, for the checkpoint's manifest.
        self.smoke: tuple[SmokeQuestion, ...] = ()
        self._warn_of_cut_answers()

    def _warn_of_cut_answers(self) -> None:
        """Log how many right answers are longer than what is generated: their scores are too bad."""
        tokenizer = self._tuned.loaded.tokenizer
        right = [question_of(self._prompts, example)[1] for example in self._examples]
        lengths = [min(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in each) for each in right]
        num_cut = sum(length >= self._max_new_tokens for length in lengths)
        if num_cut:
            facts = {"action": "train.evaluate", "count": num_cut, "longest": max(lengths)}
            facts |= {"max_new_tokens": self._max_new_tokens}
            logger.warning("right answers are longer than what an evaluation generates", extra=facts)

    def measure(self, should_stop: Callable[[], None]) -> dict[str, float]:
        """Return `loss` and the scores by name. `should_stop` is called between batches and raises to abort."""
        loss, num_tokens = 0.0, 0
        answers: list[Answered] = []
        smoke: list[SmokeQuestion] = []
        with self._tuned.evaluating():
            for examples in _chunks(self._examples, _BATCH_SIZE):
                should_stop()
                media = [self._dataset.media(example) for example in examples]
                batch_loss, learnt = self._loss(examples, media)
                loss, num_tokens = loss + batch_loss * learnt, num_tokens + learnt
                asked = self._answers([self._question(*pair) for pair in zip(examples, media, strict=True)])
                answers += [answer for _, answer in asked]
                smoke += islice(self._smoke_of(asked), NUM_SMOKE_QUESTIONS - len(smoke))
        self.smoke = tuple(smoke)
        report = score(answers)
        by_kind = {
            f"{kind}/{name}": value
            for kind, scores in report.by_kind.items()
            for name, value in scores.metrics().items()
            if name == "exact_match"
        }
        return {"loss": loss / num_tokens, **report.overall.metrics(), **by_kind}

    def _loss(self, examples: Sequence[Example], media: Sequence[tuple[DecodedMedia, ...]]) -> tuple[float, int]:
        """Return the mean loss per learnt token, and the number of these tokens."""
        texts = [example.texts[0] if example.texts else None for example in examples]
        inputs = cast(encode(self._encoder, examples, texts, media).arguments(), self._tuned.loaded.dtype)
        loss = self._tuned.model(**self._moved(inputs)).loss
        return float(loss), num_learnt(inputs)

    def _question(self, example: Example, media: tuple[DecodedMedia, ...]) -> _Question:
        turns, references = question_of(self._prompts, example)
        return _Question(tuple(turns), media, self._prompts.prepare(turns, media).tensors, references, example.kind)

    def _answers(self, questions: Sequence[_Question]) -> list[tuple[_Question, Answered]]:
        groups: dict[object, list[_Question]] = {}
        for question in questions:
            groups.setdefault(question.shape, []).append(question)
        return [answer for group in groups.values() for answer in self._generate(group)]

    def _smoke_of(self, asked: Sequence[tuple[_Question, Answered]]) -> Iterator[SmokeQuestion]:
        """Yield the questions about pictures alone that were answered right, unless the pictures are large."""
        for question, answer in asked:
            if normalise(answer.text) not in map(normalise, answer.references):
                continue
            stills = [medium for medium in question.media if isinstance(medium, DecodedImage)]
            pictures = [_png(still) for still in stills]
            if len(stills) == len(question.media) and sum(map(len, pictures)) <= MAX_SMOKE_CHARS:
                yield SmokeQuestion(
                    turns=question.turns,
                    pictures=tuple(pictures),
                    answers=question.references,
                    max_new_tokens=self._max_new_tokens,
                )

    def _generate(self, questions: Sequence[_Question]) -> list[tuple[_Question, Answered]]:
        """Generate the answers to prompts of one shape."""
        tokenizer = self._tuned.loaded.tokenizer
        prompts = [question.prompt for question in questions]
        stacked = {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}
        length = stacked["input_ids"].shape[1]
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        written = self._tuned.model.generate(
            **self._moved(stacked),
            max_new_tokens=max(1, min(self._max_new_tokens, self._tuned.loaded.max_context - length)),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad_id,
        )
        texts = tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
        return [
            (question, Answered(text.lstrip(), question.references, question.kind))
            for text, question in zip(texts, questions, strict=True)
        ]

    def _moved(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: tensor.to(self._tuned.loaded.device) for name, tensor in tensors.items()}


def _png(still: DecodedImage) -> str:
    """Return the pixels that the model was shown, as a PNG file in base64."""
    content = io.BytesIO()
    still.pixels.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def _chunks(examples: Sequence[Example], size: int) -> Sequence[Sequence[Example]]:
    rest = iter(examples)
    return list(iter(lambda: tuple(islice(rest, size)), ()))
