"""The whole service on one machine without Docker: real Redis, S3 and workers as child processes.

Knows how to start, watch and end programs; knows nothing of jobs. The workers are started as a command, never imported.
"""

from api_stub.devstack.child import StackFailed
from api_stub.devstack.servers import find_redis
from api_stub.devstack.signals import Interrupted, StopSignals
from api_stub.devstack.stack import Stack, StackOptions, without_proxy
from api_stub.devstack.up import run_up

__all__ = [
    "Interrupted",
    "Stack",
    "StackFailed",
    "StackOptions",
    "StopSignals",
    "find_redis",
    "run_up",
    "without_proxy",
]
