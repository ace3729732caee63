"""Captioners (GIT and the like): a picture in, a caption out, no turns.

The numbers are those of Hugging Face's guide on image captioning: learning rate 5e-5, batches of 32, accumulation over
2, an evaluation every 50 steps, 3 checkpoints. Checkpoints are compared by the word error rate of generated captions.
"""

from __future__ import annotations

from typing import Final

from api_stub.contract.finetune import FinetuneMethod, FinetuneRecipe
from worker.training.recipe import Recipe

CAPTIONER: Final = Recipe(
    name=FinetuneRecipe.CAPTIONER,
    learning_rate={FinetuneMethod.FULL: 5e-5, FinetuneMethod.LORA: 1e-3, FinetuneMethod.QLORA: 1e-3},
    batch_size=32,
    gradient_accumulation=2,
    epochs=50,
    eval_every=50,
    eval_examples=200,
    best_metric="wer",
    max_new_tokens=128,
)
