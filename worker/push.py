"""`python -m worker.push CHECKPOINT REPO`: uploads a checkpoint to a model hub, and prints where it is as JSON.

`visionq models push` runs it as a child process. Reads the worker's settings, and huggingface_hub's own variables for
the hub's address and token. Exit status: 0; 1 with an `error`. Loads no model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]
from pydantic import ValidationError

from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.ledger.settings import explain_settings
from worker.errors import CannotStart
from worker.models.remote import SUFFIXES, TEMPLATES
from worker.models.source import find_model
from worker.observability.logging import Redactor
from worker.settings import WorkerSettings

#: Without code, beside those that are read back: what people read.
_READ_BY_PEOPLE: Final = frozenset({".md"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Upload the files of a whole model or of an adapter, never a pickle, as one commit."""
    args = _parse(arguments)
    try:
        settings = WorkerSettings(model=args.checkpoint)
        folder = _folder(settings)
        files = _files(settings, folder)
    except ValidationError as error:
        return _fail(ErrorCode.INVALID_REQUEST, explain_settings(WorkerSettings, error))
    except CannotStart as error:
        return _fail(ErrorCode.INVALID_REQUEST, str(error))
    redact = Redactor((*settings.secrets(), os.environ.get("HF_TOKEN", "")))
    try:
        api = HfApi()
        repo = api.create_repo(args.repo, private=not args.public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, allow_patterns=list(files), commit_message=args.message
        )
    except HFValidationError as error:
        return _fail(ErrorCode.INVALID_REQUEST, f"the hub refuses {args.repo}: {_first_line(error)}")
    except HfHubHTTPError as error:
        status = error.response.status_code
        is_passing = status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.TOO_MANY_REQUESTS
        code = ErrorCode.STORAGE_UNAVAILABLE if is_passing else ErrorCode.INVALID_REQUEST
        return _fail(code, redact(f"the hub refuses {args.repo}: {_first_line(error)}"))
    except (HTTPError, OSError) as error:
        reason = redact(f"{type(error).__name__}: {_first_line(error)}")
        return _fail(ErrorCode.STORAGE_UNAVAILABLE, f"the hub does not answer ({reason})")
    return _print({"url": str(repo), "commit": commit.oid, "files": files})


def _folder(settings: WorkerSettings) -> Path:
    source = find_model(settings)
    folder = source.adapter.folder if source.adapter is not None else source.place
    if not isinstance(folder, Path):
        raise CannotStart(f"{settings.model} is no folder and no s3:// checkpoint")
    return folder


def _files(settings: WorkerSettings, folder: Path) -> tuple[str, ...]:
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in SUFFIXES | _READ_BY_PEOPLE]
    if not any(path.suffix == ".safetensors" for path in files):
        raise CannotStart(f"{settings.model}: no .safetensors in {folder}; pickles are not passed on")
    templates = (folder / TEMPLATES).glob("*.jinja")
    return tuple(sorted(path.relative_to(folder).as_posix() for path in (*files, *templates)))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _print(answer: dict[str, Any]) -> int:
    sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
    return 0


def _fail(code: ErrorCode, message: str) -> int:
    _print({"error": ErrorInfo.of(code, message).model_dump(mode="json")})
    return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.push", description=main.__doc__)
    parser.add_argument("checkpoint", help="a folder or s3://bucket/prefix/")
    parser.add_argument("repo", help="OWNER/NAME on the hub; made when missing")
    parser.add_argument("--public", action="store_true", help="a new repository is for everybody to read")
    parser.add_argument("--message", default="Upload a checkpoint", help="of the commit")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
