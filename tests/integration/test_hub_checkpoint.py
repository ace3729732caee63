"""Checkpoints of a model hub, served here by a small HTTP server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worker.models.digests import folder_digest

pytestmark = pytest.mark.check

TOKEN = "hf_" + "T0ken" * 6
COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: Tells of every kind of file that a revision has one of its own.
TELL = """
import os
from worker.errors import CannotStart
from worker.models.loader import load
from worker.settings import WorkerSettings
for revision in os.environ["REVISIONS"].split(","):
    os.environ["VISIONQ_MODEL_REVISION"] = revision
    try:
        loaded = load(WorkerSettings())
    except CannotStart as error:
        print("refused:", str(error).replace(chr(10), " "))
        continue
    print(
        loaded.model.config.default_caption_prompt,
        float(loaded.model.lm_head.weight.sum()),
        loaded.model.generation_config.repetition_penalty,
        loaded.processor.image_processor.image_mean[0],
        loaded.tokenizer.model_max_length,
        loaded.processor.chat_template[:5],
        loaded.capabilities.template_source,
        sep="|",
    )
"""
#: Loads one model after the other, prints what came of each; one process for all, because its imports take seconds.
PROGRAM = """
import os
from worker.errors import CannotStart
from worker.models.loader import load
from worker.settings import WorkerSettings
for model in os.environ["MODELS"].split(","):
    os.environ["VISIONQ_MODEL"] = model
    try:
        print(type(load(WorkerSettings()).model).__name__)
    except CannotStart as error:
        print(str(error).replace(chr(10), " "))
