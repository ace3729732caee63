"""A docstring says what a thing is; one that only points elsewhere says nothing."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_docstring_of_the_producer_side_only_points_elsewhere() -> None:
    pointing = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "api_stub").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.lstrip().startswith('"""See ')
    ]
    assert pointing == []
