"""The captioner's training program: the tower it takes over, the loss of packed captions, and the truth of captions."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, cross_entropy

from worker.demo_model import CAPTIONER, CHECKPOINT
from worker.demo_model.learning import architecture as chat
from worker.demo_model.learning.captioner import architecture
from worker.demo_model.learning.captioner.caption_loss import caption_loss, pack
from worker.demo_model.learning.captioner.captions import german, in_order, places
from worker.demo_model.learning.captioner.evaluate import main as evaluate
from worker.demo_model.learning.captioner.german import METADATA, draw_data_set
from worker.demo_model.learning.captioner.student import Student
from worker.demo_model.learning.captioner.train import Recipe, learn_to_caption, learn_to_see, main
from worker.demo_model.learning.encoding import IGNORED
from worker.demo_model.learning.initialisation import to_tensor
from worker.demo_model.learning.progress import Budget, Progress
from worker.demo_model.questions import caption
from worker.demo_model.scenes import COLOURS, Scene, Thing, draw, draw_varied, make_dense_scene, make_scene

pytestmark = pytest.mark.check

MAX_BYTES = 4_000_000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)


@pytest.fixture(scope="module")
def new_student() -> Student:
    return Student.new(Random(1))


def thing(colour: str, shape: str, x: float, y: float) -> Thing:
    return Thing(colour, shape, x, y, 9.0, COLOURS[colour])


def scene(*things: Thing) -> Scene:
    return Scene(things, "white", (245, 245, 245))


def test_captions_say_what_is_where() -> None:
    two = scene(thing("blue", "star", 50, 12), thing("red", "cross", 12, 12))
    assert (places(two), german(two)) == (
        "a red cross top left, a blue star top right",
        "Ein rotes Kreuz oben links und ein blauer Stern oben rechts",
    )
    three = scene(thing("pink", "circle", 32, 32), thing("green", "square", 12, 50), thing("cyan", "star", 54, 32))
    assert places(three) == "a green square bottom left, a pink circle middle, a cyan star right"
    assert german(three) == "Ein grünes Quadrat unten links, ein rosa Kreis in der Mitte und ein türkiser Stern rechts"


def test_all_captions_list_the_things_in_one_order() -> None:
    rng = Random(2)
    for _ in range(60):
        drawn = make_scene(rng)
        said = [caption(drawn).index(each.name) for each in in_order(drawn)]
        assert said == sorted(said)
        assert [places(drawn).index(each.name) for each in in_order(drawn)] == sorted(
            places(drawn).index(each.name) for each in drawn.things
        )


def test_training_the_tokenizer_gives_the_shipped_one(new_student: Student) -> None:
    shipped = json.loads((CAPTIONER / "tokenizer.json").read_text())
    assert json.loads(new_student.processor.tokenizer.backend_tokenizer.to_str())["model"] == shipped["model"]


def test_a_saved_checkpoint_is_the_loaded_one_byte_for_byte(tmp_path: Path) -> None:
    model, processor = architecture.load(CAPTIONER)
    architecture.save(model, processor, tmp_path)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json"):
        assert (tmp_path / name).read_bytes() == (CAPTIONER / name).read_bytes()


def test_a_checkpoint_is_small_and_the_auto_classes_load_it(
    new_student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new_student.save(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= MAX_BYTES
    assert evaluate(["--checkpoint", str(tmp_path), "--n", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")]
    assert [row[:2] for row in rows] == [["kind", "n"], ["caption", "2"], ["places", "2"]]
    model, processor = architecture.load(tmp_path)
    assert model.config.max_position_embeddings == processor.tokenizer.model_max_length == 256
    assert main(["--init", str(tmp_path), "--out", str(tmp_path / "on"), "--steps", "1", "--caption-batch", "4"]) == 0
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (reports[-1]["phase"], reports[-1]["step"]) == ("caption", 1)


@pytest.mark.parametrize(
    "text",
    [
        "Ein grüner Stern oben links und ein türkises Kreuz in der Mitte",
        "l’élève dit: 猫 🐈 <b>&amp;\t42\n",
        "A Red Circle, a RED circle",
        "\x00\x7f\u2028",
    ],
)
def test_any_text_survives_the_tokenizer_with_its_case(text: str, new_student: Student) -> None:
    tokenizer = new_student.processor.tokenizer
    assert tokenizer.unk_token is None
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    ids = tokenizer(text).input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_training_sees_the_pixels_that_the_processor_makes(new_student: Student) -> None:
    pixels = draw(make_scene(Random(1)), 64)
    wanted = new_student.processor.image_processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    assert torch.allclose(to_tensor([pixels]), wanted, atol=1e-5)


def test_a_new_tower_sees_what_the_chat_models_first_layers_see(new_student: Student) -> None:
    rng = Random(5)
    pixels = to_tensor([draw_varied(make_dense_scene(rng), rng) for _ in range(24)])
    tower = chat.load(CHECKPOINT)[0].model.vision_model
    with torch.no_grad():
        states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        wanted = tower.post_layernorm(states[architecture.VISION_LAYERS])
        seen = architecture.see(new_student.model, pixels)[:, 1:]
    assert cosine_similarity(seen, wanted, dim=-1).min() > 0.98


def test_packed_captions_have_the_models_own_loss(new_student: Student) -> None:
    model, rng = new_student.model, Random(3)
    scenes = [make_scene(rng) for _ in range(4)]
    pixels = to_tensor([draw(each, 64) for each in scenes])
    rows = [new_student.captions(each) + new_student.spelt(each) for each in scenes]
    with torch.no_grad():
        ours, _ = caption_loss(model, architecture.see(model, pixels), pack(rows, pad=0))
        total, weight = 0.0, 0.0
        for number, row in enumerate(rows):
            for said in row:
                ids = torch.tensor([said.ids])
                logits = model(input_ids=ids, pixel_values=pixels[number : number + 1]).logits[0, -len(said.ids) :]
                labels = torch.tensor([IGNORED] * (said.num_given - 1) + list(said.ids[said.num_given :]))
                num = int((labels != IGNORED).sum())
                total += said.weight * num * cross_entropy(logits[:-1], labels).item()
                weight += said.weight * num
    assert ours.item() == pytest.approx(total / weight, rel=1e-4)


def test_spelt_captions_are_the_same_text_in_letters(new_student: Student) -> None:
    tokenizer = new_student.processor.tokenizer
    drawn = make_scene(Random(4), 2)
    (said,) = new_student.spelt(drawn)
    text = f"{caption(drawn)}, {places(drawn)}"
    assert tokenizer.decode(said.ids, skip_special_tokens=True) == text
    assert len(said.ids) == len(text) + 2


def test_a_few_steps_of_either_phase_lower_its_loss(new_student: Student) -> None:
    reports: list[dict[str, Any]] = []
    rng, recipe = Random(1), Recipe(see_batch=8, see_lr=5e-3, caption_batch=8, caption_lr=4e-3)
    torch.nn.init.zeros_(new_student.heads.patch.weight)  # the tower sees from the start, these heads do not
    for _ in range(2):
        learn_to_see(new_student, recipe, rng, Progress("see", Budget(0, 5), reports.append))
    new_student.aim_projection(rng)
    for _ in range(2):
        learn_to_caption(new_student, recipe, rng, Progress("caption", Budget(0, 6), reports.append), list, 600)
    losses = {phase: [r["loss"] for r in reports if r["phase"] == phase] for phase in ("see", "caption")}
    assert losses["see"][1] < 0.8 * losses["see"][0]
    assert losses["caption"][1] < 0.9 * losses["caption"][0]


def test_a_drawn_data_set_has_a_row_for_every_picture_and_a_tenth_for_validation(tmp_path: Path) -> None:
    draw_data_set(tmp_path, 20, seed=3)
    rows = [json.loads(line) for line in (tmp_path / METADATA).read_text(encoding="utf-8").splitlines()]
    assert sorted(row["file_name"] for row in rows) == sorted(path.name for path in tmp_path.glob("*.png"))
    assert [row["split"] for row in rows].count("validation") == 2
    assert all(row["text"].startswith("Ein ") for row in rows)
    again = tmp_path / "again"
    draw_data_set(again, 20, seed=3)
    assert (again / METADATA).read_bytes() == (tmp_path / METADATA).read_bytes()