"""
MODELS = ("nobody/tiny", "nobody/nothing-here", "nobody/gated", "nobody/pickled")


class Hub(ThreadingHTTPServer):
    """Serves `folder/<owner>/<name>/` at `/<owner>/<name>/resolve/main/`; `gated` repositories only say so."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Repositories)
        self.folder = folder
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Repositories(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        self.server.requests.append(self.path)
        self.server.tokens.add(self.headers["Authorization"])
        repository, _, file = self.path.partition("?")[0].lstrip("/").partition("/resolve/")
        folder = self.server.folder / repository
        path = folder / file.partition("/")[2]
        if "gated" in repository:
            self._send(403, {"X-Error-Code": "GatedRepo"})
        elif not folder.is_dir() and not repository.startswith("api/"):
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif not path.is_file():
            self._send(404, {"X-Error-Code": "EntryNotFound"})
        else:
            body = path.read_bytes()
            etag = f'"{hashlib.sha1(body, usedforsecurity=False).hexdigest()}"'
            self._send(200, {"X-Repo-Commit": COMMIT, "ETag": etag}, body, has_body=has_body)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", *, has_body: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Iterator[Hub]:
    """A hub with a whole checkpoint and one whose weights are pickles."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_checkpoint("llava"), folder / "nobody" / "tiny")
    pickled = Path(shutil.copytree(tiny_checkpoint("llava"), folder / "nobody" / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join(20)
    server.server_close()


def load(hub: Hub | None, directory: Path, program: str, **variables: str) -> list[str]:
    """Run a program in a process of its own, which reads the hub's address and token first; return its lines."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VISIONQ_")} | {
        "HF_ENDPOINT": hub.url if hub is not None else "http://127.0.0.1:9",
        "HF_HOME": str(directory / "home"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", **variables,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert TOKEN not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr, "a progress bar"
    return done.stdout.splitlines()


@dataclass(frozen=True, slots=True)
class Loads:
    """What PROGRAM printed of each model, in one process, what it asked the hub for, and the folder of its cache."""

    lines: dict[str, str]
    requests: tuple[str, ...]
    directory: Path


@pytest.fixture(scope="module")
def loads(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Loads:
    """One model that can be loaded, then those that cannot."""
    directory = tmp_path_factory.mktemp("loads")
    lines = load(hub, directory, PROGRAM, MODELS=",".join(MODELS))
    return Loads(dict(zip(MODELS, lines, strict=True)), tuple(hub.requests), directory)


def test_a_hub_id_is_downloaded_without_bars_and_then_loaded_without_the_hub(hub: Hub, loads: Loads) -> None:
    assert loads.lines["nobody/tiny"] == "LlavaForConditionalGeneration"
    assert f"Bearer {TOKEN}" in hub.tokens
    hub.requests.clear()
    again = load(hub, loads.directory, PROGRAM, MODELS="nobody/tiny", HF_HUB_OFFLINE="1")
    assert again == [loads.lines["nobody/tiny"]]
    assert hub.requests == []


def test_the_digest_of_a_hub_checkpoint_is_that_of_its_weights(hub: Hub, tmp_path: Path) -> None:
    """Also before they were ever loaded: else a run that is resumed later would start from other weights."""
    program = "from worker.models.digests import *; print(checkpoint_digest('tiny', 'nobody/tiny', None))"
    assert load(hub, tmp_path, program) == [folder_digest(hub.folder / "nobody" / "tiny")]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("nobody/nothing-here", "is not a local folder and is not a valid model identifier"),
        ("nobody/gated", "gated"),
    ],
)
def test_what_the_hub_does_not_give_is_refused(loads: Loads, model: str, reason: str) -> None:
    assert (
        f"VISIONQ_MODEL={model}: no such folder, nor a readable hub checkpoint (gated ones need" in loads.lines[model]
    )
    assert reason in loads.lines[model].partition("HF_TOKEN): ")[2]


def test_pickled_weights_of_a_hub_are_neither_loaded_nor_converted_elsewhere(loads: Loads) -> None:
    assert "VISIONQ_MODEL=nobody/pickled: its weights cannot be loaded: " in loads.lines["nobody/pickled"]
    requests = [path for path in loads.requests if "nobody/pickled" in path]
    assert requests[-1].endswith("/model.safetensors.index.json"), "something else was tried afterwards"
    assert not [path for path in loads.requests if "pytorch_model" in path]


#: Each name of a revision and the branch or tag whose files it leads to.
NAMED = {"": "main", "main": "main", "v1": "v1", "2" * 40: "v1", "1" * 40: "main"}


@dataclass(frozen=True, slots=True)
class TwoRevisions:
    """What TELL prints, in one process: expected of each revision, of each of `NAMED`, and of one that is not there."""

    expected: dict[str, str]
    found: list[str]
    refusal: str


def put_revision(home: Path, folder: Path, commit: str, name: str) -> None:
    """Lay a revision of `nobody/tiny` into the hub's cache, as its client does after a download."""
    repository = home / "hub" / "models--nobody--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / name).write_text(commit)


def rewrite(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def two_revisions(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> TwoRevisions:
    """A cache with `main` and `v1`, which differ in every file."""
    tmp_path, told = tmp_path_factory.mktemp("revisions"), {}
    for number, (name, place) in enumerate({"main": "tokenizer_config.json", "v1": "chat_template.jinja"}.items(), 1):
        folder = Path(shutil.copytree(tiny_checkpoint("llava"), tmp_path / name))
        template = f"T{number}: " + (folder / "chat_template.jinja").read_text()
        rewrite(folder / "config.json", default_caption_prompt=f"prompt {number}")
        rewrite(folder / "generation_config.json", repetition_penalty=1.0 + number)
        rewrite(folder / "tokenizer_config.json", model_max_length=1000 + number)
        processor = json.loads((folder / "processor_config.json").read_text())
        processor["image_processor"]["image_mean"] = [number / 4] * 3
        (folder / "processor_config.json").write_text(json.dumps(processor))
        weights = load_file(folder / "model.safetensors")
        head = next(key for key in weights if "lm_head" in key)
        weights[head] = torch.full_like(weights[head], float(number))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        if place == "chat_template.jinja":
            (folder / place).write_text(template)
        else:
            (folder / "chat_template.jinja").unlink()
            rewrite(folder / place, chat_template=template)
        put_revision(tmp_path / "home", folder, f"{number}" * 40, name)
        total = float(number * weights[head].numel())
        told[name] = f"prompt {number}|{total}|{1.0 + number}|{number / 4}|{1000 + number}|T{number}: <|{place}"
    expected = {name: line.replace("<|", template[4:5] + "|", 1) for name, line in told.items()}
    variables = {"VISIONQ_MODEL": "nobody/tiny", "REVISIONS": ",".join((*NAMED, "v2")), "HF_HUB_OFFLINE": "1"}
    *found, refusal = load(None, tmp_path, TELL, **variables)
    return TwoRevisions(expected, found, refusal)


def test_every_file_of_a_hub_checkpoint_is_read_at_the_named_revision(two_revisions: TwoRevisions) -> None:
    assert two_revisions.found == [two_revisions.expected[name] for name in NAMED.values()]


def test_a_revision_that_the_hub_does_not_have_is_refused_by_the_variable(two_revisions: TwoRevisions) -> None:
    assert two_revisions.refusal.startswith(
        "refused: VISIONQ_MODEL=nobody/tiny: no such folder, nor a readable hub checkpoint"
    )
    assert "at VISIONQ_MODEL_REVISION=v2" in two_revisions.refusal
