"""The whole service on one machine without Docker: real Redis, S3 and workers as child processes.

Knows how to start, watch and end programs; knows nothing of jobs. The workers are started as a command, never imported.
"""

from api_stub.devstack.child import StackFailed
from api_stub.devstack.servers import find_redis
from api_stub.devstack.signals import Interrupted, StopSignals, exit_status
from api_stub.devstack.stack import Stack, StackOptions
from api_stub.devstack.up import run_up

__all__ = [
    "Interrupted",
    "Stack",
    "StackFailed",
    "StackOptions",
    "StopSignals",
    "exit_status",
    "find_redis",
    "run_up",
]
