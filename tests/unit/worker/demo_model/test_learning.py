"""The training program: same tokens as the processor, same model as the checkpoint, and a loss that falls."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from worker.demo_model import CHECKPOINT
from worker.demo_model.learning import architecture
from worker.demo_model.learning.answering import Answerer
from worker.demo_model.learning.answering_loss import answer_loss
from worker.demo_model.learning.conversations import (
    Conversation,
    clip_conversation,
    greeting,
    image_conversation,
    images_conversation,
    messages,
)
from worker.demo_model.learning.encoding import ChatEncoder
from worker.demo_model.learning.exam import exam
from worker.demo_model.learning.initialisation import sine_positions, to_tensor
from worker.demo_model.learning.muon import Muon, orthogonal
from worker.demo_model.learning.optimizer import Optimizer, one_cycle
from worker.demo_model.learning.phases import Recipe, learn_to_answer, learn_to_see
from worker.demo_model.learning.progress import Budget, Progress
from worker.demo_model.learning.student import HEADS_FILE, Student
from worker.demo_model.learning.supervision import targets
from worker.demo_model.learning.train import main
from worker.demo_model.scenes import COLOURS, SHAPES, Scene, Thing, draw

pytestmark = pytest.mark.check

TALKS = (image_conversation, images_conversation, clip_conversation, greeting)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer.load(CHECKPOINT)


@pytest.fixture(scope="module")
def new_student() -> Student:
    return Student.new()


def test_training_the_tokenizer_gives_the_shipped_one(new_student: Student) -> None:
    shipped = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    assert json.loads(new_student.processor.tokenizer.backend_tokenizer.to_str())["model"] == shipped["model"]


def test_any_text_survives_the_tokenizer(answerer: Answerer) -> None:
    tokenizer = answerer.processor.tokenizer
    text = "l’élève dit: 猫 🐈 <b>&amp;\t42"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_new_model_has_the_shape_of_the_shipped_checkpoint(new_student: Student, answerer: Answerer) -> None:
    shapes = [{name: w.shape for name, w in m.state_dict().items()} for m in (new_student.model, answerer.model)]
    assert shapes[0] == shapes[1]
    assert new_student.processor.chat_template == answerer.processor.chat_template


def test_a_saved_checkpoint_is_the_loaded_one_byte_for_byte(tmp_path: Path) -> None:
    model, processor = architecture.load(CHECKPOINT)
    architecture.save(model, processor, tmp_path)
    assert model.dtype == torch.float32
    for name in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (CHECKPOINT / name).read_bytes()


@pytest.mark.parametrize("is_text_first", [False, True])
@pytest.mark.parametrize("talk", TALKS)
def test_encoded_conversations_equal_the_processors_output(talk: Any, is_text_first: bool, answerer: Answerer) -> None:
    processor, rng = answerer.processor, Random(5)
    encoder = ChatEncoder(processor)
    for _ in range(4):
        conversation: Conversation = talk(rng)
        ids, answers = encoder.encode(conversation, is_text_first=is_text_first)
        pictures = [Image.fromarray(draw(scene, 64)) for turn in conversation for scene in turn.scenes]
        text = processor.apply_chat_template(messages(conversation, is_text_first=is_text_first))
        shown = {"images": [pictures]} if pictures else {}
        wanted = processor(text=[text], return_tensors="pt", **shown)
        assert wanted["input_ids"][0].tolist() == [*ids, *processor.tokenizer("\n").input_ids]
        said = [processor.tokenizer.decode(ids[a.start : a.stop], skip_special_tokens=True) for a in answers]
        assert said == [f" {turn.question.answer}" for turn in conversation]
        if pictures:
            pixels = to_tensor([np.asarray(picture) for picture in pictures])
            assert torch.allclose(wanted["pixel_values"][0], pixels, atol=1e-5)


def test_the_training_loss_equals_the_models_own_loss(answerer: Answerer) -> None:
    encoder = ChatEncoder(answerer.processor)
    batch = encoder.batch([image_conversation(Random(1))])
    pixels = to_tensor([draw(scene, 64) for scene in batch.scenes])
    with torch.no_grad():
        latents = architecture.image_features(answerer.model, pixels).latents
        ours = answer_loss(answerer.model, encoder.image_id, batch, latents)
        theirs = answerer.model(input_ids=batch.ids, pixel_values=pixels[None], labels=batch.labels)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-4)
    assert all(is_right for _, is_right in ours.matches(batch))


def test_targets_name_the_cell_a_thing_is_centred_in() -> None:
    thing = Thing("green", "star", 40.0, 20.0, 9.0, COLOURS["green"])
    truth = targets([Scene((thing,), "gray", (120, 120, 120))])
    cell = 1 * 4 + 2
    assert truth.colour[0].nonzero().flatten().tolist() == [cell]
    assert (truth.colour[0, cell].item(), truth.shape[0, cell].item()) == (2, SHAPES.index("star") + 1)
    assert truth.offset[0, cell].tolist() == [0.0, -0.25]
    assert truth.background.tolist() == [1]


def test_positions_differ_in_every_cell() -> None:
    positions = sine_positions(4, 128)
    assert torch.cdist(positions, positions).fill_diagonal_(9).min() > 0.5


def test_the_learning_rate_rises_and_falls_once() -> None:
    shares = [one_cycle(i / 100, 0.12) for i in range(120)]
    assert shares[0] == 0
    assert max(shares) == pytest.approx(1, abs=0.01)
    assert shares.index(max(shares)) == 12
    assert shares[-1] == pytest.approx(0.02)


def test_every_weight_is_stepped_once_and_the_text_side_only_when_asked(new_student: Student) -> None:
    for trains_text in (True, False):
        optimizer = Optimizer(new_student.model, new_student.heads, 1e-3, vision_lr_share=0.1, trains_text=trains_text)
        groups = [group for part in optimizer._optimizers for group in part.param_groups]
        stepped = [id(weight) for group in groups for weight in group["params"]]
        assert len(stepped) == len(set(stepped))
        weights = [w for name, w in new_student.model.named_parameters() if trains_text or "text_model" not in name]
        heads = list(new_student.heads.parameters())
        tied = 0 if trains_text else len([n for n, _ in new_student.model.named_parameters() if "lm_head" in n])
        assert len(stepped) == len(weights) + len(heads) - tied


def test_muon_agrees_with_torchs_own() -> None:
    for shape in ((24, 40), (40, 24)):
        ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 960).view(shape).clone()) for _ in range(2))
        muon = Muon([ours], 0.1, weight_decay=0.05, momentum=0.95)
        reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        for seed in range(3):
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
            muon.step()
            reference.step()
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9999
        assert torch.linalg.svdvals(orthogonal(gradient)).min() > 0.5


def test_a_few_steps_of_either_phase_lower_its_loss(new_student: Student) -> None:
    reports: list[dict[str, Any]] = []
    rng, recipe = Random(1), Recipe(see_batch=8, answer_batch=(3, 1, 1), answer_lr=4e-3)
    for _ in range(2):
        learn_to_see(new_student, recipe, rng, Progress("see", Budget(0, 6), reports.append))
    for _ in range(2):
        progress = Progress("answer", Budget(0, 5), reports.append)
        learn_to_answer(new_student, recipe, rng, progress, lambda: None, 600)
    losses = {phase: [r["loss"] for r in reports if r["phase"] == phase] for phase in ("see", "answer")}
    assert losses["see"][1] < 0.9 * losses["see"][0]
    assert losses["answer"][1] < 0.8 * losses["answer"][0]


def test_continuing_from_the_shipped_checkpoint_keeps_what_it_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", "2", "--answer-lr", "1e-4", "--answer-batch", "3", "1", "1"]
    assert main(["--init", str(CHECKPOINT), "--out", str(tmp_path), *options]) == 0
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert reports[0]["objects"] > 0.8  # the heads were fitted before the first step
    assert reports[-1]["teacher_forced"]["colour"] > 95
    trained = Answerer.load(tmp_path)
    items = exam("colour", 8, 1)
    assert trained.answer(items) == [item.answer for item in items]
    assert (tmp_path / "model.safetensors").read_bytes() != (CHECKPOINT / "model.safetensors").read_bytes()
    heads = load_file(tmp_path / HEADS_FILE)
    resumed = Student.resume(tmp_path, Random(0)).heads
    assert all(torch.equal(heads[name], weight) for name, weight in resumed.state_dict().items())
