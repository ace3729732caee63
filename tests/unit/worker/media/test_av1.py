"""AV1 clips: decoded by PyAV, in the decoders' confinement, as other clips are by OpenCV."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.corpus.blocks import box
from tests.unit.worker.media.drawn_clips import AV1, SIZE, drawn_frame, number_of
from tests.unit.worker.media.test_containers import MATRICES, cover, fixed, in_movie, with_matrix, with_pixel_aspect
from worker.errors import MediaCorrupt, MediaTooLarge, MediaUnsupported
from worker.media import clip_reader
from worker.media.decoder_process import DecodeLimits
from worker.media.decoders import Decoders
from worker.media.sniff import MediaKind
from worker.media.types import DecodedClip, MediaPolicy
from worker.media.video import sample_clip, uniform_positions

POLICY = MediaPolicy(frozenset())
NUM_FRAMES = 160
pytestmark = pytest.mark.skipif(
    not clip_reader.HAS_AV1 and "CI" not in os.environ, reason="PyAV is missing (the `av1` extra)"
)


class Stopped(Exception):
    """What a cancelled job's `should_stop` raises."""


def go_on() -> None:
    """A job that nobody cancels."""


def sample(path: Path, num_frames: int, policy: MediaPolicy = POLICY) -> DecodedClip:
    return sample_clip(path, num_frames, policy, should_stop=go_on)


def numbers(clip: DecodedClip) -> list[int]:
    return [number_of(frame) for frame in clip.frames]


