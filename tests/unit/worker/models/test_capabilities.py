"""What a checkpoint can do is asked once, of its processor; what it lacks is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.tiny.families import CHAT_FAMILIES
from tests.tiny.kinds import each_kind
from worker.errors import CannotStart
from worker.models.capabilities import Capabilities
from worker.models.loader import load
from worker.settings import WorkerSettings

Checkpoints = Callable[[str], Path]


def capabilities(folder: Path) -> Capabilities:
    return load(WorkerSettings(model=str(folder))).capabilities


def rewrite(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", each_kind(CHAT_FAMILIES))
def test_chat_families_without_a_video_processor_see_clips_as_frames(name: str, tiny_checkpoint: Checkpoints) -> None:
    can = capabilities(tiny_checkpoint(name))
    assert (can.has_chat_template, can.captioner) == (True, None)
    assert (can.native_video, can.video_token, can.can_mix_media, can.can_mix_lengths) == (False, None, False, False)
    assert can.image_token == ("<start_of_image>" if name == "gemma3" else "<image>")
    assert can.default_caption_prompt == "Describe this image."


@pytest.mark.parametrize(("name", "prompt"), [("git", ""), ("blip2", ""), ("paligemma", "caption en")])
def test_captioners_are_known_by_their_processor_and_have_their_own_prompt(
    name: str, prompt: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    can = capabilities(tiny_checkpoint(name))
    assert can.captioner is not None
    assert (can.captioner.family.lower().replace("-", ""), can.captioner.takes_questions) == (name, name == "paligemma")
    assert (can.has_chat_template, can.native_video, can.default_caption_prompt) == (False, False, prompt)
    own = Path(shutil.copytree(tiny_checkpoint(name), tmp_path / name))
    rewrite(own / "config.json", default_caption_prompt="a drawing of")
    assert capabilities(own).default_caption_prompt == "a drawing of"


def test_a_chat_template_that_shows_images_goes_before_a_familys_own_way(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(tiny_checkpoint("paligemma"), tmp_path / "paligemma"))
    words = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    (own / "chat_template.jinja").write_text("{% for p in messages[0]['content'][:-1] %}<image>{% endfor %}" + words)
    can = capabilities(own)
    assert (can.has_chat_template, can.captioner, can.image_token) == (True, None, "<image>")
    assert can.default_caption_prompt == "Describe this image."
    (own / "chat_template.jinja").write_text(words)
    can = capabilities(own)
    assert (can.has_chat_template, can.template_source, can.image_token) == (False, "", None)
    assert can.captioner is not None, "asked in its family's way, a picture is seen"


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_family_that_needs_torchvision_names_it_and_the_extra(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    own = Path(shutil.copytree(tiny_checkpoint("idefics3"), tmp_path / "idefics3"))
    video = {"video_processor_type": "SmolVLMVideoProcessor"}
    rewrite(own / "processor_config.json", processor_class="SmolVLMProcessor", video_processor=video)
    with pytest.raises(CannotStart, match=r"install the `vision` extra \(.*[Tt]orchvision"):
        load(WorkerSettings(model=str(own)))
