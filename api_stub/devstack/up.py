"""`visionq up`: the local stack, its endpoints in a file that a shell can source, until a signal."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from api_stub.devstack.child import StackFailed
from api_stub.devstack.signals import StopSignals
from api_stub.devstack.stack import Stack, StackOptions

HEADER = "# Endpoints of a running `visionq up`; the file goes when the stack goes."


def run_up(options: StackOptions, env_file: Path | None, say: Callable[[str], None]) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Main thread only.

    `say` gets lines for a person. Raises StackFailed when the stack cannot start or a server of it ends,
    Interrupted when a signal comes before it serves.
    """
    if env_file is not None:
        claim(env_file)
    with StopSignals() as signals, Stack(options, signals) as stack:
        say("starting Redis, S3, the workers and the gateway …")
        stack.start()
        with nullcontext() if env_file is None else published(env_file, stack):
            say(_ready(stack, env_file))
            stack.stay()
    say("everything has been stopped")


def claim(env_file: Path) -> None:
    """Remove what an earlier `up` left under this name. Raises StackFailed when the file is somebody else's."""
    try:
        with env_file.open() as file:
            is_ours = file.readline().rstrip("\n") == HEADER
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError):
        is_ours = False
    if not is_ours:
        raise StackFailed(f"{env_file} exists and was not written by `visionq up`; it is left alone")
    env_file.unlink()


@contextmanager
def published(env_file: Path, stack: Stack) -> Iterator[None]:
    """Keep the stack's endpoints in `env_file` while the block runs, also when it ends by SIGKILL."""
    stack.cleanup_process.send("remove", str(env_file.absolute()))
    try:
        write_exports(env_file, stack.endpoints)
        yield
    except OSError as error:
        raise StackFailed(f"cannot write {env_file}: {error}") from error
    finally:
        env_file.unlink(missing_ok=True)


def exports(variables: Mapping[str, str]) -> str:
    """Return lines that a POSIX shell can source."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def write_exports(path: Path, variables: Mapping[str, str]) -> None:
    """Write a file that only its owner reads and that nobody ever sees half written. Raises OSError."""
    # mkstemp makes the file with mode 0600; a rename within one directory is atomic.
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{HEADER}\n{exports(variables)}")
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _ready(stack: Stack, env_file: Path | None) -> str:
    workers = "1 worker" if stack.options.num_workers == 1 else f"{stack.options.num_workers} workers"
    how = exports(stack.endpoints) if env_file is None else f"  . {shlex.quote(str(env_file))}\n"
    url = stack.endpoints.get("VISIONQ_API_URL")
    workers += ", one that trains" if stack.options.training else ""
    parts = f"Redis, S3 and {workers}" + (f", gateway at {url}" if url else "")
    return f"ready: {parts}; in another terminal:\n{how}Ctrl-C stops it; logs are in {stack.directory}"
