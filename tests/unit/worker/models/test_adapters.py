"""A LoRA adapter is merged into the base that it names, and is then the trained model, or it is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from api_stub.contract.finetune import FinetuneMethod, FinetuneRecipe
from tests.tiny.quantised import pack
from worker.errors import CannotStart
from worker.models.adapter import read_adapter
from worker.models.digests import folder_digest
from worker.models.loader import load
from worker.models.quantized_base import describe_quantized_base, write_quantized_base
from worker.settings import Dtype, Quantization, WorkerSettings
from worker.training.manifest import Plan
from worker.training.tuning import training_settings, tune

#: PEFT reads an attribute that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

Checkpoints = Callable[[str], Path]
LAYER = "model.language_model.layers.0.self_attn.q_proj"
IDS = torch.tensor([[1, 5, 7, 9, 2]])


@pytest.fixture
def base(tiny_checkpoint: Checkpoints) -> Path:
    return tiny_checkpoint("llava")


def adapted(model: Any, folder: Path, base: Path, **config: Any) -> PeftModel:
    """Return a model with an adapter whose weights are noise, and write the adapter into a folder as PEFT does."""
    targets = config.pop("target_modules", ["q_proj", "v_proj", "down_proj", "linear_1"])
    torch.manual_seed(3)
    peft = get_peft_model(model, LoraConfig(target_modules=targets, lora_dropout=0.1, **config)).eval()
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    peft.peft_config["default"].base_model_name_or_path = str(base)
    peft.save_pretrained(folder, save_embedding_layers=False)  # else it looks for the base on the hub
    return peft


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A plain adapter of the base."""
    adapted(whole(base), tmp_path / "adapter", base, r=4, lora_alpha=8)
    return tmp_path / "adapter"


def whole(base: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)


def rewrite(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def refusal(folder: Path, **settings: object) -> str:
    with pytest.raises(CannotStart) as refused:
        load(WorkerSettings(model=str(folder), **settings))
    return str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 3, "use_rslora": True, "init_lora_weights": "gaussian"},
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {LAYER: 5, "q_proj": 16},
        },
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_merged_weights_are_those_that_peft_merges(config: dict[str, Any], base: Path, tmp_path: Path) -> None:
    peft = adapted(whole(base), tmp_path / "adapter", base, **config)
    with torch.no_grad():
        trained = peft(input_ids=IDS).logits
    expected = peft.merge_and_unload().state_dict()
    loaded = load(WorkerSettings(model=str(tmp_path / "adapter")))
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, msg=key)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(input_ids=IDS).logits, trained, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(whole(base)(input_ids=IDS).logits, trained, atol=0.01)


def test_an_adapter_is_served_on_the_weights_that_it_was_trained_on_only(adapter: Path, base: Path) -> None:
    """As far as its manifest says; else the log tells that nobody knows."""
    manifest = adapter / "manifest.json"
    manifest.write_text(json.dumps({"v": 1, "plan": {"base": str(base), "base_digest": folder_digest(base)}}))
    assert load(WorkerSettings(model=str(adapter))).checkpoint == f"{folder_digest(base)}+{folder_digest(adapter)}"
    manifest.write_text(json.dumps({"v": 1, "plan": {"base": str(base), "base_digest": "ab" * 32}}))
    assert re.search(
        rf"was trained on other weights of {base}: their digest was (ab)+, it is \w+ now", refusal(adapter)
    )
    manifest.write_text("[]")
    assert "manifest.json cannot be read" in refusal(adapter)


def test_a_base_in_another_type_gets_the_sum_rounded_once(adapter: Path, base: Path) -> None:
    def weight(model: Path, dtype: Dtype) -> Tensor:
        return load(WorkerSettings(model=str(model), dtype=dtype)).model.get_submodule(LAYER).weight.detach()

    change = weight(adapter, Dtype.FLOAT32) - weight(base, Dtype.FLOAT32)
    expected = (weight(base, Dtype.BFLOAT16).float() + change).to(torch.bfloat16)
    torch.testing.assert_close(weight(adapter, Dtype.BFLOAT16), expected, rtol=2**-7, atol=1e-5)


