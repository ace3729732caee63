"""Prompts by which a back end proves itself at boot: every kind that the loaded model can be asked.

In: a prompt builder and what the model can do. Out: prepared prompts about pictures and clips of noise, which depend on
every pixel. Knows no engine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image

from api_stub.contract.job import CaptionJob, Job, VideoQaJob, VqaJob
from worker.errors import InvalidRequest
from worker.media.types import DecodedClip, DecodedImage, DecodedMedia
from worker.models.capabilities import Capabilities
from worker.models.inputs import ModelInputs
from worker.prompting.prepare import PromptBuilder

logger = logging.getLogger(__name__)

#: Frames and seconds of the clip: its time axis runs ahead of the text after it.
CLIP_FRAMES: Final = 4
CLIP_S: Final = 120.0
QUESTION: Final = "What is to be seen here, and what is it next to?"


def trial_prompts(prompts: PromptBuilder, capabilities: Capabilities) -> list[ModelInputs]:
    """Return prompts of different lengths: one picture first, several, none, and a clip where clips are taken whole.

    What the model cannot be asked is left out.
    """
    prepared = []
    for job, media in _jobs(capabilities):
        try:
            prepared.append(prompts.prepare(prompts.turns(job), media))
        except InvalidRequest as refusal:
            logger.info("the model is not asked this", extra={"action": "engine.prove", "reason": str(refusal)})
    return prepared


def _jobs(capabilities: Capabilities) -> Sequence[tuple[Job, Sequence[DecodedMedia]]]:
    small, wide = DecodedImage(_noise(1, 64, 64)), DecodedImage(_noise(2, 96, 48))
    jobs: list[tuple[Job, Sequence[DecodedMedia]]] = [
        (CaptionJob(media=_uris(1)), [small]),
        (VqaJob(media=_uris(2), question=QUESTION), [wide, small]),
        (VqaJob(question=QUESTION), []),
    ]
    if capabilities.native_video:
        jobs.append((VideoQaJob(media=_uris(1), question="What moves?"), [_clip()]))
        jobs.append((VideoQaJob(media=_uris(2), question=QUESTION), [wide, _clip()]))
    return jobs


def _uris(count: int) -> tuple[str, ...]:
    return tuple(f"s3://trial/{number}" for number in range(count))


def _clip() -> DecodedClip:
    frames = tuple(_noise(10 + number, 64, 64) for number in range(CLIP_FRAMES))
    times = tuple(CLIP_S * number / CLIP_FRAMES for number in range(CLIP_FRAMES))
    return DecodedClip(frames, times, CLIP_S, fps=25.0)


def _noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
