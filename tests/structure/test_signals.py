"""Whoever tests Ctrl-C has it heard, however the tests themselves were started."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent

SENDS_ITSELF = """
import os, signal
with ctrl_c_is_heard():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        heard = True
assert heard
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
"""
SENDS_ITS_CHILD = """
import signal, subprocess, sys
with ctrl_c_is_heard():
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"], stdout=-1)
child.stdout.readline()
child.send_signal(signal.SIGINT)
assert child.wait(30) == -signal.SIGINT
"""


@pytest.mark.parametrize("program", [SENDS_ITSELF, SENDS_ITS_CHILD])
def test_ctrl_c_is_heard_where_sigint_is_inherited_as_ignored(program: str) -> None:
    python = [sys.executable, "-c", f"from tests.processes import ctrl_c_is_heard\n{program}"]
    subprocess.run(["sh", "-c", 'trap "" INT; exec "$@"', "sh", *python], cwd=ROOT, timeout=60, check=True)


def test_every_test_that_sends_sigint_has_it_heard() -> None:
    sends = re.compile(r"(send_signal|kill|killpg|raise_signal)\(.*SIGINT")
    sending = [path for path in TESTS.rglob("test_*.py") if path != Path(__file__) and sends.search(path.read_text())]
    assert len(sending) >= 4
    assert [path.name for path in sending if "ctrl_c_is_heard()" not in path.read_text()] == []