def test_the_shipped_model_may_be_the_base(adapter: Path, tmp_path: Path) -> None:
    loaded = load(WorkerSettings())
    adapted(loaded.model, tmp_path / "mine", Path("demo"), r=2, target_modules=["q_proj"])
    merged = load(WorkerSettings(model=str(tmp_path / "mine")))
    assert type(merged.model) is type(load(WorkerSettings()).model)
    plain, own = (one.model.state_dict() for one in (load(WorkerSettings()), merged))
    changed = {key for key in plain if not torch.equal(plain[key], own[key])}
    assert changed == {key for key in plain if key.endswith("q_proj.weight")}


def test_a_processor_beside_the_adapter_is_the_one_it_was_trained_with(adapter: Path, base: Path) -> None:
    template = "T: " + (base / "chat_template.jinja").read_text()
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(base / name, adapter / name)
    (adapter / "chat_template.jinja").write_text(template)
    assert load(WorkerSettings(model=str(adapter))).processor.chat_template == template
    (adapter / "tokenizer.json").unlink()
    assert load(WorkerSettings(model=str(adapter))).processor.chat_template == template.removeprefix("T: ")


@pytest.mark.parametrize("kind", [Quantization.INT8, Quantization.NF4])
def test_an_adapter_is_not_merged_into_quantised_weights(kind: Quantization, adapter: Path) -> None:
    message = refusal(adapter, quantization=kind)
    assert message.startswith(f"VISIONQ_QUANTIZATION={kind}: VISIONQ_MODEL={adapter} is an adapter")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"new_in_2031": {"a": 1}}, "new_in_2031 is {'a': 1}"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"alpha_pattern": {"(a+)+b": 4}}, "the pattern '(a+)+b' is no module's name"),
        ({"r": 0}, "r: Input should be"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: Input should be"),
    ],
)
def test_more_than_a_sum_of_two_factors_is_refused_by_its_field(
    fields: dict[str, object], named: str, adapter: Path
) -> None:
    rewrite(adapter, **fields)
    message = refusal(adapter)
    assert message.startswith(f"VISIONQ_MODEL={adapter}: adapter_config.json: ")
    assert named in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda weights: {key.replace("q_proj", "query"): tensor for key, tensor in weights.items()},
            "query is no module of LlavaForConditionalGeneration",
        ),
        (
            lambda weights: {key.replace(".q_proj", ""): tensor for key, tensor in weights.items()},
            "is a Qwen2Attention; linear layers are merged",
        ),
        (
            lambda weights: {key: tensor for key, tensor in weights.items() if "lora_B" not in key},
            "has one of its two factors",
        ),
        (
            lambda weights: weights | {"base_model.model.lm_head.weight": torch.zeros(2)},
            "base_model.model.lm_head.weight is no factor of a linear layer",
        ),
        (lambda weights: {key: tensor[:, :-1].clone() for key, tensor in weights.items()}, "do not fit rank 4"),
        (lambda weights: {key: tensor * float("inf") for key, tensor in weights.items()}, "not finite"),
        (lambda _: {}, "is empty"),
    ],
    ids=["unknown module", "no layer", "half", "other weight", "shape", "infinite", "empty"],
)
def test_weights_that_have_no_place_in_the_base_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], named: str, adapter: Path
) -> None:
    change_weights(adapter, change)
    message = refusal(adapter)
    assert message.startswith(f"VISIONQ_MODEL={adapter}: the adapter does not fit its base ")
    assert named in message


def test_another_rank_than_the_config_says_is_refused(adapter: Path) -> None:
    rewrite(adapter, r=8)
    assert "do not fit rank 8" in refusal(adapter)


def test_a_weight_that_two_modules_share_is_not_changed_for_one(adapter: Path, base: Path, tmp_path: Path) -> None:
    tied = Path(shutil.copytree(base, tmp_path / "tied"))
    config = json.loads((tied / "config.json").read_text())
    text_config = config["text_config"] | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True, "text_config": text_config}))
    weights = load_file(tied / "model.safetensors")
    save_file(
        {key: tensor for key, tensor in weights.items() if "lm_head" not in key},
        tied / "model.safetensors",
        metadata={"format": "pt"},
    )
    adapted(whole(tied), tmp_path / "mine", tied, r=4, target_modules=["lm_head"])
    assert "lm_head shares its weight with another module" in refusal(tmp_path / "mine")


