"""Runs one broken worker under the supervisor: `python -m tests.e2e.broken_supervisor`. Like it, it loads no torch."""

from __future__ import annotations

import os
import sys

from worker.lifecycle.supervisor import Supervisor, parse_devices
from worker.observability.logging import configure_logging
from worker.settings import WorkerSettings


def main() -> None:
    settings = WorkerSettings()
    configure_logging(settings.log_format, settings.log_level)
    command = [sys.executable, "-m", "tests.e2e.broken_worker"]
    sys.exit(Supervisor(command, parse_devices("cpu", None), os.environ, settings).run())


if __name__ == "__main__":
    main()
