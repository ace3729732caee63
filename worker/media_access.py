"""Builds what reads and decodes media from the settings: for a worker, and for training."""

from __future__ import annotations

from worker.media.access import MediaAccess
from worker.media.decoder_process import DecodeLimits
from worker.media.decoders import Decoders
from worker.media.fetch import ObjectFetcher
from worker.media.storage import s3_client
from worker.media.types import PIXEL_BYTES, MediaPolicy
from worker.settings import WorkerSettings


def media_access(settings: WorkerSettings) -> MediaAccess:
    """Build it. Starts no process yet; the caller closes the decoders."""
    policy = media_policy(settings)
    client = s3_client(settings.s3_endpoint_url, settings.s3_region, settings.storage_timeout_s)
    limits = DecodeLimits(settings.decode_memory_bytes, settings.decode_image_s, settings.decode_video_s)
    return MediaAccess(
        policy,
        ObjectFetcher(client, policy, retries=settings.storage_retries),
        Decoders(settings.num_decode_processes, limits),
    )


def media_policy(settings: WorkerSettings) -> MediaPolicy:
    """Return the limits for media. Nothing may be larger than the memory budget of all jobs."""
    most_pixels = min(settings.max_job_pixels, settings.decoded_bytes // PIXEL_BYTES)
    return MediaPolicy(
        buckets=settings.readable_buckets,
        max_image_bytes=settings.max_image_bytes,
        max_image_pixels=min(settings.max_image_pixels, most_pixels),
        max_video_bytes=settings.max_video_bytes,
        max_video_seconds=settings.max_video_seconds,
        max_job_bytes=settings.max_job_media_bytes,
        max_clip_pixels=most_pixels,
        max_job_pixels=most_pixels,
    )
