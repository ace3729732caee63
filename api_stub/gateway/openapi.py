"""The OpenAPI 3.1 document: what FastAPI finds out by itself, and the bodies, errors and examples that it cannot."""

from __future__ import annotations

from fastapi import FastAPI


def describe(app: FastAPI) -> None:
    """Let the app's document say all that a client needs."""
