"""One engine at a time per model: hooks and the attention's name are the model's, so two would disturb each other."""

from __future__ import annotations

from typing import Final

from transformers import PreTrainedModel

_MARK: Final = "_visionq_claim"


class ModelClaim:
    """Held by the engine that serves a model, from its making to its end. Any thread.

    Raises ValueError when another engine holds the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # One operation of a dict, so of two threads one wins.
        if vars(model).setdefault(_MARK, self) is not self:
            raise ValueError("another engine serves this model: stop that one first, or load the model twice")
        self._model = model

    def give_up(self) -> None:
        """Leave the model to others."""
        if vars(self._model).get(_MARK) is self:
            del vars(self._model)[_MARK]
