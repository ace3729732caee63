"""Give up what a decoder does not need: memory, processor time, files, network, other programs, a life of its own.

Resource limits and the tie to the parent's life are plain POSIX and Linux; what the kernel may refuse to the decoder
beyond that is in `seccomp`. On other systems than Linux, where workers only run for development, nothing is given up.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
from typing import Final

from pydantic import BaseModel, ConfigDict

from worker.media.seccomp import forbid_system_calls

_PR_SET_PDEATHSIG: Final = 1
_MAX_FILES: Final = 64


class Confinement(BaseModel):
    """What a decoder may have. `parent` is the process it must not outlive."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parent: int
    memory_bytes: int


def confine(confinement: Confinement) -> None:
    """Confine this process for good; everything it needs must be loaded by now."""
    if sys.platform != "linux":
        return
    _die_with(confinement.parent)
    for kind, limit in (
        (resource.RLIMIT_AS, confinement.memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _MAX_FILES),
    ):
        resource.setrlimit(kind, (limit, limit))
    forbid_system_calls()


def limit_cpu_time(seconds: float) -> None:
    """Allow this process so much more processor time; above it the kernel ends it, also when its parent is frozen."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + seconds) + 1, hard))


def _die_with(parent: int) -> None:
    """End with the thread that started us (prctl(2), PR_SET_PDEATHSIG): an endless loop never sees that stdin ended."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(0)
