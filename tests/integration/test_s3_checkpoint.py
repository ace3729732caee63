"""Checkpoints in S3: downloaded once, verified, shared by workers, downloaded anew when they change."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save

from tests.servers import S3Server, eventually, free_port
from worker.errors import CannotStart
from worker.models.loader import load
from worker.models.remote import download
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

URI = "s3://models/vlm/one/"


@pytest.fixture
def stored(s3_client: S3Client, tiny_checkpoint: Callable[[str], Path]) -> S3Client:
    """A client of the storage that holds a checkpoint at URI, and nothing else in that bucket."""
    s3_client.create_bucket(Bucket="models")
    for page in s3_client.get_paginator("list_objects_v2").paginate(Bucket="models"):
        for entry in page.get("Contents", []):
            s3_client.delete_object(Bucket="models", Key=entry["Key"])
    for path in tiny_checkpoint("llava").iterdir():
        s3_client.upload_file(str(path), "models", f"vlm/one/{path.name}")
    return s3_client


@pytest.fixture
def settings(s3_server: S3Server, tmp_path: Path) -> Callable[..., WorkerSettings]:
    """Return a function that makes settings for this storage and a cache of the test's own."""

    def make(**given: object) -> WorkerSettings:
        plain = {"model": URI, "s3_endpoint_url": s3_server.url, "model_cache": tmp_path / "cache"}
        return WorkerSettings(**(plain | given))

    return make


Settings = Callable[..., WorkerSettings]


def refusal(settings: WorkerSettings) -> str:
    """Return the words with which a start is refused; they never show credentials."""
    with pytest.raises(CannotStart) as refused:
        download(settings)
    assert "test-secret" not in str(refused.value)
    return str(refused.value)


def put(client: S3Client, name: str, body: bytes) -> None:
    client.put_object(Bucket="models", Key=f"vlm/one/{name}", Body=body)


def visible(cache: Path) -> list[str]:
    """Names in the cache without locks and drafts."""
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("uri", [URI, URI.rstrip("/")])
@pytest.mark.usefixtures("stored")
def test_a_checkpoint_is_loaded_from_a_bucket_that_jobs_may_not_read(uri: str, settings: Settings) -> None:
    chosen = settings(model=uri)
    assert "models" not in chosen.readable_buckets
    assert load(chosen).model.config.model_type == "llava"


