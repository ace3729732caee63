"""A checkpoint is either whole or refused: nothing is filled in with noise, dropped, or taken for something else."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny.families import FAMILIES
from tests.tiny.kinds import each_kind
from worker.errors import CannotStart
from worker.models.loader import load
from worker.settings import Quantization, WorkerSettings

Checkpoints = Callable[[str], Path]
Weights = dict[str, Tensor]


@pytest.fixture
def own_checkpoint(tiny_checkpoint: Checkpoints, tmp_path: Path) -> Checkpoints:
    """Return a function from a family's name to a copy of its checkpoint that a test may damage."""
    return lambda name: Path(shutil.copytree(tiny_checkpoint(name), tmp_path / name))


def refusal(folder: Path, **settings: object) -> str:
    """Return the words with which the loader refuses a folder."""
    with pytest.raises(CannotStart) as refused:
        load(WorkerSettings(model=str(folder), **settings))
    return str(refused.value)


def set_in_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    """Replace a checkpoint's weights by what `change` makes of them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(pattern: str) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        kept = {key: tensor for key, tensor in weights.items() if not re.search(pattern, key)}
        assert len(kept) < len(weights)
        return kept

    return change


@pytest.mark.parametrize("name", each_kind(FAMILIES))
def test_a_file_that_lacks_any_single_weight_is_refused(name: str, own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint(name)
    whole = load_file(folder / "model.safetensors")
    for key in list(whole)[:: max(1, len(whole) // 4)]:
        rewrite(folder, lambda _, key=key: {name: tensor for name, tensor in whole.items() if name != key})
        message = refusal(folder)
        # Two where one is tied to the other.
        assert re.search(r"the weights do not belong to the config: [12] of \d+ are missing, 0 have", message), key


@pytest.mark.parametrize("pattern", [r"\.layers\.2\.", r"lm_head", r"multi_modal_projector\.linear_1\.bias"])
def test_a_file_that_lacks_a_layer_a_head_or_a_bias_is_refused(pattern: str, own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    rewrite(folder, without(pattern))
    assert "the weights do not belong to the config: " in refusal(folder)


def test_a_head_that_is_tied_to_the_embeddings_is_not_missing(own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    config = json.loads((folder / "config.json").read_text())
    text_config = config["text_config"] | {"tie_word_embeddings": True}
    set_in_config(folder, tie_word_embeddings=True, text_config=text_config)
    rewrite(folder, without("lm_head"))
    model = load(WorkerSettings(model=str(folder))).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_file_with_a_layer_more_than_the_config_counts_is_refused(own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    config = json.loads((folder / "config.json").read_text())
    layer_types = config["text_config"]["layer_types"][:2]
    set_in_config(folder, text_config=config["text_config"] | {"num_hidden_layers": 2, "layer_types": layer_types})
    message = refusal(folder)
    assert "0 of " in message
    assert re.search(r"12 have no place \(first: .*layers\.2\.", message)


def test_a_bias_that_the_config_denies_is_refused(own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("idefics3")
    key = "model.text_model.layers.0.self_attn.q_proj"
    rewrite(folder, lambda weights: weights | {f"{key}.bias": weights[f"{key}.weight"][:, 0].clone()})
    assert refusal(folder).endswith(f"1 have no place (first: {key}.bias)")


@pytest.mark.parametrize(
    "key",
    [
        "model.language_model.layers.0.self_attn.q_norm.weight",
        "model.language_model.layers.0.self_attn.sinks",
        "model.language_model.layers.0.extra_norm.weight",
        "model.multi_modal_projector.norm.weight",
        "model.image_newline",
    ],
)
def test_weights_that_a_part_of_the_model_would_leave_out_are_refused(key: str, own_checkpoint: Checkpoints) -> None:
    """Those of another family whose config was put beside the file, or of a layer that has more to it."""
    folder = own_checkpoint("llava")
    rewrite(folder, lambda weights: weights | {key: torch.ones(16)})
    assert refusal(folder).endswith(f"1 have no place (first: {key})")


@pytest.mark.parametrize(
    "key", ["mtp.layers.0.norm.weight", "model.vision_tower.pooler.dense.weight", "model.talker.w"]
)
def test_parts_that_no_answer_goes_through_may_be_left_over(key: str, own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    rewrite(folder, lambda weights: weights | {key: torch.ones(16)})
    load(WorkerSettings(model=str(folder)))


def test_surplus_weights_of_no_part_of_the_model_are_named_once(
    own_checkpoint: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    """Heads of training, buffers that older versions stored."""
    folder = own_checkpoint("llava")
    surplus = {
        "value_head.weight": torch.zeros(2),
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    rewrite(folder, lambda weights: weights | surplus)
    with caplog.at_level(logging.WARNING):
        load(WorkerSettings(model=str(folder)))
    named = [record for record in caplog.records if record.getMessage().startswith("weights of the file")]
    assert [record.weights for record in named] == [["value_head.weight"]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_old", [True, False])
def test_old_and_new_names_shards_and_types_load_cleanly(is_old: bool, own_checkpoint: Checkpoints) -> None:
    """LLaVA's files are laid out as before transformers 4.52; here in two shards, with `torch_dtype`."""
    folder = own_checkpoint("llava")
    weights = load_file(folder / "model.safetensors")
    expected = load(WorkerSettings(model=str(folder))).model.state_dict()
    assert not weights.keys() & expected.keys()
    (folder / "model.safetensors").unlink()
    chosen = list((weights if is_old else expected).items())
    places = {}
    for number, part in enumerate((dict(chosen[::2]), dict(chosen[1::2])), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    set_in_config(folder, torch_dtype="float32")
    found = load(WorkerSettings(model=str(folder))).model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())

    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "its weights cannot be loaded: " in refusal(folder)


