"""The language loss: cross entropy of the answers' tokens, given the images of their conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from worker.demo_model.learning.architecture import ImageFeatures, image_features
from worker.demo_model.learning.encoding import IGNORED, Batch
from worker.demo_model.learning.initialisation import to_tensor
from worker.demo_model.scenes import Scene, draw_varied


@dataclass(frozen=True, slots=True)
class AnswerLoss:
    """Mean loss per answer token, and per row, per answer: was every token the most likely one?"""

    loss: Tensor
    is_right: Tensor

    def matches(self, batch: Batch) -> list[tuple[str, bool]]:
        """Kind and teacher-forced exact match of every answer."""
        return [
            (answer.kind, bool(self.is_right[row, answer.start - 1 : answer.stop - 1].all()))
            for row, answers in enumerate(batch.answers)
            for answer in answers
        ]


def see(model: Any, scenes: Sequence[Scene], rng: Random) -> ImageFeatures:
    """Draw the scenes with training's variations and run the vision side once over all of them."""
    return image_features(model, to_tensor([draw_varied(scene, rng) for scene in scenes]))


def answer_loss(model: Any, image_id: int, batch: Batch, latents: Tensor) -> AnswerLoss:
    """Loss of one batch whose images have these latents `[n, 16, 128]`, in the order of `batch.scenes`.

    Rows are padded on the right and attention is causal, so no mask is needed.
    """
    embeddings = model.get_input_embeddings()(batch.ids)
    if len(latents):
        where = (batch.ids == image_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(where, latents.reshape(-1, latents.shape[-1]))
    hidden = model.model.text_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    labels = batch.labels[:, 1:]
    is_answer = labels != IGNORED
    logits = model.lm_head(hidden[:, :-1][is_answer])
    wanted = labels[is_answer]
    is_right = is_answer.clone()
    is_right[is_answer] = logits.argmax(-1) == wanted
    return AnswerLoss(F.cross_entropy(logits, wanted), is_right)
