"""A docstring says what a thing is; one that only points elsewhere says nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@pytest.mark.parametrize("package", ["api_stub", "worker"])
def test_no_docstring_only_points_elsewhere(package: str) -> None:
    pointing = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, Documented) and (ast.get_docstring(node) or "").startswith("See ")
    ]
    assert pointing == []
