"""What upstream transformers alone answers: processor, chat template and `generate`, one prompt at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

Messages = list[dict[str, Any]]


class Reference:
    """A checkpoint run the ordinary way, greedily, in fp32 on the CPU."""

    def __init__(self, checkpoint: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def single_turn(self, images: list[Image.Image], text: str) -> Messages:
        """Images first, then the text."""
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        return [{"role": "user", "content": content}]

    def answer(self, messages: Messages, max_new_tokens: int) -> str:
        """Return the decoded new text; leading white space goes unless an assistant's turn is continued."""
        is_continuation = messages[-1]["role"] == "assistant"
        images = [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]
        prompt = self.processor.apply_chat_template(
            messages, add_generation_prompt=not is_continuation, continue_final_message=is_continuation
        )
        inputs = self.processor(text=[prompt], images=[images] if images else None, return_tensors="pt")
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        text: str = self.processor.tokenizer.decode(new, skip_special_tokens=True)
        return text if is_continuation else text.lstrip()
