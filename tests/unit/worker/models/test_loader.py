"""The loader takes real checkpoints as they are and refuses, naming the variable, what it cannot serve."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BertConfig

from tests.tiny.families import FAMILIES
from tests.tiny.kinds import each_kind
from worker.demo_model import CAPTIONER, CHECKPOINT
from worker.errors import CannotStart
from worker.models.loader import LoadedModel, load
from worker.settings import Attention, Dtype, Switch, WorkerSettings

Checkpoints = Callable[[str], Path]


@pytest.fixture
def own_checkpoint(tiny_checkpoint: Checkpoints, tmp_path: Path) -> Checkpoints:
    """Return a function from a family's name to a copy of its checkpoint that a test may damage."""
    return lambda name: Path(shutil.copytree(tiny_checkpoint(name), tmp_path / name))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt to connect fails the test."""

    def refuse(*_: object) -> None:
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Give torch its number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def refusal(**settings: object) -> str:
    """Return the words with which the loader refuses these settings."""
    with pytest.raises(CannotStart) as refused:
        load(WorkerSettings(**settings))
    return str(refused.value)


def set_in_config(folder: Path, **fields: object) -> None:
    """Change fields of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", each_kind(FAMILIES))
@pytest.mark.usefixtures("no_network")
def test_a_folder_of_every_family_is_loaded_without_network(name: str, tiny_checkpoint: Checkpoints) -> None:
    loaded = load(WorkerSettings(model=str(tiny_checkpoint(name))))
    assert not loaded.model.training
    assert loaded.dtype is loaded.model.dtype is torch.float32
    assert loaded.device == loaded.model.device == torch.device("cpu")
    assert loaded.max_context == {"git": 256, "blip2": 512}.get(name, 2048)
    assert loaded.attention == ("eager" if name == "git" else "sdpa")
    assert loaded.tokenizer is loaded.processor.tokenizer


@pytest.mark.usefixtures("no_network")
def test_the_demo_is_loaded_from_the_package() -> None:
    loaded = load(WorkerSettings())
    assert loaded.model.config.model_type == "idefics2"
    assert loaded.model.name_or_path == str(CHECKPOINT)


@pytest.mark.usefixtures("no_network")
def test_the_demo_captioner_is_loaded_from_the_package() -> None:
    loaded = load(WorkerSettings(model="demo-captioner"))
    assert loaded.model.config.model_type == "git"
    assert loaded.model.name_or_path == str(CAPTIONER)
    assert loaded.max_context == 256


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_half_precision_file_is_loaded_as_float32_on_a_cpu(stored: torch.dtype, own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("idefics2")
    AutoModelForImageTextToText.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {stored}
    loaded = load(WorkerSettings(model=str(folder)))
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}


def test_a_named_dtype_is_taken(tiny_checkpoint: Checkpoints) -> None:
    loaded = load(WorkerSettings(model=str(tiny_checkpoint("llava")), dtype=Dtype.BFLOAT16))
    assert loaded.dtype is loaded.model.dtype is torch.bfloat16


def test_named_attention_is_taken(tiny_checkpoint: Checkpoints) -> None:
    loaded = load(WorkerSettings(model=str(tiny_checkpoint("llava")), attention=Attention.EAGER))
    assert loaded.attention == "eager"


@pytest.mark.usefixtures("torch_threads")
def test_the_number_of_torch_threads_is_taken(tiny_checkpoint: Checkpoints) -> None:
    load(WorkerSettings(model=str(tiny_checkpoint("llava")), torch_threads=1))
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("switch", "name", "num_crops"),
    [
        (Switch.AUTO, "idefics2", 1),
        (Switch.ON, "idefics2", 5),
        (Switch.OFF, "idefics2-splitting", 1),
        (Switch.AUTO, "idefics2-splitting", 5),
        (Switch.OFF, "idefics3", 1),
    ],
)
def test_image_splitting_is_switched(switch: Switch, name: str, num_crops: int, tiny_checkpoint: Checkpoints) -> None:
    from tests.tiny.families import picture

    processor = load(WorkerSettings(model=str(tiny_checkpoint(name)), image_splitting=switch)).processor
    encoded = processor(text="<image>What?", images=[[picture(1)]], return_tensors="pt")
    assert encoded["pixel_values"].shape[1] == num_crops
    num_image_tokens = int((encoded["input_ids"] == processor.image_token_id).sum())
    assert num_image_tokens == num_crops * processor.image_seq_len


def test_splitting_that_a_family_does_not_have_can_be_off_only(tiny_checkpoint: Checkpoints) -> None:
    folder = str(tiny_checkpoint("llava"))
    assert load(WorkerSettings(model=folder, image_splitting=Switch.OFF))
    assert "VISIONQ_IMAGE_SPLITTING=on: LlavaProcessor" in refusal(model=folder, image_splitting=Switch.ON)


