"""Where checkpoints are kept: the files below a folder or below `s3://bucket/prefix/`, by names with slashes.

Both kinds have a conditional write: of two writers that read the same state of a file, one is refused. Errors of boto3
are translated here, once. Knows no checkpoints.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import ClientError

from worker.errors import StorageUnavailable, WorkerError
from worker.media.storage import STORAGE_ERRORS, is_absence, is_passing
from worker.settings import WorkerSettings
from worker.training.progress import TrainingRefused

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CONDITION_FAILED: Final = frozenset({409, 412})
_LOCK: Final = ".lock"


class Objects(Protocol):
    """Files below one place. `uri` names it and ends with a slash. Raises StorageUnavailable and TrainingRefused."""

    uri: str

    def names(self) -> list[str]:
        """Return the names of all files."""

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Return a file's content and the tag of this state of it; None: there is none."""

    def upload(self, path: Path, name: str) -> None:
        """Store a local file under a name. It appears whole or not at all."""

    def download(self, name: str, path: Path) -> None:
        """Make a local file of a stored one. Its folder exists. Raises FileNotFoundError when there is none."""

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    def write_if(self, name: str, content: bytes, tag: str | None) -> bool:
        """Write a file if its state still is that of `tag` (None: it must not exist); return whether it was."""


def training_client(settings: WorkerSettings) -> S3Client:
    """Make the client of a run. boto3 retries by itself: no job waits for an answer."""
    config = Config(
        connect_timeout=settings.storage_timeout_s,
        read_timeout=settings.storage_timeout_s,
        retries={"mode": "standard", "total_max_attempts": settings.storage_retries + 1},
        s3={"addressing_style": "path"},
    )
    client: S3Client = boto3.client(
        "s3", endpoint_url=settings.s3_endpoint_url, region_name=settings.s3_region, config=config
    )
    return client


def open_objects(uri: str, client: S3Client | None = None) -> Objects:
    """Return the files below a folder or `s3://bucket/prefix/`. A folder need not exist yet."""
    if not uri.startswith("s3://"):
        return FolderObjects(Path(uri).expanduser())
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket or client is None:
        raise TrainingRefused(f"{uri}: no bucket; use s3://bucket/prefix/")
    return S3Objects(client, bucket, prefix if not prefix or prefix.endswith("/") else f"{prefix}/")


class FolderObjects:
    """Files of a local folder. Conditional writes hold a lock between the processes of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.uri = f"{folder}/"

    def names(self) -> list[str]:
        """Return all names, without drafts and locks."""
        files = (path for path in self._folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(path.relative_to(self._folder).as_posix() for path in files)

    def read(self, name: str) -> tuple[bytes, str] | None:
        """The tag is the content's digest."""
        try:
            content = (self._folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return content, hashlib.sha256(content).hexdigest()

    def upload(self, path: Path, name: str) -> None:
        """A hard link where the file system allows it: nobody changes a checkpoint's files in place."""
        target = self._folder / name
        with _disk(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
            try:
                _link(path, draft / target.name)
                (draft / target.name).replace(target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def download(self, name: str, path: Path) -> None:
        """A hard link where the file system allows it."""
        if not (self._folder / name).is_file():
            raise FileNotFoundError(name)
        with _disk(path):
            _link(self._folder / name, path)

    def delete(self, name: str) -> None:
        """Empty folders go with their last file."""
        target = self._folder / name
        with _disk(target):
            target.unlink(missing_ok=True)
            while target.parent != self._folder and target.parent.is_dir() and not any(target.parent.iterdir()):
                target = target.parent
                target.rmdir()

    def write_if(self, name: str, content: bytes, tag: str | None) -> bool:
        """Compare and replace under the lock."""
        with _disk(self._folder / name):
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                stored = self.read(name)
                if (None if stored is None else stored[1]) != tag:
                    return False
                draft = self._folder / f".{name}.draft"
                draft.write_bytes(content)
                draft.replace(self._folder / name)
        return True


class S3Objects:
    """Objects below a prefix. `client` retries by itself; `prefix` is empty or ends with a slash."""

    def __init__(self, client: S3Client, bucket: str, prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix
        self.uri = f"s3://{bucket}/{prefix}"

    def names(self) -> list[str]:
        """Return all names below the prefix."""
        found: list[str] = []
        with self._translated(""):
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            ):
                found += [entry["Key"].removeprefix(self._prefix) for entry in page.get("Contents", [])]
        return [name for name in found if name and not name.endswith("/")]

    def read(self, name: str) -> tuple[bytes, str] | None:
        """The tag is the ETag."""
        try:
            with self._translated(name):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)
                return answer["Body"].read(), answer["ETag"]
        except FileNotFoundError:
            return None

    def upload(self, path: Path, name: str) -> None:
        """In parts, when it is large."""
        with self._translated(name):
            self._client.upload_file(str(path), self._bucket, self._prefix + name)

    def download(self, name: str, path: Path) -> None:
        """In parts, when it is large."""
        with self._translated(name):
            self._client.download_file(self._bucket, self._prefix + name, str(path))

    def delete(self, name: str) -> None:
        """Absence is no error."""
        with self._translated(name):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)

    def write_if(self, name: str, content: bytes, tag: str | None) -> bool:
        """If-Match or If-None-Match: storage itself compares."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            with self._translated(name):
                self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=content, **condition)
        except _ConditionFailed:
            return False
        except FileNotFoundError:  # If-Match of an object that was removed meanwhile
            return False
        return True

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Turn errors of storage into ours, without their own texts, which may hold credentials."""
        uri = self.uri + name
        try:
            yield
        except (*STORAGE_ERRORS, Boto3Error) as error:
            cause = error.__cause__ or error.__context__
            raw = error if isinstance(error, ClientError) or not isinstance(cause, ClientError) else cause
            raise _meaning(raw, uri) from error


class _ConditionFailed(Exception):
    """Storage refused a conditional write: the object has another state."""


def _meaning(error: BaseException, uri: str) -> Exception:
    if isinstance(error, ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = error.response.get("Error", {}).get("Code", "")
        if status in _CONDITION_FAILED:
            return _ConditionFailed(uri)
        if is_absence(error) and code != "NoSuchBucket":
            return FileNotFoundError(uri)
        if is_passing(error):
            return StorageUnavailable(f"storage answered {status} ({code}) for {uri}")
        return TrainingRefused(f"storage refused {uri} ({status}, {code})")
    if isinstance(error, OSError) and error.errno is not None:
        return _disk_failed(error, uri)
    return StorageUnavailable(f"storage did not take or deliver {uri} ({type(error).__name__})")


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn an error of the disk into TrainingRefused: a full disk or a folder that may not be written."""
    try:
        yield
    except OSError as error:
        raise _disk_failed(error, str(path)) from error


def _disk_failed(error: OSError, place: str) -> WorkerError:
    return TrainingRefused(f"{place}: {error.strerror or type(error).__name__}")


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
