"""Tells what it finds in its process as a line of JSON, then ends as told: `python -m tests.structure.ending HOW`."""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path


def facts() -> dict[str, object]:
    """What must not differ between an executed process and a forked one."""
    root = logging.getLogger()
    descriptors = {path.name: str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return {
        "argv": sys.argv,
        "name": __name__,
        "path": sys.path[0],
        "directory": str(Path.cwd()),
        "environment": dict(os.environ),
        "temporary": tempfile.gettempdir(),
        "leads_session": os.getsid(0) == os.getpid() == os.getpgrp(),
        "signals": {number.name: str(signal.getsignal(number)).partition(" at ")[0] for number in signal.valid_signals()
                    if isinstance(number, signal.Signals)},
        "blocked": sorted(blocked),
        "threads": [thread.name for thread in threading.enumerate()],
        "tasks": len(list(Path("/proc/self/task").iterdir())),
        "descriptors": {name: target for name, target in descriptors.items() if not target.startswith("/proc/")},
        "logging": [root.level, len(root.handlers), logging.getLogger("worker").level],
        "hooks": [sys.excepthook is sys.__excepthook__, threading.excepthook is threading.__excepthook__],
    }  # fmt: skip


def main() -> None:
    """Tell, then end."""
    sys.stdout.write(json.dumps(facts()) + "\n")
    match sys.argv[1]:
        case "return":
            atexit.register(sys.stdout.write, "last words\n")
            threading.Thread(target=lambda: (time.sleep(0.2), sys.stdout.write("waited for\n"))).start()
        case "status":
            sys.exit(3)
        case "words":
            sys.exit("it cannot start")
        case "error":
            raise ValueError("a traceback")
        case "at once":
            os._exit(4)
        case "SIGTERM" | "SIGKILL" | "SIGINT" as name:
            sys.stdout.flush()
            signal.raise_signal(signal.Signals[name])


if __name__ == "__main__":
    main()
