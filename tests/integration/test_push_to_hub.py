"""`visionq models push`: a checkpoint goes to a hub, played here by a small HTTP server, and no pickle goes along."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.check

TOKEN = "hf_" + "T0ken" * 6
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "owner/captions"
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/short.jinja"}


class Hub(ThreadingHTTPServer):
    """Takes one repository's commits, and keeps what came. `refuses`: the status of every answer, 0 for none."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Repositories)
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, object]] = []
        self.tokens: set[str | None] = set()
        self.refuses = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Repositories(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            return self._send(self.server.refuses, {"error": "no write access"})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._send(200, {"url": f"{self.server.url}/{REPO}"})
        if self.path == f"/api/models/{REPO}/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        if re.fullmatch(rf"/api/models/{REPO}/commit/main(\?.*)?", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._send(
                200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.url}/{REPO}/commit/{COMMIT}"}
            )
        return self._send(404, {"error": f"unknown: {self.path}"})

    def do_GET(self) -> None:
        self._send(self.server.refuses or 404, {"error": f"unknown: {self.path}"})

    def _send(self, status: int, answer: object) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join(20)
    server.server_close()


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Path:
    """A checkpoint as a Trainer leaves it, with the state of the optimizer as a pickle beside it."""
    folder = tmp_path / "checkpoint-10"
    shutil.copytree(tiny_checkpoint("git"), folder)
    for name in ("optimizer.pt", "training_args.bin", "run.py"):
        (folder / name).write_bytes(b"not for others")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    (folder / "state").mkdir()
    (folder / "state" / "optimizer.safetensors").write_bytes(b"nor this")
    return folder


def push(hub: Hub, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder.parent / "hf"),
    }  # fmt: skip
    command = [sys.executable, "-c", "from api_stub.cli.main import main; main()", "models", "push", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_what_is_served_goes_to_the_hub_and_nothing_else(hub: Hub, checkpoint: Path) -> None:
    done = push(hub, str(checkpoint), "--to-hub", REPO, "--json", folder=checkpoint)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["url"] == f"{hub.url}/{REPO}"
    assert answer["commit"] == COMMIT
    assert set(answer["files"]) == set(hub.files) >= WANTED
    assert not {"optimizer.pt", "training_args.bin", "run.py", "state/optimizer.safetensors"} & set(hub.files)
    assert all(content == (checkpoint / name).read_bytes() for name, content in hub.files.items())
    assert [(each["name"], each["visibility"]) for each in hub.created] == [("captions", "private")]
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_a_new_repository_is_public_when_it_shall_be(hub: Hub, checkpoint: Path) -> None:
    assert push(hub, str(checkpoint), "--to-hub", REPO, "--public", folder=checkpoint).returncode == 0
    assert [each["visibility"] for each in hub.created] == ["public"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("pickled", "no .safetensors"),
        ("nobody/nothing", "is no folder and no s3:// checkpoint"),
        ("/nowhere", "there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_passed_on_is_refused_by_name(hub: Hub, checkpoint: Path, source: str, problem: str) -> None:
    if source == "pickled":
        (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
        source = str(checkpoint)
    done = push(hub, source, "--to-hub", REPO, folder=checkpoint)
    assert done.returncode == 2
    assert problem in done.stderr
    assert source in done.stderr
    assert hub.created == []


@pytest.mark.parametrize(("status", "exit_status"), [(403, 2), (503, 3)])
def test_a_hub_that_refuses_is_told_without_the_token(
    hub: Hub, checkpoint: Path, status: int, exit_status: int
) -> None:
    hub.refuses = status
    done = push(hub, str(checkpoint), "--to-hub", REPO, folder=checkpoint)
    assert done.returncode == exit_status
    assert f"the hub refuses {REPO}" in done.stderr
    assert TOKEN not in done.stderr + done.stdout


def test_a_hub_that_is_away_may_be_asked_again(hub: Hub, checkpoint: Path) -> None:
    hub.server_close()
    done = push(hub, str(checkpoint), "--to-hub", REPO, folder=checkpoint)
    assert done.returncode == 3, done.stderr
    assert "the hub does not answer" in done.stderr
