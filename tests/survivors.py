"""Finds what a program left behind: processes and directories that were given a certain TMPDIR."""

from __future__ import annotations

from pathlib import Path


def processes_of(directory: Path) -> list[str]:
    """Return the command lines of living processes whose environment or arguments name `directory`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            is_zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if str(directory).encode() in words and not is_zombie:
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended while we looked
    return found
