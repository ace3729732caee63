"""Where the worker's program is: that of the distribution visionq-worker, never another package of the name `worker`.

Celery projects often have a `worker` of their own, as a module or a package, where Python would find it first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from api_stub.devstack.child import StackFailed

DISTRIBUTION = "visionq-worker"


def worker_command(module: str, search_path: Sequence[str] | None = None) -> list[str]:
    """Return the command that runs a module of the worker, `worker.cli` for example, in a process of its own.

    `search_path`: where the child looks for modules; by default what it will be. Raises StackFailed when visionq-worker
    is not installed, or when another package of its name would run.
    """
    try:
        installed = distribution(DISTRIBUTION)
    except PackageNotFoundError as error:
        raise StackFailed(f"no worker: {DISTRIBUTION} is not installed; pip install {DISTRIBUTION}") from error
    # A checkout, too, has the worker beside this package.
    ours = {Path(str(installed.locate_file("worker"))).resolve(), Path(__file__).resolve().parents[2] / "worker"}
    spec = PathFinder.find_spec("worker", _childs_path() if search_path is None else search_path)
    found = [Path(folder).resolve() for folder in spec.submodule_search_locations or ()] if spec is not None else []
    if not found and spec is not None and spec.origin is not None:
        found = [Path(spec.origin).resolve()]
    if not found or found[0] not in ours:
        place = found[0] if found else "nowhere"
        raise StackFailed(
            f"no worker: Python finds the package `worker` of {DISTRIBUTION} not in its place but at {place}; "
            f"take that from PYTHONPATH, or install {DISTRIBUTION} again"
        )
    return [sys.executable, "-P", "-m", module]


def _childs_path() -> list[str]:
    """Return sys.path as a child with `-P` has it: without the folder of this program's script or the current one."""
    return sys.path if sys.flags.safe_path else sys.path[1:]
