"""The sandbox of a decoder process: limits on memory, CPU time and files, and no network, programs or writes.

Resource limits and PR_SET_PDEATHSIG, which ends the process with its parent, work on every Linux. On x86-64 and arm64 a
seccomp filter also forbids opening sockets, starting programs and changing files; elsewhere, or where the kernel
refuses filters, these stay allowed. Outside Linux, where workers run for development only, there is no sandbox. System
call
numbers: the kernel's syscall_64.tbl and asm-generic/unistd.h. Filter programs: the kernel's seccomp_filter
documentation.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import platform
import resource
import signal
import struct
import sys
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, ConfigDict

_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_RET_ALLOW: Final = 0x7FFF0000
_RET_ERRNO: Final = 0x00050000
_RET_KILL_PROCESS: Final = 0x80000000
# struct seccomp_data: nr, arch, instruction pointer, six arguments of 64 bits.
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_ABOVE, _JUMP_IF_ANY, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_INSTRUCTION: Final = struct.Struct("=HBBI")
#: Numbers from here on are the 32-bit forms of x86-64's calls (x32).
_HIGHEST_NUMBER: Final = 0x3FFFFFFF
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_PR_SET_PDEATHSIG: Final = 1
_MAX_FILES: Final = 64


@dataclass(frozen=True, slots=True)
class _Architecture:
    """`forbidden`: numbers of calls that always fail. `opening`: calls that open files, with the index of their
    flags.
    """

    audit: int
    forbidden: tuple[int, ...]
    opening: tuple[tuple[int, int], ...]


# By name, in this order: socket connect accept sendto recvfrom sendmsg recvmsg bind listen socketpair accept4 recvmmsg
# sendmmsg | fork vfork execve execveat ptrace process_vm_readv process_vm_writev | kill tkill pidfd_send_signal
# pidfd_open pidfd_getfd | rename mkdir rmdir creat link unlink symlink chmod chown, their -at forms, truncate |
# mount umount2 chroot unshare setns bpf io_uring_setup io_uring_enter userfaultfd perf_event_open keyctl openat2
_X86_64: Final = _Architecture(
    audit=0xC000003E,
    forbidden=(
        41, 42, 43, 44, 45, 46, 47, 49, 50, 53, 288, 299, 307, 57, 58, 59, 322, 101, 310, 311, 62, 200, 424, 434, 438,
        82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 258, 260, 263, 264, 265, 266, 268, 316, 76,
        165, 166, 161, 272, 308, 321, 425, 426, 323, 298, 250, 437,
    ),
    opening=((2, 1), (257, 2)),
)  # fmt: skip
_ARM64: Final = _Architecture(
    audit=0xC00000B7,
    forbidden=(
        198, 203, 202, 206, 207, 211, 212, 200, 201, 199, 242, 243, 269, 221, 281, 117, 270, 271, 129, 130, 424, 434,
        438, 34, 35, 36, 37, 38, 52, 53, 54, 55, 276, 45, 40, 39, 51, 97, 268, 280, 425, 426, 282, 241, 219, 437,
    ),
    opening=((56, 2),),
)  # fmt: skip
_ARCHITECTURES: Final = {"x86_64": _X86_64, "aarch64": _ARM64}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid_system_calls() -> bool:
    """Install the filter for this process and its future threads, for good; return whether the kernel accepted it."""
    architecture = _ARCHITECTURES.get(platform.machine())
    if architecture is None:
        return False
    code = _filter(architecture)
    program = _Program(len(code) // _INSTRUCTION.size, code)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0)


def _filter(architecture: _Architecture) -> bytes:
    """Return the filter program. Forbidden calls fail with EPERM and do not end the process: some codecs try one."""
    refuse = (_RETURN, 0, 0, _RET_ERRNO | errno.EPERM)
    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_IF_EQUAL, 1, 0, architecture.audit),
        (_RETURN, 0, 0, _RET_KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_IF_ABOVE, 0, 1, _HIGHEST_NUMBER),
        refuse,
    ]
    for number in architecture.forbidden:
        instructions += [(_JUMP_IF_EQUAL, 0, 1, number), refuse]
    for number, argument in architecture.opening:
        flags_at = 16 + 8 * argument
        instructions += [
            (_JUMP_IF_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, flags_at),
            (_JUMP_IF_ANY, 0, 1, _WRITING),
            refuse,
            (_RETURN, 0, 0, _RET_ALLOW),
        ]
    instructions.append((_RETURN, 0, 0, _RET_ALLOW))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


class Confinement(BaseModel):
    """The limits of a decoder. It ends with the process `parent`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parent: int
    memory_bytes: int


def confine(confinement: Confinement) -> None:
    """Enter the sandbox, for good; every module must be imported by now."""
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
    """Allow this process `seconds` more CPU time; then the kernel ends it, also when its parent hangs."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + seconds) + 1, hard))


def _die_with(parent: int) -> None:
    """Have the kernel end this process with the thread that started it (prctl(2)): in an endless loop it would not
    notice that stdin was closed.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(0)
