"""flash-attn is used where it works; where it does not, `auto` goes on without it and a named wish is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GitForCausalLM, Idefics2ForConditionalGeneration

from worker.errors import CannotStart
from worker.models.placement import attention_name
from worker.settings import Attention

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
IDEFICS2, GIT = Idefics2ForConditionalGeneration, GitForCausalLM


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package named flash_attn; the test writes its code."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    module = tmp_path / "flash_attn.py"
    module.write_text("")
    yield module
    sys.modules.pop("flash_attn", None)


def refusal(device: torch.device, dtype: torch.dtype) -> str:
    with pytest.raises(CannotStart) as refused:
        attention_name(Attention.FLASH, IDEFICS2, device, dtype)
    return str(refused.value)


@pytest.mark.usefixtures("installed")
def test_flash_is_taken_on_a_gpu_in_half_precision_by_families_that_have_it() -> None:
    assert attention_name(Attention.AUTO, IDEFICS2, GPU, BF16) == "flash_attention_2"
    assert attention_name(Attention.FLASH, IDEFICS2, GPU, BF16) == "flash_attention_2"
    assert attention_name(Attention.AUTO, GIT, GPU, BF16) is None
    assert attention_name(Attention.AUTO, IDEFICS2, CPU, BF16) is None
    assert attention_name(Attention.AUTO, IDEFICS2, GPU, FP32) is None
    assert attention_name(Attention.SDPA, IDEFICS2, GPU, BF16) == "sdpa"


@pytest.mark.usefixtures("installed")
def test_a_wish_that_cannot_be_met_says_why() -> None:
    assert refusal(CPU, BF16).endswith("the device is cpu")
    assert refusal(GPU, FP32).endswith("the weights are float32")


def test_without_the_package_the_choice_is_left_to_transformers() -> None:
    assert attention_name(Attention.AUTO, IDEFICS2, GPU, BF16) is None
    assert refusal(GPU, BF16).endswith("flash-attn is not installed")


def test_a_package_built_for_another_torch_is_no_reason_not_to_start(installed: Path) -> None:
    installed.write_text("raise ImportError('undefined symbol: _ZN3c104cuda')")
    assert attention_name(Attention.AUTO, IDEFICS2, GPU, BF16) is None
    assert refusal(GPU, BF16).endswith("cannot be imported")


@pytest.mark.usefixtures("installed")
def test_an_old_gpu_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert attention_name(Attention.AUTO, IDEFICS2, GPU, BF16) is None
    assert refusal(GPU, BF16).endswith("Tesla T4 is too old for it")