def kept(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    decoders = Decoders(1, DecodeLimits(2 << 30, image_s=30.0, video_s=120.0))
    yield decoders
    decoders.close()


def written(container: str, times: list[int], *, codec: str = "libsvtav1", group: int = 40) -> bytes:
    """Drawn frames at these milliseconds."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as clip:
        stream = clip.add_stream(codec, rate=25, options={"preset": "10", "crf": "25", "g": str(group)})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time_ms in enumerate(times):
            frame = av.VideoFrame.from_ndarray(drawn_frame(number), format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode(None))
    return file.getvalue()


def test_the_tests_of_av1_have_what_decodes_it() -> None:
    assert clip_reader.HAS_AV1


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 31, 160, 200])
def test_av1_is_sampled_exactly_with_true_times(num_frames: int) -> None:
    clip = sample(AV1, num_frames)
    wanted = uniform_positions(NUM_FRAMES, num_frames)
    assert numbers(clip) == wanted
    assert clip.timestamps_s == pytest.approx([number / 25 for number in wanted], abs=0.002)
    assert (clip.fps, clip.duration_s) == (pytest.approx(25), pytest.approx(6.4))
    assert {frame.size for frame in clip.frames} == {SIZE}


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "webm"])
@pytest.mark.parametrize("start_ms", [0, 700])
def test_av1_of_a_variable_rate_is_sampled_exactly_in_every_container(
    tmp_path: Path, container: str, start_ms: int
) -> None:
    times = [start_ms + (n * 20 if n < 60 else 1200 + (n - 60) * 150) for n in range(100)]
    path = kept(tmp_path / "clip", written("mp4" if container == "mov" else container, times, group=25))
    if container == "mov":
        path.write_bytes(path.read_bytes().replace(b"ftypisom", b"ftypqt  "))
    for num_frames in (1, 2, 5, 17, 100):
        clip = sample(path, num_frames)
        wanted = uniform_positions(100, num_frames)
        assert numbers(clip) == wanted
        assert clip.timestamps_s == pytest.approx([(times[n] - times[0]) / 1000 for n in wanted], abs=0.002)


def test_av1_is_decoded_inside_the_confinement_without_a_thread(decoders: Decoders) -> None:
    clip = decoders.decode(AV1, MediaKind.VIDEO, 31, POLICY, should_stop=go_on)
    assert isinstance(clip, DecodedClip)
    assert numbers(clip) == uniform_positions(NUM_FRAMES, 31)
    (pid,) = decoders.pids
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    here = sample(AV1, 31)
    assert [one.tobytes() for one in clip.frames] == [one.tobytes() for one in here.frames]
    assert (clip.timestamps_s, clip.duration_s, clip.fps) == (here.timestamps_s, here.duration_s, here.fps)


def test_a_clip_with_cover_art_is_read_inside_the_confinement(decoders: Decoders, tmp_path: Path) -> None:
    path = kept(tmp_path / "clip", in_movie(AV1.read_bytes(), cover(), first=False))
    clip = decoders.decode(path, MediaKind.VIDEO, 2, POLICY, should_stop=go_on)
    assert isinstance(clip, DecodedClip)
    assert numbers(clip) == [0, 159]


@pytest.mark.parametrize("orientation", MATRICES)
def test_av1_is_turned_mirrored_and_made_square_like_every_clip(tmp_path: Path, orientation: int) -> None:
    matrix, transpose = MATRICES[orientation]
    wide = with_matrix(with_pixel_aspect(AV1.read_bytes(), 2, 1), fixed(matrix))
    seen = sample(kept(tmp_path / "clip", wide), 2).frames[1]
    wanted = Image.fromarray(drawn_frame(159)).resize((128, 48))
    wanted = wanted if transpose is None else wanted.transpose(transpose)
    assert seen.size == wanted.size
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(wanted)).mean() < 12


def test_av1_is_decoded_whatever_stands_in_the_metadata_of_its_track(tmp_path: Path) -> None:
    content = written("matroska", [n * 40 for n in range(20)])
    void = b"\xec\x01" + bytes(6) + b"\x02" + bytes(2)  # which the writer leaves in the track
    assert content.count(void, content.index(b"V_AV1"), content.index(b"\x63\xa2")) == 1
    broken = b"\x6d\x80\x88" + bytes(8)  # encodings of nothing
    path = kept(tmp_path / "clip", content.replace(void, broken))
    assert numbers(sample(path, 2)) == [0, 19]


def test_av1_is_known_in_a_file_of_very_many_boxes(tmp_path: Path) -> None:
    content = with_matrix(AV1.read_bytes(), fixed(MATRICES[2][0]))
    few, many = (sample(kept(tmp_path / "clip", content + box(b"free") * count), 2) for count in (0, 120_000))
    assert [frame.tobytes() for frame in many.frames] == [frame.tobytes() for frame in few.frames]


def test_the_limits_of_av1_are_the_policys() -> None:
    with pytest.raises(MediaTooLarge, match="the limit is 6 s"):
        sample(AV1, 4, MediaPolicy(frozenset(), max_video_seconds=6.0))
    with pytest.raises(MediaTooLarge, match="over 100 frames"):
        sample(AV1, 4, MediaPolicy(frozenset(), max_video_frames=100))
    with pytest.raises(MediaTooLarge, match="64×48 = 3072 pixels, the limit is 3071"):
        sample(AV1, 4, MediaPolicy(frozenset(), max_frame_pixels=3_071))
    with pytest.raises(MediaTooLarge, match="4 frames of 64×48 = 12288 pixels, the limit is 12287"):
        sample(AV1, 4, MediaPolicy(frozenset(), max_clip_pixels=12_287))


def test_damaged_av1_gives_the_good_part_or_is_corrupt(tmp_path: Path) -> None:
    content = AV1.read_bytes()
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    middle = (start + end) // 2
    clip = sample(kept(tmp_path / "half", content[:middle] + bytes(end - middle) + content[end:]), 4)
    assert numbers(clip) == sorted(set(numbers(clip)))
    assert 20 < numbers(clip)[-1] < 159
    with pytest.raises(MediaCorrupt, match="no frames that can be decoded"):
        sample(kept(tmp_path / "none", content[:start] + bytes(end - start) + content[end:]), 4)


def test_a_clip_that_only_opencv_opens_is_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clip_reader._AV_OPTIONS, "format_whitelist", "avi")
    with pytest.raises(MediaCorrupt, match="cannot be decoded"):
        sample(AV1, 4)


def test_flipped_bytes_of_av1_give_frames_or_a_coded_error(decoders: Decoders, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    whole = AV1.read_bytes()
    for _ in range(40):
        content = bytearray(whole)
        for place in rng.integers(12, len(content), 8):
            content[place] = rng.integers(0, 256)
        path = kept(tmp_path / "mutant", bytes(content))
        with suppress(MediaCorrupt, MediaTooLarge, MediaUnsupported):
            decoders.decode(path, MediaKind.VIDEO, 3, POLICY, should_stop=go_on)


@pytest.mark.parametrize("patience", [0, 3, 6, 8])
def test_a_job_is_stopped_while_av1_is_decoded(patience: int) -> None:
    calls = iter(range(patience))

    def should_stop() -> None:
        if next(calls, None) is None:
            raise Stopped

    with pytest.raises(Stopped):
        sample_clip(AV1, 100, POLICY, should_stop=should_stop)