def test_an_adapter_in_storage_is_refused_by_name(stored: S3Client, settings: Settings) -> None:
    put(stored, "adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')
    assert refusal(settings()).startswith(f"VISIONQ_MODEL={URI}: a LoRA adapter of some/base; ")
    stored.delete_object(Bucket="models", Key="vlm/one/config.json")
    assert refusal(settings()).startswith(f"VISIONQ_MODEL={URI}: a LoRA adapter of some/base; ")


def test_an_adapter_in_storage_is_merged_into_its_base_in_storage(stored: S3Client, settings: Settings) -> None:
    layer = "model.language_model.layers.0.self_attn.q_proj"
    out_features, in_features = load(settings()).model.get_submodule(layer).weight.shape
    factors = {"A": torch.ones(1, in_features), "B": torch.ones(out_features, 1)}
    config = {"peft_type": "LORA", "base_model_name_or_path": URI, "r": 1, "lora_alpha": 3}
    prefix = "vlm/two/checkpoint-40/"
    for name, body in {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(
            {f"base_model.model.{layer}.lora_{name}.weight": factor for name, factor in factors.items()}
        ),
        "optimizer.pt": b"pickle",
        "state/optimizer.safetensors": b"read by nobody",
    }.items():
        stored.put_object(Bucket="models", Key=prefix + name, Body=body)
    chosen = settings(model=f"s3://models/{prefix}")
    change = load(chosen).model.get_submodule(layer).weight - load(settings()).model.get_submodule(layer).weight
    torch.testing.assert_close(change, torch.full_like(change, 3.0))
    assert sorted(path.name for path in download(chosen).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    stored.delete_object(Bucket="models", Key=f"{prefix}adapter_model.safetensors")
    assert "it needs adapter_config.json and adapter_model.safetensors" in refusal(chosen)


def test_the_output_of_a_training_run_names_no_checkpoint(stored: S3Client, settings: Settings) -> None:
    stored.put_object(Bucket="models", Key="run/latest.json", Body=b"{}")
    assert refusal(settings(model="s3://models/run/")).endswith("name one of the folders checkpoint-N")


def test_a_second_start_downloads_nothing(stored: S3Client, settings: Settings) -> None:
    folder = download(settings())
    written = {path: path.stat().st_ctime_ns for path in folder.iterdir()}
    assert download(settings()) == folder
    assert {path: path.stat().st_ctime_ns for path in folder.iterdir()} == written


def test_a_changed_checkpoint_is_downloaded_anew_and_the_old_one_stays(stored: S3Client, settings: Settings) -> None:
    first = download(settings())
    config = json.loads((first / "config.json").read_text()) | {"default_caption_prompt": "what is it?"}
    put(stored, "config.json", json.dumps(config).encode())
    second = download(settings())
    assert json.loads((second / "config.json").read_text()) == config
    assert visible(settings().model_cache) == sorted([first.name, second.name])


def test_only_known_kinds_directly_under_the_prefix_are_taken(stored: S3Client, settings: Settings) -> None:
    expected = {path.name for path in download(settings()).iterdir()}
    for name in (
        "pytorch_model.bin",
        "modeling.py",
        ".hidden.json",
        "original/model.safetensors",
        "-x.json",
        "a b.txt",
    ):
        put(stored, name, b"anything")
    put(stored, "NOTES.txt", b"kept")
    assert {path.name for path in download(settings()).iterdir()} == expected | {"NOTES.txt"}


@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_named_chat_templates_are_taken_from_their_folder(stored: S3Client, settings: Settings) -> None:
    template = stored.get_object(Bucket="models", Key="vlm/one/chat_template.jinja")["Body"].read()
    put(stored, "additional_chat_templates/rag.jinja", b"RAG")
    stored.delete_object(Bucket="models", Key="vlm/one/chat_template.jinja")
    put(stored, "additional_chat_templates/code.py", b"anything")
    put(stored, "additional_chat_templates/deeper/x.jinja", b"anything")
    folder = download(settings())
    assert [path.name for path in (folder / "additional_chat_templates").iterdir()] == ["rag.jinja"]
    with pytest.raises(CannotStart, match="there are rag and none is named default"):
        load(settings())
    put(stored, "additional_chat_templates/default.jinja", template)
    loaded = load(settings())
    assert loaded.processor.chat_template == template.decode()
    assert loaded.capabilities.template_source == "additional_chat_templates"


def test_pickled_weights_are_refused(stored: S3Client, settings: Settings) -> None:
    stored.delete_object(Bucket="models", Key="vlm/one/model.safetensors")
    assert "it has no weights" in refusal(settings())
    put(stored, "pytorch_model.bin", b"pickle")
    message = refusal(settings())
    assert message.startswith(f"VISIONQ_MODEL={URI}: its weights are pickles")
    assert not settings().model_cache.exists()


def test_a_cut_weight_file_is_refused_and_leaves_no_folder(stored: S3Client, settings: Settings) -> None:
    whole = stored.get_object(Bucket="models", Key="vlm/one/model.safetensors")["Body"].read()
    put(stored, "model.safetensors", whole[:-7])
    assert f"VISIONQ_MODEL={URI}: model.safetensors: not a whole safetensors file" in refusal(settings())
    assert visible(settings().model_cache) == []
    put(stored, "model.safetensors", whole)
    assert download(settings()).is_dir()


def test_a_file_of_the_right_size_with_other_bytes_is_noticed_by_its_md5(stored: S3Client, settings: Settings) -> None:
    folder = download(settings())
    draft = folder.rename(folder.with_name(f".{folder.name}.draft"))
    text = (draft / "tokenizer.json").read_bytes()
    (draft / "tokenizer.json").write_bytes(text[:-1] + b"!")
    message = refusal(settings())
    assert message == f"VISIONQ_MODEL={URI}: tokenizer.json: its bytes do not have the MD5 that storage names"
    assert (download(settings()) / "tokenizer.json").read_bytes() == text


def test_a_download_that_was_cut_off_goes_on_where_it_was(stored: S3Client, settings: Settings) -> None:
    folder = download(settings())
    draft = folder.rename(folder.with_name(f".{folder.name}.draft"))
    (draft / "model.safetensors").rename(draft / "model.safetensors.A1b2C3d4")
    kept = (draft / "tokenizer.json").stat().st_ino
    assert download(settings()) == folder
    assert (folder / "tokenizer.json").stat().st_ino == kept
    assert (folder / "model.safetensors").exists()
    assert not (folder / "model.safetensors.A1b2C3d4").exists()


def test_a_damaged_folder_is_replaced(stored: S3Client, settings: Settings) -> None:
    folder = download(settings())
    (folder / "model.safetensors").write_bytes(b"")
    assert load(settings()).model.config.model_type == "llava"


def test_a_multipart_object_is_taken_though_its_etag_is_no_md5(stored: S3Client, settings: Settings) -> None:
    whole = stored.get_object(Bucket="models", Key="vlm/one/model.safetensors")["Body"].read()
    place = {"Bucket": "models", "Key": "vlm/one/model.safetensors"}
    upload = stored.create_multipart_upload(**place)["UploadId"]
    part = stored.upload_part(**place, UploadId=upload, PartNumber=1, Body=whole)
    stored.complete_multipart_upload(
        **place, UploadId=upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    )
    assert stored.head_object(**place)["ETag"].endswith('-1"')
    assert (download(settings()) / "model.safetensors").read_bytes() == whole


def test_workers_that_start_together_download_once(
    stored: S3Client, settings: Settings, s3_server: S3Server, tmp_path: Path
) -> None:
    program = (
        "import logging; logging.basicConfig(level='INFO');"
        "from worker.models.remote import download; from worker.settings import WorkerSettings;"
        "print(download(WorkerSettings()))"
    )
    environment = os.environ | {
        "VISIONQ_MODEL": URI, "VISIONQ_MODEL_CACHE": str(settings().model_cache), "AWS_ENDPOINT_URL_S3": s3_server.url,
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], said
    assert len({output for output, _ in said}) == 1
    assert sum(log.count("checkpoint downloaded") for _, log in said) == 1


def test_a_worker_waits_for_the_one_that_downloads(
    stored: S3Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download(settings())
    folder.rename(folder.with_name("elsewhere"))
    monkeypatch.setattr("worker.models.remote.LOCK_WAIT_S", 0.3)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "VISIONQ_MODEL: another worker has been downloading" in refusal(settings())
    assert download(settings()) == folder


def test_a_worker_killed_in_the_middle_leaves_no_lock_and_no_folder(
    stored: S3Client, settings: Settings, s3_server: S3Server
) -> None:
    put(stored, "NOTES.txt", os.urandom(64 * 1024 * 1024))
    cache = settings().model_cache
    environment = os.environ | {
        "VISIONQ_MODEL": URI, "VISIONQ_MODEL_CACHE": str(cache), "AWS_ENDPOINT_URL_S3": s3_server.url,
    }  # fmt: skip
    program = "from worker.models.remote import *; download(WorkerSettings())"
    worker = subprocess.Popen([sys.executable, "-c", program], env=environment)
    eventually(lambda: any(cache.glob(".*.draft/NOTES.txt*")) or worker.poll() is not None, 60, "bytes arrive")
    worker.kill()
    assert worker.wait(20) == -9
    assert visible(cache) == []
    assert download(settings()).is_dir()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "s3:///x"}, "VISIONQ_MODEL=s3:///x: no bucket"),
        ({"model": "s3://models/nothing/here/"}, "VISIONQ_MODEL=s3://models/nothing/here/: no config.json"),
        ({"model": "s3://no-such-bucket/x/"}, "VISIONQ_MODEL=s3://no-such-bucket/x/: storage answered 404"),
        ({"s3_endpoint_url": f"http://127.0.0.1:{free_port()}"}, f"VISIONQ_MODEL={URI}: http://127.0.0.1:"),
        ({"model_cache": Path("/proc/nothing")}, "VISIONQ_MODEL_CACHE=/proc/nothing: "),
    ],
    ids=["no bucket", "no checkpoint", "unknown bucket", "no storage", "no cache"],
)
@pytest.mark.usefixtures("stored")
def test_trouble_names_the_variable(given: dict[str, object], message: str, settings: Settings) -> None:
    assert refusal(settings(**({"storage_retries": 0, "storage_timeout_s": 1} | given))).startswith(message)


def test_a_checkpoint_larger_than_the_disk_is_refused(
    stored: S3Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk:
        free = 100

    monkeypatch.setattr("worker.models.remote.shutil.disk_usage", lambda path: Disk)
    assert "more bytes, the disk has 100 left" in refusal(settings())
