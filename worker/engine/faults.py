"""What went wrong with a step, for those who wait for its answers."""

from __future__ import annotations

import torch

from api_stub.contract.error import ErrorCode, ErrorInfo
from worker.errors import WorkerError


class Unsuited(Exception):
    """Raised when a KV back end cannot serve a model, with the reason."""


def error_info(error: Exception, where: str) -> ErrorInfo:
    """Say what went wrong without the exception's own words, which may quote data."""
    if isinstance(error, WorkerError):
        return error.info()
    if is_out_of_memory(error):
        return ErrorInfo.of(ErrorCode.OUT_OF_MEMORY, f"{where} did not fit into the device's memory")
    return ErrorInfo.of(ErrorCode.INTERNAL, f"{where} failed: {type(error).__name__}")


def is_out_of_memory(error: Exception) -> bool:
    """Say whether less at a time might fit."""
    # PyTorch's CPU allocator and cuBLAS' workspaces raise a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
