"""Import floors and file lengths, among the quick tests: neither breaks unseen between two runs of `make check`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 300


def test_imports_go_down_the_floors_only() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    checked = subprocess.run(
        [program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert " kept, 0 broken." in checked.stdout


@pytest.mark.parametrize("package", ["api_stub", "worker"])
def test_no_file_is_longer_than_300_lines(package: str) -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for pattern in ("*.py", "*.lua")
        for path in (ROOT / package).rglob(pattern)
    }
    assert lengths
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