def test_capabilities_are_found_out(tiny_checkpoint: Checkpoints, own_checkpoint: Checkpoints) -> None:
    def capabilities(folder: Path) -> object:
        return load(WorkerSettings(model=str(folder))).capabilities

    chat = capabilities(tiny_checkpoint("idefics2"))
    assert (chat.has_chat_template, chat.has_system_role, chat.image_token, chat.native_video) == (
        True, True, "<image>", False,
    )  # fmt: skip
    assert chat.default_caption_prompt == "Describe this image."
    assert capabilities(tiny_checkpoint("gemma3")).image_token == "<start_of_image>"
    git = capabilities(tiny_checkpoint("git"))
    assert (git.has_chat_template, git.has_system_role, git.image_token) == (False, False, None)
    own = own_checkpoint("llava")
    set_in_config(own, default_caption_prompt="describe the picture.")
    assert capabilities(own).default_caption_prompt == "describe the picture."


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert f"VISIONQ_MODEL={tmp_path}/nothing: there is no folder" in refusal(model=f"{tmp_path}/nothing")


@pytest.mark.parametrize("model", ["demo", "demo-captioner", "s3://models/vlm/", "folder"])
def test_a_revision_of_what_is_no_hub_checkpoint_is_refused_by_its_name(
    model: str, tiny_checkpoint: Checkpoints
) -> None:
    model = str(tiny_checkpoint("llava")) if model == "folder" else model
    message = refusal(model=model, model_revision="v1")
    assert message.startswith("VISIONQ_MODEL_REVISION=v1: only checkpoints of the model hub have revisions")
    assert f"VISIONQ_MODEL={model} is none" in message


@pytest.mark.parametrize("revision", ["../../x", "a b", "-x", "x" * 256])
def test_what_is_no_name_of_a_revision_is_no_setting(revision: str) -> None:
    with pytest.raises(ValidationError, match="model_revision"):
        WorkerSettings(model_revision=revision)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refusal(model=str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "nothing-known"}', "{}"])
def test_an_unreadable_config_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert f"VISIONQ_MODEL={tmp_path}: its config cannot be read: " in refusal(model=str(tmp_path))


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    assert "bert is not a vision-language architecture" in refusal(model=str(tmp_path))


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer.json"])
def test_a_checkpoint_without_its_processor_is_refused(file: str, own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("idefics2")
    (folder / file).unlink()
    assert refusal(model=str(folder)).startswith(f"VISIONQ_MODEL={folder}: ")


def test_a_broken_tokenizer_is_refused(own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("idefics2")
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    assert f"VISIONQ_MODEL={folder}: its processor cannot be loaded" in refusal(model=str(folder))


def test_a_checkpoint_without_weights_is_refused(own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    (folder / "model.safetensors").unlink()
    assert f"VISIONQ_MODEL={folder}: its weights cannot be loaded: " in refusal(model=str(folder))


def test_a_cut_weight_file_is_refused(own_checkpoint: Checkpoints) -> None:
    file = own_checkpoint("llava") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "its weights cannot be loaded: " in refusal(model=str(file.parent))


def test_weights_of_another_shape_are_refused(own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    config = json.loads((folder / "config.json").read_text())
    set_in_config(folder, text_config=config["text_config"] | {"intermediate_size": 40})
    message = refusal(model=str(folder))
    assert "the weights do not belong to the config: 0 of" in message
    assert "mlp.down_proj.weight" in message


def test_weights_of_another_model_are_refused_not_replaced_by_noise(own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    save_file({"something.else": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert "the weights do not belong to the config" in refusal(model=str(folder))


def test_a_hub_id_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(model="nobody/nothing-here")
    assert message.startswith("VISIONQ_MODEL=nobody/nothing-here: no such folder, nor a readable hub checkpoint (gated")


def test_pickled_weights_are_refused(own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert f"VISIONQ_MODEL={folder}: its weights cannot be loaded: " in refusal(model=str(folder))


@pytest.mark.parametrize("device", ["cuda:7", "gpu", "meta", "cuda:x"])
def test_a_device_that_is_not_there_is_refused(device: str, tiny_checkpoint: Checkpoints) -> None:
    assert f"VISIONQ_DEVICE={device}: " in refusal(model=str(tiny_checkpoint("llava")), device=device)


def test_flash_attention_without_its_conditions_is_refused(tiny_checkpoint: Checkpoints) -> None:
    message = refusal(model=str(tiny_checkpoint("llava")), device="cpu", attention=Attention.FLASH)
    assert message.startswith("VISIONQ_ATTENTION=flash_attention_2: needs a CUDA device, half precision")


def test_a_loaded_model_cannot_be_changed(tiny_checkpoint: Checkpoints) -> None:
    loaded: LoadedModel = load(WorkerSettings(model=str(tiny_checkpoint("llava"))))
    with pytest.raises(AttributeError):
        loaded.max_context = 1  # type: ignore[misc]
