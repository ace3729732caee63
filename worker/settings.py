"""The worker's settings: one frozen object, read from the environment at boot and passed down.

The only place of the worker that reads the environment. A bad value refuses to start, naming the variable.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import NoDecode

from api_stub.contract.job_fields import ServedName
from api_stub.contract.media import MAX_PIXELS, MediaOptions
from api_stub.contract.names import DEFAULT_MODEL_NAME, TRAINING_MODEL_NAME, is_model_name
from api_stub.ledger.settings import LedgerSettings, ServiceSettings, TrainingSettings
from worker.choices import Attention as Attention
from worker.choices import Dtype as Dtype
from worker.choices import KVBackend as KVBackend
from worker.choices import LogFormat as LogFormat
from worker.choices import Quantization as Quantization
from worker.choices import Switch as Switch

MEBIBYTE = 1024 * 1024
#: Every token is computed with the ranks of all adapters.
MAX_ADAPTERS = 8
#: Read by libraries, not by these settings.
SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")


class WorkerSettings(ServiceSettings, TrainingSettings, LedgerSettings):
    """Everything a worker can be configured from outside. Durations are seconds, sizes bytes."""

    model: str = Field(
        default="demo",
        min_length=1,
        description="Checkpoint: `demo`, `demo-captioner`, a folder, a hub id or `s3://bucket/prefix/`",
    )
    model_cache: Path = Field(
        default=Path("~/.cache/visionq"), description="Folder for checkpoints from S3, shared by a machine's workers"
    )
    model_revision: str = Field(
        default="",
        max_length=255,
        pattern=r"^$|^[A-Za-z0-9_][A-Za-z0-9_-]*([./][A-Za-z0-9_-]+)*$",
        description="Branch, tag or commit of a hub checkpoint; empty: its main branch",
    )
    chat_template: Path | None = Field(
        default=None, description="File with a Jinja chat template to use instead of the checkpoint's"
    )
    model_name: ServedName = Field(
        default=DEFAULT_MODEL_NAME, description="Model name this worker serves: queue `visionq.<name>`"
    )
    adapters: str = Field(
        default="",
        description="LoRA adapters that jobs may name as `NAME:ADAPTER`, comma-separated, at most 8: `adapter=uri`, a "
        "folder or `s3://bucket/prefix/`",
    )
    allowed_buckets: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Buckets the worker may read, comma-separated; empty: the media bucket only"
    )
    device: str = Field(
        default="auto", description="`auto`, `cpu`, `cuda`, `cuda:N` or `balanced`: spread over several GPUs"
    )
    dtype: Dtype = Field(default=Dtype.AUTO, description="Weights' type: `auto`, `float32`, `float16`, `bfloat16`")
    attention: Attention = Field(default=Attention.AUTO, description="`auto`, `sdpa`, `eager`, `flash_attention_2`")
    quantization: Quantization = Field(default=Quantization.NONE, description="`none`, `int8`, `nf4`")
    image_splitting: Switch = Field(
        default=Switch.AUTO, description="Idefics image splitting: `auto` keeps the checkpoint's"
    )
    generation_config: Literal["auto", "off"] = Field(
        default="auto",
        description="The checkpoint's `generation_config.json`: `auto` takes what changes greedy text as defaults of "
        "jobs, `off` its end tokens only",
    )
    max_num_seqs: int = Field(default=16, ge=1, le=1024, description="Jobs generated at once")
    max_model_len: int = Field(
        default=0,
        ge=0,
        description="Tokens of prompt and answer per job; 0: the checkpoint's context, at most 4096 on a CPU",
    )
    max_num_batched_tokens: int = Field(
        default=0,
        ge=0,
        le=65_536,
        description="Tokens of prompts and answers read in one step; 0: 2048 on a GPU, 512 on a CPU, "
        "at least twice `max_num_seqs`",
    )
    kv_backend: KVBackend = Field(
        default=KVBackend.AUTO,
        validation_alias=AliasChoices("kv_backend", "VISIONQ_KV"),
        description="Keys and values: `paged` blocks, `slots` of full length, `auto`: paged where the model is suited",
    )
    kv_block_size: int = Field(default=16, ge=1, le=1024, description="Tokens of one paged block")
    kv_blocks: int = Field(
        default=0, ge=0, description="Paged blocks; 0: enough for `max_num_seqs` full jobs, as far as memory goes"
    )
    kv_memory_fraction: float = Field(
        default=0.9, gt=0, lt=1, description="Share of the free GPU memory that paged blocks may take at boot"
    )
    cuda_graphs: Switch = Field(
        default=Switch.AUTO, description="Replay recorded decode steps on a GPU; `auto`: where attention has a kernel"
    )
    run_ahead: Switch = Field(
        default=Switch.AUTO, description="Start a step before the last one's tokens are known; `auto`: on a GPU"
    )
    prepare_ahead: int = Field(default=4, ge=0, le=256, description="Jobs fetched and prepared beyond `max_num_seqs`")
    torch_threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0: torch's own choice")
    beat_s: float = Field(default=3.0, gt=0, description="Time between heartbeats; at most a third of the lease")
    drain_s: float = Field(default=30.0, ge=0, description="Time running jobs get after SIGTERM")
    stall_s: float = Field(
        default=300.0, ge=1, description="An engine with work that makes no step this long is restarted"
    )
    mute_s: float = Field(
        default=30.0, ge=1, description="A worker that takes nothing this long from a full queue is restarted"
    )
    http_host: str = Field(
        default="127.0.0.1", min_length=1, description="Address of `/healthz`, `/readyz` and `/metrics`"
    )
    http_port: int = Field(
        default=0, ge=0, le=65_000, description="Port of the first device's worker, the next ones follow; 0: none"
    )
    celery_events: bool = Field(default=False, description="Tell Celery's events when a task comes in, for Flower")
    max_image_bytes: int = Field(default=32 * MEBIBYTE, ge=1, description="Bytes of one image")
    max_image_pixels: int = Field(default=50_000_000, ge=1, description="Pixels of one image")
    max_video_bytes: int = Field(default=512 * MEBIBYTE, ge=1, description="Bytes of one clip")
    max_video_seconds: float = Field(default=3_600.0, gt=0, description="Length of one clip")
    max_job_media_bytes: int = Field(default=1024 * MEBIBYTE, ge=1, description="Bytes of all media of one job")
    max_job_pixels: int = Field(
        default=256_000_000, ge=1, description="Pixels of all images and sampled frames of one job; 4 bytes each"
    )
    min_pixels: int = Field(
        default=0,
        ge=0,
        le=MAX_PIXELS,
        description="Pixels that a picture or frame is enlarged to for the model; 0: the checkpoint's own",
    )
    max_pixels: int = Field(
        default=0,
        ge=0,
        le=MAX_PIXELS,
        description="Pixels that the model is shown of a picture or frame, also the most that a job may ask for; "
        "0: the checkpoint's own",
    )
    decoded_bytes: int = Field(
        default=4096 * MEBIBYTE,
        ge=MEBIBYTE,
        description="Decoded pixels of all jobs not prepared yet; a job waits for the most that its media may need",
    )
    decode_processes: int = Field(
        default=0, ge=0, le=256, description="Processes that decode media; 0: one per processor core, 2 to 8"
    )
    decode_image_s: float = Field(default=30.0, gt=0, description="Time to decode one image")
    decode_video_s: float = Field(default=120.0, gt=0, description="Time to decode the frames of one clip")
    decode_memory_bytes: int = Field(
        default=2048 * MEBIBYTE, ge=512 * MEBIBYTE, description="Memory (address space) of one decoding process"
    )
    media_cache_bytes: int = Field(
        default=256 * MEBIBYTE, ge=0, description="Decoded images and clips kept between jobs; 0: none"
    )
    vision_cache_bytes: int = Field(
        default=256 * MEBIBYTE,
        ge=0,
        description="What the vision tower made of pictures, kept between jobs on the model's device; 0: nothing",
    )
    max_vision_batch: int = Field(
        default=0, ge=0, le=1024, description="Pictures, crops, clips encoded between two steps; 0: 8 on a GPU, else 2"
    )
    storage_timeout_s: float = Field(default=10.0, gt=0, description="Silence of storage that counts as a fault")
    storage_retries: int = Field(default=3, ge=0, le=20, description="Retries of a faulty read within an attempt")
    max_retries: int = Field(
        default=5, ge=0, le=100, description="Times faulty storage puts a job back, pauses growing, before it fails"
    )
    training_bases: str = Field(
        default="",
        description="Further names that fine-tuning jobs may give as their base, comma-separated: `name=checkpoint`",
    )
    log_format: LogFormat = Field(default=LogFormat.JSON, description="`json` or `text`")

    @field_validator("allowed_buckets", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @field_validator("training_bases")
    @classmethod
    def _are_bases(cls, value: str) -> str:
        return value if read_pairs(value) else ""

    @field_validator("adapters")
    @classmethod
    def _are_adapters(cls, value: str) -> str:
        if (num := len(read_pairs(value))) > MAX_ADAPTERS:
            raise ValueError(f"at most {MAX_ADAPTERS} adapters are served, got {num}")
        return value

    @field_validator("beat_s")
    @classmethod
    def _beats_fit_the_lease(cls, value: float, info: object) -> float:
        lease_s: float = getattr(info, "data", {}).get("lease_s", 15.0)
        if value * 3 > lease_s:
            raise ValueError(f"must be at most a third of the lease ({lease_s} s)")
        return value

    @field_validator("max_pixels")
    @classmethod
    def _most_is_not_below_least(cls, value: int, info: object) -> int:
        least: int = getattr(info, "data", {}).get("min_pixels", 0)
        if value and least > value:
            raise ValueError(f"is below VISIONQ_MIN_PIXELS ({least})")
        return value

    def secrets(self) -> tuple[str, ...]:
        """Return what no line of this process may show: passwords and keys that its environment holds."""
        url_password = urlsplit(self.redis_url.get_secret_value()).password or ""
        return tuple(filter(None, (url_password, *(os.environ.get(name, "") for name in SECRET_VARIABLES))))

    @property
    def readable_buckets(self) -> frozenset[str]:
        """The buckets that jobs may name."""
        return frozenset(self.allowed_buckets or (self.media_bucket,))

    @property
    def bases(self) -> Mapping[str, str]:
        """Checkpoints by the further names that jobs may give as their base."""
        return read_pairs(self.training_bases)

    @property
    def adapter_uris(self) -> Mapping[str, str]:
        """Where the adapters are, by the names that jobs give."""
        return read_pairs(self.adapters)

    @property
    def of_trainer(self) -> WorkerSettings:
        """The settings of a process that trains: its queue, and one job at a time."""
        return self.model_copy(update={"model_name": TRAINING_MODEL_NAME, "max_num_seqs": 1, "prepare_ahead": 0})

    @property
    def media_options(self) -> MediaOptions:
        """The worker's own limits for pixels."""
        return MediaOptions(min_pixels=self.min_pixels or None, max_pixels=self.max_pixels or None)

    @property
    def concurrency(self) -> int:
        """Celery threads: jobs that generate plus jobs that are prepared meanwhile."""
        return self.max_num_seqs + self.prepare_ahead

    @property
    def num_decode_processes(self) -> int:
        """Media decoded at once."""
        return self.decode_processes or min(8, max(2, os.cpu_count() or 2))


def read_pairs(text: str) -> Mapping[str, str]:
    """Read `name=checkpoint,…`. Raises ValueError."""
    entries = [entry.strip().partition("=") for entry in text.split(",") if entry.strip()]
    if wrong := [name for name, _, checkpoint in entries if not (is_model_name(name) and checkpoint)]:
        raise ValueError(f"name=checkpoint is required, got {wrong[0][:80]!r}")
    names = [name for name, _, _ in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is given twice")
    return {name: checkpoint for name, _, checkpoint in entries}


def export(variables: Mapping[str, str]) -> None:
    """Set variables of this process for libraries that take settings from nowhere else. What is set already stays."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
