"""`python -m tests.corpus [-v]`: the table of what became of every file, and times and memory in one line."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.conftest import S3_CREDENTIALS
from tests.corpus.run import all_cases, run
from tests.corpus.traps import set_traps
from tests.decoding import LIMITS
from tests.servers import S3Server
from worker.media.decoders import Decoders


def main() -> int:
    os.environ.update(S3_CREDENTIALS)
    with tempfile.TemporaryDirectory() as directory, set_traps(Path(directory)) as traps:
        storage, decoders = S3Server(Path(directory)), Decoders(2, LIMITS)
        try:
            report = run(all_cases(traps), decoders, storage.client(), storage.url)
        finally:
            decoders.close()
            storage.stop()
        for one in report.handled:
            if "-v" in sys.argv or not one.is_right:
                line = f"{one.case.name:42} {one.seconds:6.2f} s  {one.outcome:18} {one.words[:120]}"
                sys.stdout.write(f"{line}\n")
        bait = f"connections {traps.num_connections}, openings of the secret file {traps.num_openings}"
        sys.stdout.write(f"{report}; {bait}\n")
    return sum(not one.is_right for one in report.handled)


if __name__ == "__main__":
    sys.exit(main() > 0)
