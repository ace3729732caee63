"""Checkpoints of a model hub, served here by a small HTTP server that answers as the hub does."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TOKEN = "hf_" + "T0ken" * 6
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import sys
from worker.errors import CannotStart
from worker.models.loader import load
from worker.settings import WorkerSettings
try:
    print(type(load(WorkerSettings()).model).__name__)
except CannotStart as error:
    sys.exit(str(error))
"""


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


@pytest.fixture
def hub(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Iterator[Hub]:
    """A hub with a whole checkpoint and one whose weights are pickles."""
    folder = tmp_path / "hub"
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


def load(hub: Hub, tmp_path: Path, model: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Load `model` in a process of its own, which reads the hub's address and token when it starts."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "VISIONQ_MODEL": model,
        "HF_HUB_OFFLINE": "0", **variables,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_a_hub_id_is_downloaded_without_bars_and_then_loaded_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    first = load(hub, tmp_path, "nobody/tiny")
    assert first.stdout.strip() == "LlavaForConditionalGeneration", first.stderr
    assert "%|" not in first.stderr
    assert f"Bearer {TOKEN}" in hub.tokens
    hub.requests.clear()
    second = load(hub, tmp_path, "nobody/tiny", HF_HUB_OFFLINE="1")
    assert second.stdout == first.stdout
    assert hub.requests == []


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("nobody/nothing-here", "is not a local folder and is not a valid model identifier"),
        ("nobody/gated", "gated"),
    ],
)
def test_what_the_hub_does_not_give_is_refused(hub: Hub, tmp_path: Path, model: str, reason: str) -> None:
    done = load(hub, tmp_path, model)
    assert done.returncode == 1
    assert f"VISIONQ_MODEL={model}: no such folder, nor a readable hub checkpoint (gated ones need" in done.stderr
    assert reason in done.stderr.splitlines()[-1].partition("HF_TOKEN): ")[2]


def test_pickled_weights_of_a_hub_are_neither_loaded_nor_converted_elsewhere(hub: Hub, tmp_path: Path) -> None:
    done = load(hub, tmp_path, "nobody/pickled")
    assert done.returncode == 1
    assert "VISIONQ_MODEL=nobody/pickled: its weights cannot be loaded: " in done.stderr
    assert hub.requests[-1].endswith("/model.safetensors.index.json"), "something else was tried afterwards"
    assert not [path for path in hub.requests if "pytorch_model" in path]
