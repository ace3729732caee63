"""Clips: the right frames in the right colours, few decoded, broken and lying files survived."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.unit.worker.media.drawn_clips import B_FRAMES, B_FRAMES_AVI, SIZE, VARIABLE_RATE, number_of, write_clip
from worker.errors import MediaCorrupt, MediaTooLarge, MediaUnsupported, WorkerError
from worker.media import clip_reader
from worker.media.clip import ClipFile
from worker.media.clip_index import open_capture, read_index
from worker.media.decoders import FFMPEG_ENVIRONMENT
from worker.media.types import DecodedClip, MediaPolicy
from worker.media.video import sample_clip, uniform_positions

POLICY = MediaPolicy(frozenset())
CODECS = [
    ("mp4", "mp4v"), ("mov", "mp4v"), ("mkv", "mp4v"), ("avi", "MJPG"), ("avi", "XVID"), ("webm", "VP80"),
    ("webm", "VP90"), ("mkv", "FFV1"),
]  # fmt: skip


class Stopped(Exception):
    """What a cancelled job's `should_stop` raises."""


def go_on() -> None:
    """A job that nobody cancels."""


def sample(path: Path, num_frames: int, policy: MediaPolicy = POLICY) -> DecodedClip:
    return sample_clip(path, num_frames, policy, should_stop=go_on)


def numbers(clip: DecodedClip) -> list[int]:
    return [number_of(frame) for frame in clip.frames]


class WatchedCapture:
    """A real capture that counts what is asked of it, and may seek badly or end early."""

    def __init__(self, capture: cv2.VideoCapture, *, seek_error: int = 0, last_frame: int | None = None) -> None:
        self.capture = capture
        self.seek_error = seek_error
        self.last_frame = last_frame
        self.num_grabs = 0
        self.seeks: list[float] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.capture, name)

    def grab(self) -> bool:
        if self.last_frame is not None and self.capture.get(cv2.CAP_PROP_POS_FRAMES) > self.last_frame:
            return False
        self.num_grabs += 1
        return bool(self.capture.grab())

    def set(self, name: int, value: float) -> bool:
        self.seeks.append(value)
        return bool(self.capture.set(name, value + self.seek_error))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[WatchedCapture]]:
    def start(**faults: int) -> list[WatchedCapture]:
        opened: list[WatchedCapture] = []

        def watched(file: ClipFile) -> WatchedCapture:
            opened.append(WatchedCapture(open_capture(file), **faults))
            return opened[-1]

        monkeypatch.setattr(clip_reader, "open_capture", watched)
        return opened

    return start


@pytest.mark.parametrize(
    ("available", "wanted", "positions"),
    [
        (10, 1, [4]),
        (10, 2, [0, 9]),
        (10, 4, [0, 3, 6, 9]),
        (5, 5, [0, 1, 2, 3, 4]),
        (3, 8, [0, 1, 2]),
        (1, 1, [0]),
        (0, 4, []),
    ],
)
def test_positions_go_evenly_from_first_to_last(available: int, wanted: int, positions: list[int]) -> None:
    assert uniform_positions(available, wanted) == positions


def test_positions_are_distinct_and_within_one_of_linspace() -> None:
    for available in range(2, 60):
        for wanted in range(2, available + 1):
            positions = uniform_positions(available, wanted)
            assert len(set(positions)) == wanted
            assert np.abs(np.linspace(0, available - 1, wanted) - positions).max() < 0.501


@pytest.mark.parametrize(("suffix", "codec"), CODECS)
@pytest.mark.parametrize("num_frames", [1, 4, 7])
def test_the_right_frames_come_in_order_and_in_rgb(tmp_path: Path, suffix: str, codec: str, num_frames: int) -> None:
    clip = sample(write_clip(tmp_path / f"clip.{suffix}", 90, codec), num_frames)
    wanted = uniform_positions(90, num_frames)
    assert numbers(clip) == wanted
    assert clip.timestamps_s == pytest.approx([number / 25 for number in wanted], abs=0.002)
    assert (clip.fps, clip.duration_s) == (pytest.approx(25, rel=0.01), pytest.approx(3.6, rel=0.01))
    assert {frame.size for frame in clip.frames} == {SIZE}


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 31, 240])
def test_b_frames_and_long_groups_are_sampled_exactly(num_frames: int) -> None:
    assert numbers(sample(B_FRAMES, num_frames)) == uniform_positions(240, num_frames)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 31, 160])
def test_a_variable_rate_is_sampled_exactly_with_true_times(num_frames: int) -> None:
    clip = sample(VARIABLE_RATE, num_frames)
    wanted = uniform_positions(160, num_frames)
    assert numbers(clip) == wanted
    times_s = [i * 0.02 if i < 100 else 2 + (i - 100) * 0.15 for i in wanted]
    assert clip.timestamps_s == pytest.approx(times_s, abs=0.002)


@pytest.mark.parametrize("available", [1, 2, 3])
def test_a_short_clip_gives_each_frame_once(tmp_path: Path, available: int) -> None:
    clip = sample(write_clip(tmp_path / "short.mp4", available), 8)
    assert numbers(clip) == list(range(available))
    assert clip.duration_s == pytest.approx(available / 25)


