"""Downloads a checkpoint from S3 into a cache that all workers of a machine share, and verifies it.

In: the settings, VISIONQ_MODEL being `s3://bucket/prefix/`. Out: a folder of the cache whose name depends on the
objects' ETags, so that a changed checkpoint gets another folder. Only file types without code are downloaded, never a
pickle. The bucket need not be one that jobs may read.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from safetensors import SafetensorError, safe_open
from urllib3.exceptions import HTTPError

from worker.errors import CannotStart
from worker.models.checkpoint import ADAPTER_CONFIG, is_adapter
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

logger = logging.getLogger(__name__)

#: The only folder below the prefix that is downloaded.
TEMPLATES: Final = "additional_chat_templates/"
SUFFIXES: Final = frozenset({".json", ".jinja", ".safetensors", ".txt", ".model"})
PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
NUM_CONNECTIONS: Final = 8
LOCK_POLL_S: Final = 0.2
#: Another worker of this machine may be downloading tens of gigabytes meanwhile.
LOCK_WAIT_S: Final = 3_600.0

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_MD5: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class _File:
    """One object of a checkpoint. `etag` is the MD5 of its bytes when it was written in one part, unencrypted."""

    name: str
    num_bytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A checkpoint in storage. `prefix` is empty or ends with a slash."""

    bucket: str
    prefix: str
    files: tuple[_File, ...]

    @property
    def folder_name(self) -> str:
        """The readable prefix, and a digest of all names, sizes and ETags."""
        identity = repr((self.bucket, self.prefix, self.files))
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.bucket}/{self.prefix}").strip("-")[:80]
        return f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def is_in(self, folder: Path) -> bool:
        """Whether every file is in `folder` with its size."""
        return folder.is_dir() and all(_is_there(folder, file) for file in self.files)


def download(settings: WorkerSettings) -> Path:
    """Return a local folder with the checkpoint or adapter. Raises CannotStart, naming the variable, for any fault.

    Workers of one machine that start together wait for one download. An interrupted download continues with the file
    that is missing.
    """
    bucket, prefix = _parse(settings.model)
    cache = settings.model_cache.expanduser()
    with _translated(settings):
        client = _client(settings)
        wanted = _list_checkpoint(client, settings.model, bucket, prefix)
        folder = cache / wanted.folder_name
        if not wanted.is_in(folder):
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache / f".{wanted.folder_name}.lock"):
                if not wanted.is_in(folder):
                    _fetch(client, settings.model, wanted, folder)
    return folder


