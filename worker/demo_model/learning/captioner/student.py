"""What is being trained: the captioner, its processor, and the heads that exist only during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.demo_model import CHECKPOINT
from worker.demo_model.learning import architecture as chat
from worker.demo_model.learning.captioner import architecture
from worker.demo_model.learning.captioner.caption_loss import Said
from worker.demo_model.learning.captioner.captions import PLACES_BEGINNING, places
from worker.demo_model.learning.captioner.supervision import PatchHeads, seeing_loss
from worker.demo_model.learning.captioner.tokenizer import train_tokenizer
from worker.demo_model.learning.initialisation import to_tensor
from worker.demo_model.learning.supervision import targets
from worker.demo_model.questions import caption
from worker.demo_model.scenes import Scene, draw_varied, make_dense_scene

HEADS_FILE = "heads.safetensors"
TYPICAL_SCENES, HEAD_FIT_SCENES, HEAD_FIT_STEPS, HEAD_FIT_LR = 64, 256, 150, 2e-2
PLACES_WEIGHT = 0.7


@dataclass(frozen=True, slots=True)
class Student:
    """A captioner in training, in float32."""

    model: Any
    processor: Any
    heads: PatchHeads

    @classmethod
    def new(cls, rng: Random) -> Student:
        """A fresh tokenizer, the shipped chat model's tower, new text layers (from torch's global generator)."""
        tokenizer = train_tokenizer()
        model, processor = architecture.build_model(tokenizer), architecture.build_processor(tokenizer)
        chat_model, _ = chat.load(CHECKPOINT)
        architecture.take_over_tower(
            model, chat_model, _pixels([make_dense_scene(rng) for _ in range(TYPICAL_SCENES)], rng)
        )
        student = cls(model.train(), processor, PatchHeads())
        student.fit_heads(rng)
        return student

    @classmethod
    def resume(cls, directory: Path, rng: Random) -> Student:
        """Continue from a checkpoint. Heads are read when they were saved, else fitted."""
        model, processor = architecture.load(directory)
        student = cls(model, processor, PatchHeads())
        if (directory / HEADS_FILE).exists():
            student.heads.load_state_dict(load_file(directory / HEADS_FILE))
        else:
            student.fit_heads(rng)
        return student

    def see(self, scenes: Sequence[Scene], rng: Random) -> Tensor:
        """Draw the scenes with training's variations and run the tower: `[n, 17, 192]`."""
        return architecture.see(self.model, _pixels(scenes, rng))

    def fit_heads(self, rng: Random) -> float:
        """Fit the heads alone to the tower as it is: the gradient of random heads would undo what it knows.
        Returns the object accuracy they reach."""
        scenes = [make_dense_scene(rng) for _ in range(HEAD_FIT_SCENES)]
        with torch.no_grad():
            seen = self.see(scenes, rng)
        truth = targets(scenes)
        optimizer = torch.optim.AdamW(self.heads.parameters(), lr=HEAD_FIT_LR)
        accuracy = 0.0
        for _ in range(HEAD_FIT_STEPS):
            result = seeing_loss(self.heads, seen, truth)
            optimizer.zero_grad()
            torch.autograd.backward(result.loss)
            optimizer.step()
            accuracy = result.object_accuracy
        return accuracy

    def aim_projection(self, rng: Random) -> None:
        """Show the text layers first what the heads read. After the seeing phase, before the first caption."""
        scenes = [make_dense_scene(rng) for _ in range(HEAD_FIT_SCENES)]
        with torch.no_grad():
            architecture.aim_projection(self.model, self.see(scenes, rng), self.heads.patch.weight)

    def captions(self, scene: Scene) -> list[Said]:
        """The plain caption and the one with places."""
        return [self.encode(caption(scene)), self.encode(f" {places(scene)}", PLACES_BEGINNING, PLACES_WEIGHT)]

    def spelt(self, scene: Scene) -> list[Said]:
        """The plain caption and the one with places as one text, letter by letter.

        This teaches the letters' tokens and late positions, which no English caption reaches; a caption in another
        language needs both. It is not what is said of a picture without a beginning: too few are learnt for that.
        """
        tokenizer = self.processor.tokenizer
        text = f"{caption(scene)}, {places(scene)}"
        letters = tokenizer.convert_tokens_to_ids(["Ġ" if letter == " " else letter for letter in text])
        return [Said((tokenizer.bos_token_id, *letters, tokenizer.eos_token_id))]

    def encode(self, text: str, beginning: str = "", weight: float = 1.0) -> Said:
        """One caption after its beginning."""
        tokenizer = self.processor.tokenizer
        given = tokenizer(beginning, add_special_tokens=False).input_ids if beginning else []
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return Said((tokenizer.bos_token_id, *given, *ids, tokenizer.eos_token_id), 1 + len(given), weight)

    def save(self, directory: Path) -> None:
        """Write a checkpoint for the Auto classes, in half precision, and the heads beside it."""
        architecture.save(self.model, self.processor, directory)
        save_file(self.heads.state_dict(), directory / HEADS_FILE)


def _pixels(scenes: Sequence[Scene], rng: Random) -> Tensor:
    return to_tensor([draw_varied(scene, rng) for scene in scenes])
