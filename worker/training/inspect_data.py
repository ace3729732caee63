"""`python -m worker.training.inspect_data`: checks a data set, draws a contact sheet, and prints what it found as JSON.

`visionq dataset` runs it as a child process. Reads the worker's settings; loads no model and no torch. Exit status: 0,
also when the data set is broken; 1 with an `error` when it could not be read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.ledger.settings import explain_settings
from worker.errors import WorkerError
from worker.media.collect import job_directory
from worker.media_access import media_access
from worker.settings import WorkerSettings
from worker.training.contact_sheet import contact_sheet
from worker.training.dataset import Dataset, DatasetBroken, Finding, open_dataset

#: Between two lines about the progress.
PROGRESS_S: Final = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, draw, and print one JSON object."""
    args = _parse(arguments)
    try:
        settings = WorkerSettings()
    except ValidationError as error:
        return _fail(ErrorInfo.of(ErrorCode.INVALID_REQUEST, explain_settings(WorkerSettings, error)))
    access = media_access(settings)
    try:
        with job_directory() as directory:
            dataset = open_dataset(
                args.uri, seed=args.seed, access=access, directory=directory, on_progress=_progress(sys.stderr.write)
            )
            if args.out is not None:
                contact_sheet(dataset, args.number, args.seed).save(args.out)
    except DatasetBroken as broken:
        return _print({"findings": [asdict(finding) for finding in broken.findings]})
    except WorkerError as error:
        return _fail(error.info())
    except (OSError, ValueError) as error:  # Pillow's, for a file that cannot be written or a suffix it does not know
        return _fail(ErrorInfo.of(ErrorCode.INVALID_REQUEST, f"{args.out}: {error}"))
    finally:
        access.decoders.close()
    return _print(_described(dataset, args.out))


def _described(dataset: Dataset, out: Path | None) -> dict[str, Any]:
    return {
        "findings": list[Finding](),
        "digest": dataset.digest,
        "num_files": len(dataset.files),
        "train": len(dataset.train),
        "validation": len(dataset.validation),
        "test": len(dataset.test),
        "sheet": None if out is None else str(out),
    }


def _progress(write: Callable[[str], object]) -> Callable[[int, int], None]:
    """Return what tells how many files were checked, every few seconds."""
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= PROGRESS_S:
            last = now
            write(f"{done} of {total} files checked\n")

    return tell


def _print(answer: dict[str, Any]) -> int:
    sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
    return 0


def _fail(error: ErrorInfo) -> int:
    _print({"error": error.model_dump(mode="json")})
    return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.training.inspect_data", description=main.__doc__)
    parser.add_argument("uri", help="a folder or s3://bucket/prefix/")
    parser.add_argument("--seed", type=int, default=0, help="of the split, and of the examples that are drawn")
    parser.add_argument("--out", type=Path, help="picture file of the contact sheet")
    parser.add_argument("--number", type=int, default=24, help="examples on it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