def test_only_what_is_needed_is_decoded(watch) -> None:
    opened = watch()
    assert numbers(sample(B_FRAMES, 2)) == [0, 239]
    assert len(opened[0].seeks) == 1
    assert opened[0].num_grabs < 60, "the clip has 240 frames, the last group 60"


def test_dense_samples_are_decoded_forwards_without_seeking(watch) -> None:
    opened = watch()
    sample(B_FRAMES, 60)
    assert len(opened) == 1
    assert not opened[0].seeks
    assert opened[0].num_grabs == 240


@pytest.mark.parametrize("path", [B_FRAMES, VARIABLE_RATE], ids=["b frames", "variable rate"])
@pytest.mark.parametrize("seek_error", [-70, -10, 30, 90])
def test_a_seek_that_lands_elsewhere_costs_time_but_no_truth(watch, path: Path, seek_error: int) -> None:
    opened = watch(seek_error=seek_error)
    available = 240 if path is B_FRAMES else 160
    assert numbers(sample(path, 4)) == uniform_positions(available, 4)
    assert any(capture.seeks for capture in opened)
    assert len(opened) <= 2, "one bad seek is enough"


def test_frames_that_cannot_be_decoded_shorten_the_clip(watch) -> None:
    watch(last_frame=100)
    clip = sample(B_FRAMES, 5)
    assert numbers(clip) == uniform_positions(numbers(clip)[-1] + 1, 5)
    assert 99 <= numbers(clip)[-1] <= 101


def test_a_clip_whose_frames_never_decode_is_corrupt(watch) -> None:
    watch(last_frame=-1)
    with pytest.raises(MediaCorrupt, match="no frames"):
        sample(B_FRAMES, 4)