def _parse(uri: str) -> tuple[str, str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise CannotStart(f"VISIONQ_MODEL={uri}: no bucket; use s3://bucket/prefix/")
    return bucket, prefix if not prefix or prefix.endswith("/") else f"{prefix}/"


def _client(settings: WorkerSettings) -> S3Client:
    config = Config(
        connect_timeout=settings.storage_timeout_s,
        read_timeout=settings.storage_timeout_s,
        retries={"mode": "standard", "total_max_attempts": settings.storage_retries + 1},
        max_pool_connections=NUM_CONNECTIONS,
        s3={"addressing_style": "path"},
    )
    client: S3Client = boto3.client(
        "s3", endpoint_url=settings.s3_endpoint_url, region_name=settings.s3_region, config=config
    )
    return client


def _list_checkpoint(client: S3Client, uri: str, bucket: str, prefix: str) -> _Checkpoint:
    """List the files directly under the prefix, and its additional chat templates.

    Raises CannotStart when they are neither a checkpoint nor an adapter.
    """
    found = list(_objects(client, bucket, prefix))
    has_pickles = any(Path(file.name).suffix in PICKLE_SUFFIXES for file in found)
    files = [file for file in found if Path(file.name).suffix in SUFFIXES and _NAME.fullmatch(file.name)]
    templates = [file for file in _objects(client, bucket, prefix + TEMPLATES) if file.name.endswith(".jinja")]
    files += [replace(file, name=TEMPLATES + file.name) for file in templates if _NAME.fullmatch(file.name)]
    names = {file.name for file in files}
    is_adapter(
        uri,
        names,
        "under this prefix",
        lambda: client.get_object(Bucket=bucket, Key=prefix + ADAPTER_CONFIG)["Body"].read(),
    )
    if not any(name.endswith(".safetensors") for name in names):
        lacking = "its weights are pickles, which are never loaded" if has_pickles else "it has no weights"
        raise CannotStart(f"VISIONQ_MODEL={uri}: {lacking}; store them as safetensors")
    return _Checkpoint(bucket, prefix, tuple(sorted(files, key=lambda file: file.name)))


def _objects(client: S3Client, bucket: str, prefix: str) -> Iterator[_File]:
    """Yield the objects directly under a prefix, with names relative to it."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
        for entry in page.get("Contents", []):
            yield _File(entry["Key"].removeprefix(prefix), entry["Size"], entry["ETag"].strip('"'))


def _fetch(client: S3Client, uri: str, wanted: _Checkpoint, folder: Path) -> None:
    """Fill a draft beside `folder` and rename it, so that `folder` is always complete. Call it with the lock held."""
    started_at = time.monotonic()
    facts = {"action": "download", "model": uri, "num_files": len(wanted.files), "num_bytes": wanted.num_bytes}
    logger.info("downloading checkpoint", extra=facts)
    draft = folder.with_name(f".{folder.name}.draft")
    draft.mkdir(exist_ok=True)
    if any(file.name.startswith(TEMPLATES) for file in wanted.files):
        (draft / TEMPLATES).mkdir(exist_ok=True)
    _remove_other_files(draft, wanted)
    _require_space(uri, wanted, draft)
    for file in wanted.files:
        if not _is_there(draft, file):
            client.download_file(
                wanted.bucket,
                wanted.prefix + file.name,
                str(draft / file.name),
                Config=TransferConfig(max_concurrency=NUM_CONNECTIONS),
            )
        _verify(client, uri, wanted, file, draft / file.name)
    # The files were read one after the other: they belong together only if none has changed meanwhile.
    if _list_checkpoint(client, uri, wanted.bucket, wanted.prefix) != wanted:
        raise CannotStart(f"VISIONQ_MODEL={uri}: it changed while it was downloaded; start again")
    if folder.exists():  # it is incomplete
        shutil.rmtree(folder)
    draft.rename(folder)
    logger.info("checkpoint downloaded", extra=facts | {"total_s": round(time.monotonic() - started_at, 2)})


def _is_there(folder: Path, file: _File) -> bool:
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.num_bytes


def _remove_other_files(draft: Path, wanted: _Checkpoint) -> None:
    """Remove what an interrupted download left half-written."""
    names = {file.name for file in wanted.files}
    for path in draft.rglob("*"):
        if path.is_file() and str(path.relative_to(draft)) not in names:
            path.unlink()


def _require_space(uri: str, wanted: _Checkpoint, draft: Path) -> None:
    missing = sum(file.num_bytes for file in wanted.files if not _is_there(draft, file))
    free = shutil.disk_usage(draft).free
    if missing > free:
        raise CannotStart(
            f"VISIONQ_MODEL_CACHE={draft.parent}: {uri} needs {missing} more bytes, the disk has {free} left"
        )


def _verify(client: S3Client, uri: str, wanted: _Checkpoint, file: _File, path: Path) -> None:
    """Raise CannotStart, and remove the file, if its size or MD5 is wrong or a weight file is truncated."""
    problem = None
    if path.stat().st_size != file.num_bytes:
        problem = f"{path.stat().st_size} of {file.num_bytes} bytes arrived"
    elif _MD5.fullmatch(file.etag) and file.etag != _md5(path) and _etag_is_md5(client, wanted, file):
        problem = "its bytes do not have the MD5 that storage names"
    elif path.suffix == ".safetensors":
        problem = _weights_problem(path)
    if problem is not None:
        path.unlink()
        raise CannotStart(f"VISIONQ_MODEL={uri}: {file.name}: {problem}")


def _md5(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _etag_is_md5(client: S3Client, wanted: _Checkpoint, file: _File) -> bool:
    """Whether the ETag is an MD5; for objects encrypted with KMS or the customer's keys it is not."""
    head = client.head_object(Bucket=wanted.bucket, Key=wanted.prefix + file.name)
    return "SSEKMSKeyId" not in head and "SSECustomerAlgorithm" not in head


def _weights_problem(path: Path) -> str | None:
    """Return what is wrong with a safetensors file; opening it checks its header against its length."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return f"not a whole safetensors file ({error})"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the system frees it when its holder dies."""
    deadline = time.monotonic() + LOCK_WAIT_S
    is_logged = False
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise CannotStart(
                        f"VISIONQ_MODEL: another worker has been downloading for {LOCK_WAIT_S:.0f} s ({path})"
                    ) from None
            if not is_logged:
                logger.info("another worker downloads the checkpoint; waiting", extra={"action": "download"})
                is_logged = True
            time.sleep(LOCK_POLL_S)
        yield


@contextmanager
def _translated(settings: WorkerSettings) -> Iterator[None]:
    """Turn errors of storage and disk into CannotStart, without their own texts, which may hold credentials."""
    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        raise CannotStart(f"VISIONQ_MODEL={settings.model}: storage answered {status} ({code})") from error
    except (BotoCoreError, Boto3Error, HTTPError) as error:
        where = settings.s3_endpoint_url or "AWS"
        raise CannotStart(
            f"VISIONQ_MODEL={settings.model}: {where} did not deliver it ({type(error).__name__}); "
            "see AWS_ENDPOINT_URL_S3 and the credentials"
        ) from error
    except OSError as error:
        raise CannotStart(
            f"VISIONQ_MODEL_CACHE={settings.model_cache}: {error.strerror or type(error).__name__}"
        ) from error
