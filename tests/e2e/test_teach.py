"""The commands of docs/teach-it-your-captions.md, with fewer pictures and steps: each does what the page says."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.processes import ctrl_c_is_heard
from tests.servers import eventually
from tests.structure.pages import DOCS, ROOT, blocks_of

pytestmark = pytest.mark.check

#: What is smaller here than on the page.
SMALLER: Final = {"--count 2000": "--count 40", "--max-steps 1200": "--max-steps 2", "checkpoint-1200": "checkpoint-2"}
UP_S: Final = 120.0


def test_the_five_commands_draw_check_train_evaluate_and_serve(tmp_path: Path) -> None:
    (block,) = (block for block in blocks_of(DOCS / "teach-it-your-captions.md") if block.language == "bash")
    code = block.code
    for wanted, smaller in SMALLER.items():
        assert wanted in code
        code = code.replace(wanted, smaller)
    *commands, serve = code.splitlines()
    assert len(commands) == 4
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VISIONQ_", "AWS_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)

    def run(command: str) -> str:
        done = subprocess.run(
            shlex.split(command),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
        return done.stdout

    said = [run(command) for command in commands]
    assert len(list((tmp_path / "german").glob("*.png"))) == 40
    assert "36 rows to train, 4 to validate" in said[1]
    assert (tmp_path / "mine" / "checkpoint-2" / "model.safetensors").is_file()
    assert re.search(r"^all +4 .*\d\.\d+", said[3], re.MULTILINE), said[3]
    run("visionq draw scene.png")
    with ctrl_c_is_heard():
        up = subprocess.Popen(
            [*shlex.split(serve), "--env-file", "stack.env"], cwd=tmp_path, env=environment, start_new_session=True
        )
    try:
        eventually(lambda: (tmp_path / "stack.env").exists() or up.poll() is not None, UP_S, "the stack is up")
        assert up.poll() is None
        assert run("bash -c 'set -a; . ./stack.env; exec visionq caption scene.png'")
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(60) is not None
