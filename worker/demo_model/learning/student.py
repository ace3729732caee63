"""What is being trained: model, processor, and the heads that exist only during training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from worker.demo_model.learning import architecture
from worker.demo_model.learning.answering_loss import see
from worker.demo_model.learning.encoding import ChatEncoder
from worker.demo_model.learning.supervision import Heads, targets, vision_loss
from worker.demo_model.learning.tokenizer import train_tokenizer
from worker.demo_model.scenes import make_dense_scene

HEADS_FILE = "heads.safetensors"
HEAD_FIT_SCENES, HEAD_FIT_STEPS, HEAD_FIT_LR = 256, 150, 2e-2


@dataclass(frozen=True, slots=True)
class Student:
    """A model in training, in float32."""

    model: Any
    processor: Any
    heads: Heads
    encoder: ChatEncoder

    @classmethod
    def new(cls) -> Student:
        """Initial weights and a freshly trained tokenizer; draws from torch's global generator."""
        tokenizer = train_tokenizer()
        model, processor = architecture.build_model(tokenizer), architecture.build_processor(tokenizer)
        return cls(model.train(), processor, Heads(), ChatEncoder(processor))

    @classmethod
    def resume(cls, directory: Path, rng: Random) -> Student:
        """Continue from a checkpoint. Heads are read when they were saved, else fitted to the frozen model first:
        the gradient of random heads would undo what the vision side knows."""
        model, processor = architecture.load(directory)
        student = cls(model, processor, Heads(), ChatEncoder(processor))
        if (directory / HEADS_FILE).exists():
            student.heads.load_state_dict(load_file(directory / HEADS_FILE))
        else:
            student.fit_heads(rng)
        return student

    def fit_heads(self, rng: Random) -> float:
        """Fit the heads alone to the model as it is. Returns the object accuracy they reach."""
        scenes = [make_dense_scene(rng) for _ in range(HEAD_FIT_SCENES)]
        with torch.no_grad():
            features = see(self.model, scenes, rng)
        truth = targets(scenes)
        optimizer = torch.optim.AdamW(self.heads.parameters(), lr=HEAD_FIT_LR)
        accuracy = 0.0
        for _ in range(HEAD_FIT_STEPS):
            result = vision_loss(self.heads, features, truth)
            optimizer.zero_grad()
            torch.autograd.backward(result.loss)
            optimizer.step()
            accuracy = result.object_accuracy
        return accuracy

    def save(self, directory: Path) -> None:
        """Write a checkpoint for the Auto classes, in half precision, and the heads beside it."""
        architecture.save(self.model, self.processor, directory)
        save_file(self.heads.state_dict(), directory / HEADS_FILE)