@pytest.mark.parametrize("place", ["whole", "text"])
def test_weights_quantised_by_an_unknown_method_are_refused_by_name(place: str, own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    stored = {"quantization_config": {"quant_method": "new-in-2031", "bits": 4}}
    config = json.loads((folder / "config.json").read_text())
    set_in_config(folder, **(stored if place == "whole" else {"text_config": config["text_config"] | stored}))

    def packed(weights: Weights) -> Weights:
        key = "language_model.model.layers.0.mlp.up_proj"
        rest = without(re.escape(key))(weights)
        return rest | {f"{key}.qweight": torch.zeros(8, 96, dtype=torch.int32), f"{key}.scales": torch.zeros(1, 96)}

    rewrite(folder, packed)
    assert f"VISIONQ_MODEL={folder}: its weights are quantised by new-in-2031 (quant_method" in refusal(folder)
    set_in_config(folder, quantization_config=None, text_config=config["text_config"])
    assert "the weights do not belong to the config: 1 of" in refusal(folder)


def test_a_quantised_checkpoint_is_not_quantised_twice(own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    set_in_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    message = refusal(folder, quantization=Quantization.INT8)
    assert message == "VISIONQ_QUANTIZATION=int8: the checkpoint is already quantised, by gptq"


def test_weights_that_are_stored_as_whole_numbers_without_a_scale_are_refused(own_checkpoint: Checkpoints) -> None:
    """transformers takes the numbers themselves for the weights."""
    folder = own_checkpoint("llava")
    key = "language_model.model.layers.1.mlp.down_proj.weight"
    rewrite(folder, lambda weights: weights | {key: (weights[key] * 100).to(torch.int8)})
    assert refusal(folder).startswith(f"VISIONQ_MODEL={folder}: {key} is stored as I8, and config.json has no quant")


LORA = {"peft_type": "LORA", "base_model_name_or_path": "llava-hf/llava-interleave-qwen-0.5b-hf", "r": 8}


def test_a_folder_that_also_holds_an_adapter_is_refused_by_name(own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    (folder / "adapter_config.json").write_text(json.dumps(LORA))
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(8, 64)}, folder / "adapter_model.safetensors")
    wanted = f"VISIONQ_MODEL={folder}: a LoRA adapter of llava-hf/llava-interleave-qwen-0.5b-hf; "
    assert refusal(folder).startswith(wanted)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"peft_type": "IA3", "base_model_name_or_path": "base"}', "a IA3 adapter of base; "),
        ("{", "a LoRA adapter of a model that its adapter_config.json does not name; "),
        ("[1]", "a LoRA adapter of a model that its adapter_config.json does not name; "),
        ("[" * 100_000, "a LoRA adapter of a model that its adapter_config.json does not name; "),
        ('{"peft_type": null}', "a LoRA adapter of a model that its adapter_config.json does not name; "),
    ],
)
def test_adapters_of_other_kinds_and_broken_ones_are_refused_too(
    text: str, said: str, own_checkpoint: Checkpoints
) -> None:
    folder = own_checkpoint("llava")
    (folder / "adapter_config.json").write_text(text)
    assert said in refusal(folder)


def test_an_adapter_config_that_cannot_be_read_is_an_adapter_all_the_same(own_checkpoint: Checkpoints) -> None:
    """A link into a cache whose file is gone."""
    folder = own_checkpoint("llava")
    (folder / "adapter_config.json").symlink_to(folder / "nowhere")
    assert "a LoRA adapter of a model that its adapter_config.json does not name; " in refusal(folder)


@pytest.mark.parametrize("switch", ["auto", "off"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"suppress_tokens": 5}', None])
def test_a_generation_config_that_cannot_be_read_is_refused(
    text: str | None, switch: str, own_checkpoint: Checkpoints
) -> None:
    """transformers goes on without it: answers would run past its end tokens."""
    folder = own_checkpoint("llava")
    file = folder / "generation_config.json"
    file.unlink()
    if text is None:
        file.mkdir()
    else:
        file.write_text(text)
    assert "its generation_config.json cannot be read: " in refusal(folder, generation_config=switch)


def test_a_checkpoint_without_a_generation_config_is_served(own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    (folder / "generation_config.json").unlink()
    load(WorkerSettings(model=str(folder)))


@pytest.mark.parametrize("switch", ["auto", "off"])
@pytest.mark.parametrize("value", ["7", [7, "x"], [[1]], True, 1.5])
def test_end_tokens_that_are_no_tokens_are_refused(value: object, switch: str, own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": value}))
    message = refusal(folder, generation_config=switch)
    assert "GenerationConfig: eos_token_id: " in message
    assert message.endswith(f"got {value!r}")


def test_a_file_with_unmerged_adapter_weights_is_refused(own_checkpoint: Checkpoints) -> None:
    folder = own_checkpoint("llava")
    key = "model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight"
    rewrite(folder, lambda weights: weights | {key: torch.zeros(8, 64)})
    assert refusal(folder).endswith(f"the file holds weights of an adapter that are not merged (first: {key})")


def test_a_context_beyond_which_positions_depend_on_other_rows_is_cut_off(own_checkpoint: Checkpoints) -> None:
    """`longrope` takes other frequencies for a whole batch once one row is longer than it was first trained on."""
    folder = own_checkpoint("llava")
    config = json.loads((folder / "config.json").read_text())
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 300,
    }  # fmt: skip
    set_in_config(folder, text_config=config["text_config"] | {"rope_parameters": rope})
    assert load(WorkerSettings(model=str(folder))).max_context == 300