@pytest.mark.parametrize("claimed", [0, 7, 100_000, 0xFFFF_FFFF])
def test_a_container_that_lies_about_its_length_is_not_believed(tmp_path: Path, claimed: int) -> None:
    path = write_clip(tmp_path / "lying.avi", 60, "MJPG")
    content = bytearray(path.read_bytes())
    for place in (content.index(b"avih") + 24, content.index(b"strh") + 40):
        assert int.from_bytes(content[place : place + 4], "little") == 60
        content[place : place + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(content)
    assert numbers(sample(path, 4)) == [0, 20, 39, 59]


@pytest.mark.parametrize(("suffix", "codec"), CODECS)
def test_a_clip_without_frames_is_corrupt(tmp_path: Path, suffix: str, codec: str) -> None:
    with pytest.raises(MediaCorrupt, match="no frames"):
        sample(write_clip(tmp_path / f"empty.{suffix}", 0, codec), 4)


def test_a_header_alone_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "header"
    path.write_bytes(b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2mp41")
    with pytest.raises(MediaCorrupt, match="no frames"):
        sample(path, 4)


def test_a_truncated_clip_gives_the_frames_that_exist(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "cut.webm", 100, "VP80")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    clip = sample(path, 4)
    last = numbers(clip)[-1]
    assert 30 < last < 60
    assert numbers(clip) == uniform_positions(last + 1, 4)
    assert clip.duration_s == pytest.approx((last + 1) / 25, rel=0.02)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_a_truncated_clip_that_lost_its_index_is_corrupt(tmp_path: Path, suffix: str) -> None:
    path = write_clip(tmp_path / f"cut.{suffix}", 100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaCorrupt):
        sample(path, 4)


def test_damaged_pictures_inside_a_good_container_give_the_good_part(tmp_path: Path) -> None:
    content = bytearray(B_FRAMES.read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    middle = (start + end) // 2
    content[middle:end] = bytes(end - middle)
    path = tmp_path / "damaged"
    path.write_bytes(content)
    clip = sample(path, 4)
    assert numbers(clip) == sorted(set(numbers(clip)))
    assert 80 < numbers(clip)[-1] < 130


def test_flipped_bytes_give_frames_or_a_coded_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    path = tmp_path / "mutant"
    for original in (B_FRAMES, VARIABLE_RATE, write_clip(tmp_path / "m.avi", 12, "MJPG")):
        whole = original.read_bytes()
        for _ in range(12):
            content = bytearray(whole)
            for place in rng.integers(12, len(content), 12):
                content[place] = rng.integers(0, 256)
            path.write_bytes(content)
            assert outcome(path) in ("decoded", "media_corrupt", "media_too_large", "media_unsupported")


def outcome(path: Path) -> str:
    """Return the error's code, or "decoded"; anything without a code passes through and fails the test."""
    try:
        clip = sample(path, 3)
    except WorkerError as error:
        return error.code.value
    assert 1 <= len(clip.frames) <= 3
    return "decoded"


def test_rotation_is_applied(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "phone.mp4", 20)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # ISO 14496-12, 8.3.2: version 0, 9 fixed-point numbers
    quarter_turn = (0, 1 << 16, 0, -1 << 16, 0, 0, SIZE[1] << 16, 0, 1 << 30)
    content[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in quarter_turn)
    path.write_bytes(content)
    clip = sample(path, 2)
    assert clip.frames[0].size == (SIZE[1], SIZE[0])
    assert number_of(clip.frames[1].transpose(2)) == 19, "a quarter turn clockwise, undone"


def test_limits_are_the_policys(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 75)
    with pytest.raises(MediaTooLarge, match="the limit is 2 s"):
        sample(path, 4, MediaPolicy(frozenset(), max_video_seconds=2.0))
    with pytest.raises(MediaTooLarge, match="over 60 frames"):
        sample(path, 4, MediaPolicy(frozenset(), max_video_frames=60))
    with pytest.raises(MediaTooLarge, match="64×48 = 3072 pixels, the limit is 3071"):
        sample(path, 4, MediaPolicy(frozenset(), max_frame_pixels=3_071))
    with pytest.raises(MediaTooLarge, match="4 frames of 64×48 = 12288 pixels, the limit is 12287"):
        sample(path, 4, MediaPolicy(frozenset(), max_clip_pixels=12_287))
    exact = MediaPolicy(
        frozenset(), max_video_seconds=3.0, max_video_frames=75, max_frame_pixels=3_072, max_clip_pixels=12_288
    )
    assert len(sample(path, 4, exact).frames) == 4


def test_an_image_is_no_clip(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    with pytest.raises(MediaUnsupported, match="a video is due here, the object is a png image"):
        sample(path, 4)


@pytest.mark.parametrize("patience", [0, 1, 6, 9])
def test_a_job_is_stopped_while_it_indexes_and_while_it_decodes(watch, patience: int) -> None:
    opened = watch()
    calls = iter(range(patience))

    def should_stop() -> None:
        if next(calls, None) is None:
            raise Stopped

    with pytest.raises(Stopped):
        sample_clip(B_FRAMES, 100, POLICY, should_stop=should_stop)
    assert all(not capture.capture.isOpened() for capture in opened), "released"


def test_no_capture_stays_open(watch) -> None:
    opened = watch(last_frame=100)
    sample(B_FRAMES, 3)
    assert len(opened) > 1
    assert str(B_FRAMES) not in open_files()


def open_files() -> list[str]:
    return [os.path.realpath(handle) for handle in Path("/proc/self/fd").iterdir()]


def test_many_threads_sample_their_own_clips(tmp_path: Path) -> None:
    paths = [write_clip(tmp_path / f"{length}.mp4", length) for length in range(20, 36)]
    before = threading.active_count()
    with ThreadPoolExecutor(8) as pool:
        sampled = list(pool.map(lambda path: numbers(sample(path, 5)), paths))
    assert sampled == [uniform_positions(length, 5) for length in range(20, 36)]
    assert threading.active_count() <= before


def test_an_index_knows_key_frames_without_decoding() -> None:
    index = read_index(ClipFile(B_FRAMES), POLICY, should_stop=go_on)
    assert (index.num_frames, index.key_frames) == (240, (0, 60, 120, 180))
    assert [index.key_frame_before(position) for position in (-1, 0, 59, 60, 239)] == [None, 0, 0, 60, 180]


def test_ffmpeg_itself_refuses_playlists_under_our_environment(tmp_path: Path) -> None:
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{B_FRAMES}\n#EXT-X-ENDLIST\n")
    concat = tmp_path / "list.txt"
    concat.write_text(f"ffconcat version 1.0\nfile '{B_FRAMES}'\n")
    program = (
        "import sys\nfrom pathlib import Path\nfrom worker.media.clip import ClipFile\n"
        "from worker.media.clip_index import configure_opencv, open_capture\n"
        "configure_opencv()\nprint([open_capture(ClipFile(Path(path))).isOpened() for path in sys.argv[1:]])"
    )
    paths = [str(path) for path in (playlist, concat, B_FRAMES, VARIABLE_RATE, write_clip(tmp_path / "a.avi", 5))]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths],
        env={**os.environ, **FFMPEG_ENVIRONMENT}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[False, False, True, True, True]"
    assert done.stderr == ""


def test_every_error_that_opencv_raises_is_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: ClipFile) -> None:
        cv2.cvtColor(np.zeros((0, 0, 3), np.uint8), cv2.COLOR_BGR2RGB)

    monkeypatch.setattr(clip_reader, "open_capture", broken)
    with pytest.raises(MediaCorrupt, match="OpenCV error -215"):
        sample(B_FRAMES, 2)


def test_media_imports_no_torch() -> None:
    program = (
        "import sys, worker.media.fetch, worker.media.image, worker.media.video\n"
        "print(sorted({'torch', 'transformers', 'celery', 'redis'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8, 40, 64])
def test_frames_of_an_avi_that_are_coded_out_of_order_are_told_apart(num_frames: int) -> None:
    """The container gives times of decoding, which run ahead of showing: by them frames were one or two too early."""
    clip = sample(B_FRAMES_AVI, num_frames)
    assert numbers(clip) == uniform_positions(40, num_frames)
    assert clip.timestamps_s == pytest.approx([number / 25 for number in uniform_positions(40, num_frames)])
