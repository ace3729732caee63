"""Labels equal those written out by hand, token by token, and templates that do not show them are refused."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch

from tests import labelled
from tests.labelled import BY_HAND, CAPTIONED, EXAMPLE, TURNS, Learnt, assert_is, encoder_of, loss, media, rows_of
from tests.tiny.families import IDEFICS_TURNS
from tests.training_data import DataFolder, asked
from tests.unit.worker.prompting.conftest import builder_of, loaded_family
from tests.unit.worker.prompting.conversations import assistant, clip, system, user
from worker.errors import InvalidRequest
from worker.models.loader import LoadedModel
from worker.prompting.prepare import PromptBuilder
from worker.training.batch import IGNORED
from worker.training.example import Example
from worker.training.labels import ChatEncoder, UnsafeTemplate, check_fits, encoder_for

__all__ = ["builder_of", "loaded_family"]

Loaded = Callable[[str], LoadedModel]
CHAT = ("idefics2", "idefics3", "llava", "gemma3")
#: The first in `make test`, the others in `make check`.
ONE_FIRST = (CHAT[0], *(pytest.param(name, marks=pytest.mark.check) for name in CHAT[1:]))


@pytest.mark.parametrize("name", CHAT)
def test_a_conversation_is_labelled_as_by_hand(name: str, loaded_family: Loaded) -> None:
    loaded = loaded_family(name)
    assert_is(encoder_of(loaded).row(EXAMPLE, None, media()), BY_HAND[name], loaded)


def test_a_caption_is_learnt_from_its_first_token_to_the_end_token(loaded_family: Loaded) -> None:
    loaded = loaded_family("git")
    row = encoder_of(loaded).row(CAPTIONED, "A red car.", media()[:1])
    assert_is(row, ["[CLS]", Learnt("A red car.[SEP]")], loaded)
    loaded = loaded_family("llava")
    row = encoder_of(loaded).row(CAPTIONED, "A red car.", media()[:1])
    asked_first = f"<|im_start|>user\n{'<image>' * 16}Describe this image.<|im_end|>\n<|im_start|>assistant\n"
    assert_is(row, [asked_first, Learnt("A red car.<|im_end|>"), "\n"], loaded)


@pytest.mark.parametrize("name", [*ONE_FIRST, "git"])
def test_what_is_before_an_answer_is_the_prompt_as_it_is_served(
    name: str, loaded_family: Loaded, builder_of: Callable[[str], PromptBuilder]
) -> None:
    encoder, builder = encoder_of(loaded_family(name)), builder_of(name)
    if name == "git":
        row, turns = encoder.row(CAPTIONED, "A red car.", media()[:1]), [user(labelled.IMAGE)]
        shown = media()[:1]
    else:
        row, turns, shown = encoder.row(EXAMPLE, None, media()), list(TURNS[:3]), media()
    served = builder.prepare(turns, shown).tensors
    learnt = (row.labels[0] != IGNORED).nonzero().flatten().tolist()
    last_answer = next(place for place in reversed(learnt) if place - 1 not in learnt)
    assert row.tensors["input_ids"][0, :last_answer].tolist() == served["input_ids"][0].tolist()
    assert torch.equal(row.tensors["pixel_values"], served["pixel_values"])


@pytest.mark.parametrize("name", ONE_FIRST)
def test_a_batch_has_the_loss_of_its_rows(name: str, loaded_family: Loaded) -> None:
    assert_batch_equals_rows(loaded_family(name))


def assert_batch_equals_rows(loaded: LoadedModel) -> None:
    """Compare a batch of rows with two pictures, one and none with the rows alone."""
    encoder = encoder_of(loaded)
    rows = rows_of(encoder)
    batch = encoder.join(rows)
    with torch.no_grad():
        alone = [loss(loaded, row.tensors, row.labels) for row in rows]
        together, num_learnt = loss(loaded, batch.tensors, batch.labels)
    assert num_learnt == sum(number for _, number in alone)
    assert together == pytest.approx(sum(mean * number for mean, number in alone) / num_learnt, rel=1e-4)


def test_captions_of_a_batch_have_the_loss_of_its_rows(loaded_family: Loaded) -> None:
    loaded = loaded_family("git")
    encoder = encoder_of(loaded)
    rows = [encoder.row(CAPTIONED, text, (medium,)) for text, medium in zip(("A", "A red car."), media(), strict=True)]
    batch = encoder.join(rows)
    assert batch.labels[0].tolist()[3:] == [IGNORED] * (batch.labels.shape[1] - 3)
    with torch.no_grad():
        alone = [loss(loaded, row.tensors, row.labels) for row in rows]
        together, num_learnt = loss(loaded, batch.tensors, batch.labels)
    assert together == pytest.approx(sum(mean * number for mean, number in alone) / num_learnt, rel=1e-4)


def test_an_answer_keeps_its_white_space_where_the_template_keeps_it(loaded_family: Loaded) -> None:
    loaded = loaded_family("llava")
    example = Example(1, (), messages=(system("Be brief."), user("x"), assistant(" one\n", "two ")))
    row = encoder_of(loaded).row(example, None, ())
    before = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert_is(row, [before, Learnt(" one\ntwo <|im_end|>"), "\n"], loaded)


TURN = "{{ message['role'] | capitalize }}: {{ message['content'][-1]['text'] }}<end_of_utterance>\n"
LOOP = "{% for message in messages %}"
ASKS = "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP + TURN.replace("<end_of_utterance>", "") + ASKS, "ends an assistant's turn with"),
        (LOOP + TURN.replace("['text']", "['text'] | upper") + ASKS, None),
        (LOOP + TURN.replace("['text']", "['text'] | reverse") + ASKS, "does not show what a user says"),
        (LOOP + TURN.replace("['text'] }}", "['text'] }}{{ messages | length }}") + ASKS, "does not begin as"),
        (LOOP + TURN.replace("['text']", "['text'] ~ message['content'][-1]['text'] | length") + ASKS, "changes what"),
        (LOOP + TURN.replace("<end_of_utterance>", " (done)<end_of_utterance>") + ASKS, r"ends .* with '\(done\)"),
        (LOOP + TURN + ASKS.replace("Assistant:", "Bot:"), "does not begin as"),
        (LOOP + TURN + ASKS.replace("Assistant:", "Assistant: <think>"), "does not begin as"),
        (LOOP + "{% if loop.last or message['role'] == 'user' %}" + TURN + "{% endif %}" + ASKS, "1 of 2 assistant"),
        (LOOP + TURN + ASKS.replace("Assistant:", "Assistant: "), "reaches over the border"),
    ],
)
def test_a_template_that_does_not_show_what_is_learnt_is_refused(
    template: str, message: str | None, loaded_family: Loaded
) -> None:
    loaded = loaded_family("idefics2")
    processor = deepcopy(loaded.processor)
    shows = "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    processor.chat_template = template.replace(": {{", ":" + shows + " {{")
    example = Example(1, (), messages=(user("x"), assistant("the cat"), user("y"), assistant("the dog")))

    def encode() -> None:
        ends = [loaded.tokenizer.convert_tokens_to_ids("<end_of_utterance>")]
        ChatEncoder(processor, loaded.model.config, eos_token_ids=ends).row(example, None, ())

    if message is None:
        encode()  # capital letters do not move a border
        return
    with pytest.raises(UnsafeTemplate, match=message):
        encode()


def test_an_end_token_at_which_generation_does_not_stop_is_refused(loaded_family: Loaded) -> None:
    loaded = loaded_family("idefics2")
    assert loaded.processor.chat_template == IDEFICS_TURNS
    with pytest.raises(UnsafeTemplate, match="generation stops at </s>"):
        encoder_for(loaded.processor, loaded.model.config, eos_token_ids=[loaded.tokenizer.eos_token_id])


@pytest.mark.check
def test_families_whose_captions_are_not_proven_are_refused(loaded_family: Loaded) -> None:
    with pytest.raises(UnsafeTemplate, match="Blip2Processor"):
        encoder_of(loaded_family("blip2"))
    loaded = loaded_family("git")
    with pytest.raises(UnsafeTemplate, match="no chat template"):
        encoder_for(loaded.processor, loaded.model.config, "chat", eos_token_ids=[1])


def test_what_does_not_fit_the_model_is_found_with_its_line(loaded_family: Loaded, tmp_path: object) -> None:
    folder = DataFolder(tmp_path)  # type: ignore[arg-type]
    name, moving = folder.picture("a.png"), folder.clip("c.mp4")
    folder.write(
        [
            {"file_name": name, "text": "A cat.", "split": "train"},
            {"file_name": name, "texts": ["A cat.", "word " * 400], "split": "train"},
            {"file_name": name, "text": "A [SEP] cat.", "split": "train"},
            {"file_name": [name, name], "text": "Two cats.", "split": "train"},
            {"file_name": moving, "text": "It moves.", "split": "train"},
            {"file_name": name, "messages": asked("What?", "A cat."), "split": "validation"},
        ]
    )
    dataset = folder.open()
    found = check_fits(dataset, encoder_of(loaded_family("git")))
    assert [finding.line for finding in found] == [2, 3, 4, 5, 6]
    for finding, message in zip(
        found,
        (
            "tokens, the model's limit is 256",
            "control token",
            "takes 1 picture, got 2",
            "got a clip",
            "no chat template",
        ),
        strict=True,
    ):
        assert message in finding.message
    found = check_fits(dataset, encoder_of(loaded_family("llava")))
    assert [finding.line for finding in found] == []


def test_a_control_token_in_a_text_is_refused(loaded_family: Loaded) -> None:
    encoder = encoder_of(loaded_family("llava"))
    for turns in ((user("a <|im_end|>"), assistant("b")), (user("a"), assistant("b <image> c"))):
        with pytest.raises(InvalidRequest, match="control token"):
            encoder.row(Example(1, (), messages=turns), None, ())


@pytest.mark.check
def test_a_clip_of_a_family_without_clips_is_its_frames(loaded_family: Loaded) -> None:
    row = encoder_of(loaded_family("gemma3")).row(CAPTIONED, "It moves.", (clip(1, 3),))
    assert row.tensors["pixel_values"].shape[0] == 3
