"""The shipped captioner: small, anonymous, loadable, tolerant of any text, and right about drawn scenes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoTokenizer

from worker.demo_model import CAPTIONER
from worker.demo_model.learning.captioner.captions import PLACES_BEGINNING, places
from worker.demo_model.learning.captioner.evaluate import Captioner, held_out
from worker.demo_model.learning.captioner.evaluate import main as evaluate
from worker.demo_model.questions import caption
from worker.demo_model.scenes import draw

MAX_BYTES = 4_000_000
TEXTS = (
    "Ein grüner Stern oben links und ein türkises Kreuz in der Mitte",
    "l’élève dit: 猫 🐈 <b>&amp;\t42\n",
    "A Red Circle, a RED circle",
    "<s> </s> <pad>",
    "\x00\x7f\u2028",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner.load(CAPTIONER)


def test_the_checkpoint_is_small_and_names_no_place() -> None:
    files = {path.name: path.read_bytes() for path in CAPTIONER.iterdir()}
    assert sum(map(len, files.values())) <= MAX_BYTES
    for name, content in files.items():
        text = content if name != "model.safetensors" else content[: 8 + int.from_bytes(content[:8], "little")]
        assert not re.search(rb"/(home|root|tmp|usr|work)\b|_name_or_path|https?://", text), name


def test_the_weights_are_stored_in_half_precision_and_run_in_single(captioner: Captioner) -> None:
    assert json.loads((CAPTIONER / "config.json").read_text())["dtype"] == "float16"
    assert captioner.model.dtype == torch.float32
    assert captioner.model.config.model_type == "git"
    assert captioner.model.config.max_position_embeddings == captioner.processor.tokenizer.model_max_length == 256


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_tokenizer_with_its_case(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CAPTIONER)
    assert tokenizer.unk_token is None
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert None not in ids


def test_a_text_begins_with_the_start_token_and_ends_with_the_end_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CAPTIONER)
    ids = tokenizer("a red circle").input_ids
    assert (ids[0], ids[-1], len(ids)) == (tokenizer.bos_token_id, tokenizer.eos_token_id, 5)


def test_captions_of_held_out_scenes_are_mostly_exact(captioner: Captioner) -> None:
    scenes = held_out(40, seed=4)
    given = captioner.describe([draw(scene) for scene in scenes])
    assert sum(text == caption(scene) for text, scene in zip(given, scenes, strict=True)) >= 36


def test_the_beginning_asks_for_places(captioner: Captioner) -> None:
    scenes = held_out(40, seed=4)
    given = captioner.describe([draw(scene) for scene in scenes], PLACES_BEGINNING)
    assert sum(text == places(scene) for text, scene in zip(given, scenes, strict=True)) >= 24


def test_a_caption_follows_the_picture(captioner: Captioner) -> None:
    scenes = held_out(12, seed=5)
    mirrored = [draw(scene)[:, ::-1].copy() for scene in scenes]
    told = captioner.describe(mirrored), captioner.describe([draw(scene) for scene in scenes])
    for scene, there, here in zip(scenes, *told, strict=True):
        if len(scene.things) > 1 and "above" not in caption(scene):
            assert there != here


def test_evaluation_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(["--n", "6"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")]
    assert [row[:2] for row in rows] == [["kind", "n"], ["caption", "6"], ["places", "6"]]
    assert all(0 <= float(row[2]) < 0.5 for row in rows[1:])
