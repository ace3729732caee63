"""A sampled clip as transformers' video processors take it: frames, and when they were shown.

In: a decoded clip. Out: frames of one size and `VideoMetadata`. The processors sample nothing themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from PIL import Image
from transformers import ProcessorMixin
from transformers.video_utils import VideoMetadata

from worker.media.types import DecodedClip

#: Processors count time in frames; a clip that does not tell its rate is counted in milliseconds.
MILLISECONDS_PER_S: Final = 1000.0


def video_options(processor: ProcessorMixin, clips: Sequence[DecodedClip]) -> dict[str, Any]:
    """Return the processor's arguments for the clips of one conversation, in order; none without clips."""
    if not clips:
        return {}
    # Qwen's video towers look at pairs of frames and refuse a clip that has less than one pair.
    least = getattr(processor.video_processor, "temporal_patch_size", 1)
    padded = [_at_least(least, clip) for clip in clips]
    return {
        "videos": [[_frames_of_one_size(clip) for clip in padded]],
        # Made anew for every call: processors write into it.
        "video_metadata": [_metadata(clip) for clip in padded],
        "do_sample_frames": False,
    }


def _at_least(num_frames: int, clip: DecodedClip) -> DecodedClip:
    """Repeat the last frame, as the processors themselves fill up an odd number of frames."""
    missing = num_frames - len(clip.frames)
    if missing <= 0:
        return clip
    return DecodedClip(
        clip.frames + clip.frames[-1:] * missing,
        clip.timestamps_s + clip.timestamps_s[-1:] * missing,
        clip.duration_s,
        clip.fps,
    )


def _frames_of_one_size(clip: DecodedClip) -> list[Image.Image]:
    size = clip.frames[0].size
    return [frame if frame.size == size else frame.resize(size) for frame in clip.frames]


def _metadata(clip: DecodedClip) -> VideoMetadata:
    rate = clip.fps if clip.fps > 0 else MILLISECONDS_PER_S
    positions = [round(time_s * rate) for time_s in clip.timestamps_s]
    width, height = clip.frames[0].size
    return VideoMetadata(
        total_num_frames=max(round(clip.duration_s * rate), positions[-1] + 1),
        fps=rate,
        width=width,
        height=height,
        duration=clip.duration_s,
        frames_indices=positions,
    )
