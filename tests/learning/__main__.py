"""Run the fine-tunings that are named, all without names; status 1 when a figure misses its limit."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.learning import captioner, chat, qlora
from tests.learning.report import Report
from tests.learning.stack import Stack, say, stack

RUNS: Final[Mapping[str, Callable[[Stack], Report]]] = {
    "captioner": captioner.run,
    "chat": chat.run,
    "qlora": qlora.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.learning", description=__doc__)
    parser.add_argument("runs", nargs="*", choices=[[], *RUNS], help="default: all of them, one after the other")
    names = parser.parse_args(argv).runs or list(RUNS)
    reports = []
    for name in names:
        began = time.monotonic()
        directory = Path(tempfile.mkdtemp(prefix=f"visionq-learning-{name}-"))
        say(f"{name}: logs in {directory}")
        with stack(directory) as servers:
            reports.append(RUNS[name](servers))
        reports[-1].notes.append(f"{(time.monotonic() - began) / 60:.1f} minutes in all")
    say("\n".join(line for report in reports for line in report.lines()))
    return 0 if all(report.is_met for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
