"""Loading what needs torchvision: image splitting of the SmolVLM family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny.families import picture
from worker.models.loader import load
from worker.settings import Switch, WorkerSettings


@pytest.mark.parametrize(("switch", "is_split"), [(Switch.AUTO, True), (Switch.ON, True), (Switch.OFF, False)])
def test_image_splitting_of_smolvlm_is_switched(
    switch: Switch, is_split: bool, tiny_checkpoint: Callable[[str], Path]
) -> None:
    processor = load(WorkerSettings(model=str(tiny_checkpoint("smolvlm")), image_splitting=switch)).processor
    encoded = processor(text="<image>What?", images=[[picture(1)]], return_tensors="pt")
    num_crops = encoded["pixel_values"].shape[1]
    assert (num_crops > 1) == is_split
    num_image_tokens = int((encoded["input_ids"] == processor.image_token_id).sum())
    assert num_image_tokens == num_crops * processor.image_seq_len
