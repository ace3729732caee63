"""The playground: a page of plain files that uses the public API and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastapi import APIRouter, Response
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FILES: Final = Path(__file__).parent.parent / "static"
#: Previews are made in the browser: pictures from data, clips from files the user chose.
POLICY: Final = (
    "default-src 'self'; img-src 'self' data: blob:; media-src blob:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'"
)

router = APIRouter(include_in_schema=False)


class PageFiles(StaticFiles):
    """The page's files; a browser asks whether they have changed instead of trusting an old copy."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return a file."""
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


@router.head("/")
@router.get("/")
async def playground() -> Response:
    """Return the page."""
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    return FileResponse(FILES / "index.html", headers=headers)
