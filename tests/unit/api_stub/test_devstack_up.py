"""The file with the endpoints: whole or absent, private, and never somebody else's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from api_stub.devstack import StackFailed
from api_stub.devstack.up import HEADER, claim, write_exports


def test_a_shell_reads_back_every_value(tmp_path: Path) -> None:
    values = {"A": "plain", "B": 'it\'s $HOME `id` "x" \\', "C": "two\nlines", "D": ""}
    write_exports(tmp_path / "stack.env", values)
    command = f'. "{tmp_path}/stack.env"; printf "%s|" "$A" "$B" "$C" "$D"'
    assert subprocess.check_output(["sh", "-c", command], text=True) == "|".join(values.values()) + "|"


def test_only_the_owner_reads_the_file_and_no_draft_is_left(tmp_path: Path) -> None:
    write_exports(tmp_path / "stack.env", {"A": "b"})
    assert [path.name for path in tmp_path.iterdir()] == ["stack.env"]
    assert (tmp_path / "stack.env").stat().st_mode & 0o777 == 0o600


def test_a_file_of_an_earlier_stack_is_removed_at_once(tmp_path: Path) -> None:
    write_exports(tmp_path / "stack.env", {"A": "old"})
    assert (tmp_path / "stack.env").read_text().startswith(HEADER)
    claim(tmp_path / "stack.env")
    assert not (tmp_path / "stack.env").exists()
    claim(tmp_path / "stack.env")


@pytest.mark.parametrize("content", [b"export PATH=/bin\n", b"", b"\xff\xfe"])
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".profile").write_bytes(content)
    with pytest.raises(StackFailed, match="left alone"):
        claim(tmp_path / ".profile")
    assert (tmp_path / ".profile").read_bytes() == content


def test_a_directory_is_no_place_for_endpoints(tmp_path: Path) -> None:
    with pytest.raises(StackFailed, match="left alone"):
        claim(tmp_path)
