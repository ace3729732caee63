"""What a recipe says: the numbers of a run that a job leaves open, and by which figure checkpoints are compared."""

from __future__ import annotations

from dataclasses import dataclass

from api_stub.contract.finetune import FinetuneMethod, FinetuneRecipe


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one kind of model is trained. Counts are optimizer steps or examples.

    learning_rate: by method, because an adapter's few weights take larger steps than all of them.
    warmup_share: of all steps, at most `warmup_steps`; then the rate falls linearly to zero.
    best_metric: of the evaluation; the checkpoint with the lowest is the best one.
    max_new_tokens: most tokens that an evaluation generates for one example.
    """

    name: FinetuneRecipe
    learning_rate: dict[FinetuneMethod, float]
    batch_size: int
    gradient_accumulation: int
    epochs: float
    eval_every: int
    eval_examples: int
    best_metric: str
    max_new_tokens: int
    warmup_share: float = 0.1
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_rank: int = 16
    lora_dropout: float = 0.0
    save_total_limit: int = 3
    seed: int = 0
