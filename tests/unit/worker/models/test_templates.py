"""Chat templates are found wherever checkpoints keep them; one that cannot be used is refused by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny.families import IDEFICS_TURNS
from tests.unit.worker.prompting.conversations import IMAGE, image, user
from worker.check import check
from worker.errors import CannotStart, InvalidRequest
from worker.models.loader import LoadedModel, load
from worker.models.templates import MAX_TEMPLATE_BYTES
from worker.prompting.prepare import PromptBuilder
from worker.settings import WorkerSettings

# transformers leaves the files of additional_chat_templates for the garbage collector to close.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")

Checkpoints = Callable[[str], Path]

#: Another prompt than the checkpoint's own, so that it shows which one was taken.
OTHER = "Other. " + IDEFICS_TURNS
#: What language models have: a turn's content is text.
TEXT_ONLY = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
RAG = "{% for m in messages %}RAG {{ m['content'][-1]['text'] }}{% endfor %}"
ASKED = ((user(IMAGE, "What is this?"),), (image(1),))


@pytest.fixture
def bare(tiny_checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """An Idefics2 without a template."""
    return bared(tiny_checkpoint("idefics2"), tmp_path / "idefics2")


def bared(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def rewrite(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def in_jinja(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


def in_json(folder: Path, text: str) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))


def in_processor(folder: Path, text: str) -> None:
    rewrite(folder / "processor_config.json", chat_template=text)


def in_tokenizer(folder: Path, text: str) -> None:
    rewrite(folder / "tokenizer_config.json", chat_template=text)


def among_named(folder: Path, text: str) -> None:
    named = [{"name": "rag", "template": RAG}, {"name": "default", "template": text}]
    rewrite(folder / "tokenizer_config.json", chat_template=named)


def among_named_of_processor(folder: Path, text: str) -> None:
    named = [{"name": "rag", "template": RAG}, {"name": "default", "template": text}]
    rewrite(folder / "processor_config.json", chat_template=named)


def in_folder(folder: Path, text: str) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text(RAG)
    (folder / "additional_chat_templates" / "default.jinja").write_text(text)


PLACES = {
    in_jinja: "chat_template.jinja",
    in_json: "chat_template.json",
    in_processor: "processor_config.json",
    in_tokenizer: "tokenizer_config.json",
    among_named: "tokenizer_config.json",
    among_named_of_processor: "processor_config.json",
    in_folder: "additional_chat_templates",
}


def prompt(loaded: LoadedModel) -> str:
    ids = PromptBuilder(loaded).prepare(*ASKED).tensors["input_ids"][0]
    return str(loaded.tokenizer.decode(ids))


def refusal(**settings: object) -> str:
    with pytest.raises(CannotStart) as refused:
        load(WorkerSettings(**settings))
    return str(refused.value)


@pytest.mark.parametrize(("put", "place"), PLACES.items(), ids=[put.__name__ for put in PLACES])
def test_a_template_is_found_wherever_the_checkpoint_keeps_it_and_its_place_is_told(
    put: Callable[[Path, str], None], place: str, bare: Path, tiny_checkpoint: Checkpoints
) -> None:
    expected = PromptBuilder(load(WorkerSettings(model=str(tiny_checkpoint("idefics2"))))).prepare(*ASKED)
    put(bare, IDEFICS_TURNS)
    loaded = load(WorkerSettings(model=str(bare)))
    assert loaded.capabilities.template_source == place
    inputs = PromptBuilder(loaded).prepare(*ASKED)
    assert inputs.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(inputs.tensors[name], expected.tensors[name]) for name in expected.tensors)


def test_the_processors_template_goes_before_the_tokenizers(bare: Path) -> None:
    in_tokenizer(bare, OTHER)
    in_processor(bare, IDEFICS_TURNS)
    assert prompt(load(WorkerSettings(model=str(bare)))).startswith("<s>User:")
    in_processor(bare, "  ")
    assert prompt(load(WorkerSettings(model=str(bare)))).startswith("<s>Other. User:"), "white space is no template"


@pytest.mark.parametrize("put", PLACES, ids=[put.__name__ for put in PLACES])
def test_the_operators_file_goes_before_every_place(
    put: Callable[[Path, str], None], bare: Path, tmp_path: Path
) -> None:
    put(bare, IDEFICS_TURNS)
    file = tmp_path / "own.jinja"
    file.write_bytes(b"\xef\xbb\xbf" + OTHER.encode())
    loaded = load(WorkerSettings(model=str(bare), chat_template=file))
    assert prompt(loaded).startswith("<s>Other. User:"), "without the mark that some editors write first"
    assert loaded.capabilities.template_source == f"VISIONQ_CHAT_TEMPLATE={file}"


def test_check_tells_where_the_template_came_from(bare: Path, tiny_checkpoint: Checkpoints) -> None:
    in_tokenizer(bare, IDEFICS_TURNS)
    assert "chat template        tokenizer_config.json\n" in check(WorkerSettings(model=str(bare)))
    git = check(WorkerSettings(model=str(tiny_checkpoint("git"))))
    assert "chat template        none; asked as GIT is\n" in git


@pytest.mark.parametrize("in_file", ["tokenizer_config.json", "processor_config.json", "additional_chat_templates"])
def test_named_templates_without_a_default_are_refused_by_their_names(in_file: str, bare: Path) -> None:
    if in_file == "additional_chat_templates":
        (bare / in_file).mkdir()
        for name in ("rag", "tool_use"):
            (bare / in_file / f"{name}.jinja").write_text(RAG)
    else:
        rewrite(bare / in_file, chat_template=[{"name": name, "template": RAG} for name in ("tool_use", "rag")])
    message = refusal(model=str(bare))
    assert message.startswith(f"VISIONQ_MODEL={bare}: the chat template in {in_file}: there are rag, tool_use and none")
    assert "VISIONQ_CHAT_TEMPLATE" in message


@pytest.mark.parametrize("content", [[1, 2], [{"name": "default"}], {"default": 7}, 7])
def test_what_is_no_template_is_refused_by_its_file(content: object, bare: Path) -> None:
    rewrite(bare / "processor_config.json", chat_template=content)
    assert "processor_config.json: it is neither text nor" in refusal(model=str(bare))


def test_a_checkpoints_broken_template_is_refused_by_its_file(bare: Path) -> None:
    in_tokenizer(bare, "{% for m in messages %}")
    message = refusal(model=str(bare))
    assert message.startswith(f"VISIONQ_MODEL={bare}: the chat template in tokenizer_config.json: not a Jinja template")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no such file"),
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"User: \xff\xfe", "not UTF-8 (byte 6)"),
        (b"x" * (MAX_TEMPLATE_BYTES + 1), f"{MAX_TEMPLATE_BYTES + 1} bytes, the limit is {MAX_TEMPLATE_BYTES}"),
        (b"a\n{% if x %}", "not a Jinja template: line 2: "),
        (b"{{ messages | no_such_filter }}", "not a Jinja template: line 1: No filter named 'no_such_filter'"),
        (b"{{" + b"(" * 5000 + b"1" + b")" * 5000 + b"}}", "not a Jinja template: "),
        (b"{% for a in b %}" * 30 + b"{% endfor %}" * 30, "not a Jinja template: "),
    ],
)
def test_an_operators_file_that_is_no_template_is_refused_by_the_variable(
    content: bytes | None, why: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    message = refusal(model=str(tiny_checkpoint("idefics2")), chat_template=file)
    assert message.startswith(f"VISIONQ_CHAT_TEMPLATE={file}: {why}")


def test_a_folder_or_a_device_is_no_template(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        assert "there is no such file" in refusal(model=str(tiny_checkpoint("idefics2")), chat_template=path)


#: Each raises an error of another kind when it is rendered.
FAILING = [
    "{{ 1 / 0 }}",
    "{{ range(10**9) | list }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ {}.x.y }}",
]


@pytest.mark.parametrize("failing", FAILING)
def test_a_template_that_fails_is_refused(failing: str, tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    (file := tmp_path / "own.jinja").write_text(IDEFICS_TURNS + failing)
    message = refusal(model=str(tiny_checkpoint("idefics2")), chat_template=file)
    assert f"does not show what a user says (VISIONQ_CHAT_TEMPLATE={file})" in message


@pytest.mark.parametrize("failing", FAILING)
def test_a_template_that_fails_for_one_conversation_refuses_that_one(
    failing: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    (file := tmp_path / "own.jinja").write_text(
        IDEFICS_TURNS + "{% if messages | length > 2 %}" + failing + "{% endif %}"
    )
    loaded = load(WorkerSettings(model=str(tiny_checkpoint("idefics2")), chat_template=file))
    assert "What is this?" in prompt(loaded)
    turns, media = ASKED
    with pytest.raises(InvalidRequest, match="messages: the model's chat template "):
        PromptBuilder(loaded).prepare(turns * 3, media * 3)


@pytest.mark.parametrize("text", ['{"chat_template": "x"}', "Hello", "{{ bos_token }}"])
def test_a_template_that_drops_what_a_user_says_is_refused(
    text: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    (file := tmp_path / "own.jinja").write_text(text)
    message = refusal(model=str(tiny_checkpoint("idefics2")), chat_template=file)
    assert f"does not show what a user says (VISIONQ_CHAT_TEMPLATE={file})" in message


@pytest.mark.parametrize(
    "text", [TEXT_ONLY, TEXT_ONLY.replace("m['content']", "m['content'] | tojson"), "{% for m in messages %}"
             "{{ m['content'] if m['content'] is string else '' }}{% endfor %}"]
)  # fmt: skip
def test_a_template_for_plain_text_shows_no_images_and_prints_no_lists(text: str, bare: Path) -> None:
    in_tokenizer(bare, text)
    loaded = load(WorkerSettings(model=str(bare)))
    assert (loaded.capabilities.image_token, loaded.capabilities.takes_parts) == (None, False)
    builder = PromptBuilder(loaded)
    with pytest.raises(InvalidRequest, match="this model's chat template shows no images, got 1"):
        builder.prepare(*ASKED)
    words = loaded.tokenizer.decode(builder.prepare((user("How many?"),), ()).tensors["input_ids"][0])
    assert "How many?" in words
    assert "type" not in words
    with pytest.raises(CannotStart, match="shows no images"):
        check(WorkerSettings(model=str(bare)))


@pytest.mark.parametrize("name", ["git", "blip2", "paligemma"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_captioner_whose_tokenizer_brings_a_template_is_asked_as_before(
    name: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    expected = PromptBuilder(load(WorkerSettings(model=str(tiny_checkpoint(name))))).prepare(*ASKED)
    for text in (TEXT_ONLY, RAG, IDEFICS_TURNS):
        own = bared(tiny_checkpoint(name), tmp_path / f"{name}-{len(text)}")
        in_tokenizer(own, text)
        loaded = load(WorkerSettings(model=str(own)))
        assert loaded.capabilities.captioner is not None
        inputs = PromptBuilder(loaded).prepare(*ASKED)
        assert all(torch.equal(inputs.tensors[tensor], expected.tensors[tensor]) for tensor in expected.tensors)


def test_an_operators_template_is_taken_for_a_captioner_too_and_must_show_images(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    (file := tmp_path / "own.jinja").write_text(RAG)
    can = load(WorkerSettings(model=str(tiny_checkpoint("paligemma")), chat_template=file)).capabilities
    assert (can.captioner, can.image_token) == (None, None)
    with pytest.raises(CannotStart, match="shows no images"):
        check(WorkerSettings(model=str(tiny_checkpoint("paligemma")), chat_template=file))
