"""Every row of docs/celery.md names a test that exists."""

from __future__ import annotations

import re

from tests.structure.pages import DOCS, ROOT

PAGE = DOCS / "celery.md"
ROW = re.compile(r"^\| (?!of Celery|---)(?P<what>.*?) \| .* \| `(?P<file>tests/[\w/]+\.py)(?:::(?P<name>\w+))?` \|$")


def test_every_row_names_a_test_that_exists() -> None:
    rows = [
        line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ") and "of Celery |" not in line
    ]
    assert len(rows) >= 15
    for line in rows:
        row = ROW.match(line)
        assert row, line
        source = (ROOT / row["file"]).read_text("utf-8")
        assert row["name"] is None or f"\ndef {row['name']}(" in source, line