def test_a_base_that_is_not_there_or_is_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    rewrite(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    message = refusal(adapter)
    assert message.startswith(f"VISIONQ_MODEL={adapter}: the base of the adapter is not served: ")
    assert f"there is no folder {tmp_path / 'gone'}" in message
    second = Path(shutil.copytree(adapter, tmp_path / "second"))
    rewrite(adapter, base_model_name_or_path=str(second))
    assert "a whole checkpoint is needed here" in refusal(adapter)


def test_cut_off_and_pickled_adapters_are_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-3])
    assert "adapter_model.safetensors is no whole safetensors file" in refusal(adapter)
    file.rename(adapter / "adapter_model.bin")
    assert "pickles are not loaded" in refusal(adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_trained_beside_quantised_weights_is_the_trained_model(
    dtype: torch.dtype, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(monkeypatch, False)
    folder, plain = tmp_path / "mine", tmp_path / "plain"
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForImageTextToText.from_pretrained(
        base, dtype=dtype, quantization_config=quantised, device_map={"": "cpu"}
    )
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]
    described = describe_quantized_base(layers)
    peft = adapted(model, folder, base, r=4, lora_alpha=8)
    shutil.copytree(folder, plain)
    write_quantized_base(folder, described)
    with torch.no_grad():
        trained = peft(input_ids=IDS).logits.float()
        served = load(WorkerSettings(model=str(folder))).model(input_ids=IDS).logits.float()
        otherwise = load(WorkerSettings(model=str(plain))).model(input_ids=IDS).logits.float()
    error, of_whole_weights = (float((one - trained).abs().max()) for one in (served, otherwise))
    assert error < (1e-4 if dtype is torch.float32 else 0.1), (error, of_whole_weights)
    assert of_whole_weights > 4 * error

    if dtype is torch.bfloat16:
        other = Dtype.FLOAT32
        assert f"VISIONQ_DTYPE={other}" in refusal(folder, dtype=other)
    else:
        write_quantized_base(folder, described.model_copy(update={"digest": "0" * 64}))
        assert "the base's weights do not become those that the adapter was trained beside" in refusal(folder)
        write_quantized_base(folder, described.model_copy(update={"layers": (*described.layers, "lm_head.x")}))
        assert "lm_head.x is no linear layer in float32" in refusal(folder)
        (folder / "quantized_base.json").write_text("{}")
        assert "quantized_base.json cannot be read" in refusal(folder)


def test_a_run_writes_what_serving_needs_to_have_its_quantised_base_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(monkeypatch, False)
    plan = Plan(
        base=str(base),
        base_digest="",
        data="",
        method=FinetuneMethod.QLORA,
        recipe=FinetuneRecipe.CHAT,
        seed=0,
        max_steps=1,
        batch_size=1,
        gradient_accumulation=1,
        learning_rate=0.1,
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        eval_every=1,
        eval_examples=1,
        max_new_tokens=1,
        lora_rank=4,
        lora_alpha=8.0,
        lora_dropout=0.0,
    )
    tuned = tune(training_settings(WorkerSettings(), plan.base, plan.method), plan, None)
    for name, weight in tuned.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    tuned.save(tmp_path)
    with tuned.evaluating():
        trained = tuned.model(input_ids=IDS).logits
        served = load(WorkerSettings(model=str(tmp_path))).model(input_ids=IDS).logits
        plain = load(WorkerSettings(model=str(base))).model(input_ids=IDS).logits
    torch.testing.assert_close(served, trained, rtol=1e-3, atol=1e-3)
    assert float((plain - trained).abs().max()) > 0.05


def test_what_was_packed_for_inference_is_not_described(base: Path) -> None:
    layer = Linear4bit(64, 64, bias=False)
    with pytest.raises(ValueError, match="is not quantised, or packed"):
        describe_quantized_base([("x", layer)])


def test_an_adapter_tells_its_base(adapter: Path, base: Path) -> None:
    assert read_adapter("mine", adapter).base == str(base)
