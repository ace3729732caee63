"""A process of the last release."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
WHEEL = FOLDER / "visionq-0.1.0-py3-none-any.whl"


def environment(**more: str) -> dict[str, str]:
    """Variables with which a child finds the last release's packages before this one's."""
    return os.environ | {"PYTHONPATH": str(WHEEL), "PYTHONWARNINGS": "ignore"} | more


class Earlier:
    """Runs code in a process that has the last release's `api_stub`, with its client, ledger and doorbells open."""

    def __init__(self, redis_url: str, **config: object) -> None:
        command = [sys.executable, str(FOLDER / "child.py"), redis_url, json.dumps(config)]
        self._process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, code: str, **given: object) -> Any:
        """Run code that sets `answer`, or one expression; return the answer's JSON form.

        Errors come out as AssertionError.
        """
        code = textwrap.dedent(code)
        if "answer =" not in code:
            code = f"answer = {code.strip()}"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"code": code, "given": given}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process ended with {self._process.wait(10)}"
        said = json.loads(line)
        assert "error" not in said, said["error"]
        return said["answer"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()
