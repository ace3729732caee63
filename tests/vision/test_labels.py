"""Labels of the families whose processors need torchvision, written out by hand, token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.labelled import BY_HAND, EXAMPLE, assert_is, encoder_of, media
from tests.unit.worker.prompting.conversations import VIDEO, assistant, clip, user
from tests.unit.worker.training.test_labels import assert_batch_equals_rows
from worker.models.loader import LoadedModel
from worker.prompting.prepare import PromptBuilder
from worker.training.batch import IGNORED
from worker.training.example import Example
from worker.training.labels import UnsafeTemplate

Loaded = Callable[[str], LoadedModel]
NAMES = ("smolvlm", "qwen2.5-vl")


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_is_labelled_as_by_hand(name: str, loaded_family: Loaded) -> None:
    loaded = loaded_family(name)
    assert_is(encoder_of(loaded).row(EXAMPLE, None, media()), BY_HAND[name], loaded)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_has_the_loss_of_its_rows(name: str, loaded_family: Loaded) -> None:
    assert_batch_equals_rows(loaded_family(name))


@pytest.mark.parametrize("name", NAMES)
def test_before_an_answer_about_a_clip_is_the_prompt_as_it_is_served(
    name: str, loaded_family: Loaded, builder_of: Callable[[str], PromptBuilder]
) -> None:
    turns, shown = (user(VIDEO, "What moves?"), assistant("A pink cat.")), (clip(1, 4),)
    loaded = loaded_family(name)
    row = encoder_of(loaded).row(Example(1, ("c.mp4",), messages=turns), None, shown)
    served = builder_of(name).prepare(turns[:1], shown).tensors["input_ids"][0].tolist()
    assert row.tensors["input_ids"][0, : len(served)].tolist() == served
    learnt = row.labels[0][row.labels[0] != IGNORED]
    end = "<end_of_utterance>" if name == "smolvlm" else "<|im_end|>"
    assert loaded.tokenizer.decode(learnt).strip() == f"A pink cat.{end}"
    assert row.labels[0, len(served)] != IGNORED


def test_a_template_whose_turns_differ_from_its_generation_prompt_is_refused(loaded_family: Loaded) -> None:
    with pytest.raises(UnsafeTemplate, match="does not begin as"):
        encoder_of(loaded_family("onevision"))
