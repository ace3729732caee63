"""Chat models (Idefics2, LLaVA and the like): what the assistant says is learnt, everything else is read only.

Checkpoints are compared by the loss on the validation split: answers of few words change from all wrong to all right
within some steps, while the loss falls all along.
"""

from __future__ import annotations

from typing import Final

from api_stub.contract.finetune import FinetuneMethod, FinetuneRecipe
from worker.training.recipe import Recipe

CHAT: Final = Recipe(
    name=FinetuneRecipe.CHAT,
    learning_rate={FinetuneMethod.FULL: 1e-5, FinetuneMethod.LORA: 2e-4, FinetuneMethod.QLORA: 2e-4},
    batch_size=8,
    gradient_accumulation=2,
    epochs=3,
    eval_every=50,
    eval_examples=100,
    best_metric="loss",
    max_new_tokens=128,
)
