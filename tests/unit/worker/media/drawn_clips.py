"""Clips whose frames say their own number, and how to read it back.

`clips/*` were written the same way by PyAV with libx264, which OpenCV's wheel cannot: `h264_b_frames.mp4` has 240
frames, 25 per second, a key frame every 60, 3 B-frames, `h264_b_frames.avi` 40, every 20 and 2;
`h264_variable_rate.mkv` has 160 frames, 20 ms apart up to
frame 100 and 150 ms apart from there, a key frame every 40. `clips_av1/av1.mp4` is by SVT-AV1 (presets 6, crf 25): 160
frames, 25 per second, a key frame every 40, frames between them coded out of order.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

CLIPS = Path(__file__).parent / "clips"
B_FRAMES = CLIPS / "h264_b_frames.mp4"
B_FRAMES_AVI = CLIPS / "h264_b_frames.avi"
VARIABLE_RATE = CLIPS / "h264_variable_rate.mkv"
AV1 = Path(__file__).parent / "clips_av1" / "av1.mp4"
SIZE = (64, 48)
RED = (200, 40, 20)


def drawn_frame(number: int) -> np.ndarray:
    """RGB; 8 squares at the top are the bits of `number`, the lowest first; red below."""
    frame = np.full((SIZE[1], SIZE[0], 3), RED, np.uint8)
    for bit in range(8):
        frame[:16, bit * 8 : bit * 8 + 8] = 255 if number >> bit & 1 else 0
    return frame


def number_of(frame: Image.Image) -> int:
    """Read a frame's number; its red must be red, whatever the codec did to it."""
    assert frame.mode == "RGB"
    red, green, blue = frame.getpixel((32, 30))
    assert red > 150 > 90 > max(green, blue), f"({red}, {green}, {blue}) is not red"
    return sum(1 << bit for bit in range(8) if frame.convert("L").getpixel((bit * 8 + 4, 8)) > 127)


def write_clip(path: Path, num_frames: int, codec: str = "mp4v", fps: float = 25.0) -> Path:
    """Write frames 0 … `num_frames` - 1."""
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, SIZE)
    assert writer.isOpened()
    for number in range(num_frames):
        writer.write(drawn_frame(number)[:, :, ::-1].copy())
    writer.release()
    return path
