"""Clips by their containers: which side is up, how wide, whether there are pictures, and what only describes them."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.corpus.blocks import box, chunk, element, full_box
from tests.corpus.clips import avi, avi_list, mkv, replaced
from tests.corpus.images import saved
from tests.unit.worker.media.drawn_clips import AV1, B_FRAMES, SIZE, VARIABLE_RATE, drawn_frame, number_of, write_clip
from worker.errors import MediaCorrupt, MediaTooLarge, MediaUnsupported
from worker.media.types import DecodedClip, MediaPolicy
from worker.media.video import sample_clip

POLICY = MediaPolicy(frozenset())
ONE = 1 << 16
#: A display matrix as ISO 14496-12 has it (a, b, c, d) and what a player shows of a stored picture, by EXIF's number.
MATRICES: dict[int, tuple[tuple[int, int, int, int], Image.Transpose | None]] = {
    1: ((1, 0, 0, 1), None),
    2: ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
    3: ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
    4: ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
    5: ((0, 1, 1, 0), Image.Transpose.TRANSPOSE),
    6: ((0, 1, -1, 0), Image.Transpose.ROTATE_270),
    7: ((0, -1, -1, 0), Image.Transpose.TRANSVERSE),
    8: ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
}


def go_on() -> None:
    """A job that nobody cancels."""


@pytest.fixture
def sample(tmp_path: Path) -> Callable[..., DecodedClip]:
    def sampled(content: bytes, policy: MediaPolicy = POLICY) -> DecodedClip:
        path = tmp_path / "media-file"
        path.write_bytes(content)
        return sample_clip(path, 2, policy, should_stop=go_on)

    return sampled


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A clip of 20 drawn frames in every container."""
    directory = tmp_path_factory.mktemp("written")
    codecs = {"mp4": "mp4v", "mov": "mp4v", "mkv": "mp4v", "webm": "VP80", "avi": "MJPG"}
    return {name: write_clip(directory / f"clip.{name}", 20, codec).read_bytes() for name, codec in codecs.items()}


def shown(frame: np.ndarray, transpose: Image.Transpose | None) -> Image.Image:
    still = Image.fromarray(frame)
    return still if transpose is None else still.transpose(transpose)


def assert_shows(clip: DecodedClip, wanted: Image.Image) -> None:
    """The last frame, but for what a codec loses."""
    seen = clip.frames[-1]
    assert seen.size == wanted.size
    off = np.abs(np.asarray(seen).astype(int) - np.asarray(wanted)).mean()
    assert off < 12, f"on the average off by {off}"


def fixed(matrix: tuple[int, int, int, int], scale: float = 1) -> bytes:
    a, b, c, d = (round(number * ONE * scale) for number in matrix)
    return struct.pack(">9i", a, b, 0, c, d, 0, 64 * ONE, 48 * ONE, 1 << 30)


def with_matrix(content: bytes, matrix: bytes, *, of_movie: bool = False) -> bytes:
    """Put a matrix into the track's header, or the movie's (both of version 0)."""
    at = content.index(b"mvhd") + 40 if of_movie else content.index(b"tkhd") + 44
    return content[:at] + matrix + content[at + 36 :]


@pytest.mark.parametrize("container", ["mp4", "mov"])
@pytest.mark.parametrize("orientation", MATRICES)
def test_a_clip_is_turned_and_mirrored_as_its_matrix_says(sample, written, container: str, orientation: int) -> None:
    matrix, transpose = MATRICES[orientation]
    wanted = shown(drawn_frame(19), transpose)
    assert_shows(sample(with_matrix(written[container], fixed(matrix))), wanted)
    assert_shows(sample(with_matrix(written[container], fixed(matrix, 0.5))), wanted)
    assert_shows(sample(with_matrix(written[container], fixed(matrix), of_movie=True)), wanted)


@pytest.mark.parametrize("of_track", MATRICES)
@pytest.mark.parametrize("of_movie", MATRICES)
def test_a_tracks_matrix_comes_before_the_movies(sample, written, of_track: int, of_movie: int) -> None:
    (first, one), (then, other) = MATRICES[of_track], MATRICES[of_movie]
    content = with_matrix(with_matrix(written["mp4"], fixed(first)), fixed(then), of_movie=True)
    wanted = shown(drawn_frame(19), one)
    assert_shows(sample(content), wanted if other is None else wanted.transpose(other))


def test_a_matrix_in_a_header_of_version_1_counts_too(sample, written) -> None:
    def longer(body: bytes) -> bytes:
        created, changed, number, _, length = struct.unpack(">IIIII", body[4:24])
        head = b"\x01" + body[1:4] + struct.pack(">QQIIQ", created, changed, number, 0, length)
        return box(b"tkhd", head + body[24:40] + fixed(MATRICES[2][0]) + body[76:])

    content = in_tracks(written["mp4"], b"tkhd", longer)
    assert_shows(sample(content), shown(drawn_frame(19), Image.Transpose.FLIP_LEFT_RIGHT))


def in_tracks(content: bytes, kind: bytes, make: Callable[[bytes], bytes]) -> bytes:
    """Make boxes of this kind anew. Pictures stand before the tables, so their places stay right."""
    assert content.index(b"mdat") < content.index(b"moov")
    return replaced(content, kind, make)


def test_a_matrix_of_nothing_turns_nothing(sample, written) -> None:
    for matrix in (bytes(36), b"\xff" * 36):
        assert_shows(sample(with_matrix(written["mp4"], matrix)), shown(drawn_frame(19), None))


def posed(roll: float, yaw: float = 0.0, pitch: float = 0.0, kind: int = 0) -> bytes:
    pose = {b"\x76\x73": yaw, b"\x76\x74": pitch, b"\x76\x75": roll}
    parts = element(b"\x76\x71", bytes([kind]))
    parts += b"".join(element(number, struct.pack(">f", value)) for number, value in pose.items())
    return element(b"\x76\x70", parts)


def in_matroska(*video: bytes, size: tuple[int, int] = SIZE) -> bytes:
    """A Matroska file of drawn JPEGs, with elements in its track's video settings."""
    frames = [saved(Image.fromarray(drawn_frame(number)), "JPEG", quality=95) for number in range(20)]
    plain = mkv(frames, size=size)
    at = plain.index(b"\xba" + struct.pack(">Q", 4 | 1 << 56)) + 13
    content = bytearray(plain[:at] + b"".join(video) + plain[at:])
    added = len(content) - len(plain)
    for number in (b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae\x01\x00", b"\xe0\x01\x00"):
        place = content.index(number) + len(number.rstrip(b"\x01\x00"))
        (length,) = struct.unpack_from(">Q", content, place)
        struct.pack_into(">Q", content, place, length + added)
    return bytes(content)


@pytest.mark.parametrize(
    ("roll", "yaw", "orientation"),
    [(0, 0, 1), (-90, 0, 6), (90, 0, 8), (180, 0, 3), (-180, 0, 3), (0, 180, 2), (0, -180, 2), (180, 180, 4),
     (90, 180, 5), (-90, 180, 7)],
)  # fmt: skip
def test_a_matroska_clip_is_shown_in_its_pose(sample, roll: float, yaw: float, orientation: int) -> None:
    assert_shows(sample(in_matroska(posed(roll, yaw))), shown(drawn_frame(19), MATRICES[orientation][1]))


@pytest.mark.parametrize("pose", [posed(float("nan")), posed(90, pitch=45), posed(90, kind=1), posed(0, yaw=90)])
def test_a_pose_that_no_flat_picture_has_turns_nothing(sample, pose: bytes) -> None:
    assert_shows(sample(in_matroska(pose)), shown(drawn_frame(19), None))


def with_pixel_aspect(content: bytes, across: int, down: int) -> bytes:
    pasp = box(b"pasp", struct.pack(">II", across, down))

    def make(body: bytes) -> bytes:
        entry = body[8:]
        while (at := entry.find(b"pasp")) > 0:
            entry = entry[: at - 4] + entry[at + 12 :]
        return box(b"stsd", body[:8] + struct.pack(">I", len(entry) + len(pasp)) + entry[4:] + pasp)

    return in_tracks(content, b"stsd", make)


@pytest.mark.parametrize(
    ("across", "down", "width"), [(2, 1, 128), (1, 2, 32), (4, 3, 85), (16, 11, 93), (8, 9, 57), (1, 1, 64), (0, 0, 64)]
)
@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_pixels_are_shown_square_and_the_height_is_kept(
    sample, written, container: str, across: int, down: int, width: int
) -> None:
    clip = sample(with_pixel_aspect(written[container], across, down))
    assert_shows(clip, shown(drawn_frame(19), None).resize((width, 48)))


@pytest.mark.parametrize("orientation", MATRICES)
def test_pixels_are_made_square_before_the_picture_is_turned(sample, written, orientation: int) -> None:
    matrix, transpose = MATRICES[orientation]
    wide = with_matrix(with_pixel_aspect(written["mp4"], 2, 1), fixed(matrix))
    wanted = shown(drawn_frame(19), None).resize((128, 48))
    assert_shows(sample(wide), wanted if transpose is None else wanted.transpose(transpose))


def test_a_tracks_own_size_is_a_pixel_aspect_too(sample, written) -> None:
    content = in_tracks(written["mp4"], b"stsd", lambda body: without_aspect(body))
    at = content.index(b"tkhd") + 80
    wide = content[:at] + struct.pack(">II", 96 * ONE, 48 * ONE) + content[at + 8 :]
    assert_shows(sample(wide), shown(drawn_frame(19), None).resize((96, 48)))


def without_aspect(body: bytes) -> bytes:
    entry = body[8:]
    while (at := entry.find(b"pasp")) > 0:
        entry = entry[: at - 4] + entry[at + 12 :]
    return box(b"stsd", body[:8] + struct.pack(">I", len(entry)) + entry[4:])


def test_a_matroska_clips_display_size_is_a_pixel_aspect(sample) -> None:
    display = element(b"\x54\xb0", struct.pack(">I", 128)) + element(b"\x54\xba", struct.pack(">I", 48))
    assert_shows(sample(in_matroska(display)), shown(drawn_frame(19), None).resize((128, 48)))
    ratio = display + element(b"\x54\xb2", b"\x03")  # a display unit of "aspect ratio"
    assert_shows(sample(in_matroska(ratio)), shown(drawn_frame(19), None).resize((128, 48)))


def test_limits_count_what_is_shown_and_what_is_decoded(sample, written) -> None:
    wide, narrow = (with_pixel_aspect(written["mp4"], *aspect) for aspect in ((2, 1), (1, 2)))
    exact = MediaPolicy(frozenset(), max_frame_pixels=128 * 48, max_clip_pixels=2 * 128 * 48)
    assert sample(wide, exact).num_pixels == 2 * 128 * 48
    with pytest.raises(MediaTooLarge, match="128×48 = 6144 pixels, the limit is 6143"):
        sample(wide, MediaPolicy(frozenset(), max_frame_pixels=6_143))
    with pytest.raises(MediaTooLarge, match="2 frames of 128×48 = 12288 pixels, the limit is 12287"):
        sample(wide, MediaPolicy(frozenset(), max_clip_pixels=12_287))
    with pytest.raises(MediaTooLarge, match="64×48 = 3072 pixels, the limit is 3071"):
        sample(narrow, MediaPolicy(frozenset(), max_frame_pixels=3_071))
    with pytest.raises(MediaTooLarge, match="over 200 times"):
        sample(with_pixel_aspect(written["mp4"], 300, 1))
    with pytest.raises(MediaCorrupt, match="0×48 pixels"):
        sample(with_pixel_aspect(written["mp4"], 1, 100_000))


def a_track_of(content: bytes, handler: bytes, code: bytes) -> bytes:
    """Make the picture's track one of another kind."""
    content = in_tracks(content, b"hdlr", lambda body: box(b"hdlr", body[:8] + handler + body[12:]))
    return in_tracks(content, b"stsd", lambda body: box(b"stsd", body[:12] + code + body[16:]))


def cover(*, version: bool = True) -> bytes:
    picture = saved(Image.new("RGB", (64, 48), (0, 0, 255)), "JPEG")
    covr = box(b"covr", box(b"data", struct.pack(">II", 13, 0), picture))
    handler = full_box(b"hdlr", bytes(4), b"mdirappl", bytes(9))
    return box(b"udta", box(b"meta", bytes(4) if version else b"", handler, box(b"ilst", covr)))


def in_movie(content: bytes, added: bytes, *, first: bool = False) -> bytes:
    """Put a box into the movie, behind its header or as its last."""
    at = content.index(b"moov") + 4
    (length,) = struct.unpack_from(">I", content, at - 8)
    movie = content[at : at - 8 + length]
    (header,) = struct.unpack_from(">I", movie)
    movie = movie[:header] + added + movie[header:] if first else movie + added
    return content[: at - 8] + box(b"moov", movie) + content[at - 8 + length :]


def test_a_clip_without_a_picture_stream_is_unsupported_and_says_so(sample, written) -> None:
    sound = a_track_of(written["mp4"], b"soun", b"mp4a")
    with pytest.raises(MediaUnsupported, match=r"the mp4 video has no picture stream, only sound$"):
        sample(sound)
    with pytest.raises(MediaUnsupported, match="no picture stream, only sound and cover art"):
        sample(in_movie(sound, cover()))
    with pytest.raises(MediaUnsupported, match="the mov video has no picture stream"):
        sample(a_track_of(written["mov"], b"text", b"text"))
    with pytest.raises(MediaUnsupported, match="the matroska video has no picture stream, only sound"):
        sample(written["mkv"].replace(b"\x83\x81\x01", b"\x83\x81\x02"))
    with pytest.raises(MediaUnsupported, match="the avi video has no picture stream, only sound"):
        sample(written["avi"].replace(b"strh\x38\x00\x00\x00vids", b"strh\x38\x00\x00\x00auds"))


@pytest.mark.parametrize("first", [False, True], ids=["behind the track", "before the track"])
@pytest.mark.parametrize("version", [False, True], ids=["QuickTime", "ISO"])
def test_cover_art_alone_is_no_clip_and_never_taken_for_one(sample, written, first: bool, version: bool) -> None:
    sound = a_track_of(written["mp4"], b"soun", b"mp4a")
    with pytest.raises(MediaUnsupported, match="no picture stream"):
        sample(in_movie(sound, cover(version=version), first=first))
    clip = sample(in_movie(written["mp4"], cover(version=version), first=first))
    assert [number_of(frame) for frame in clip.frames] == [0, 19], "the clip's own pictures"


def test_pictures_of_chapters_are_no_clip(sample, written) -> None:
    def chapters(content: bytes) -> bytes:
        """A second track, of sound, that names the first as its chapters."""
        at = content.index(b"trak") - 4
        (length,) = struct.unpack_from(">I", content, at)
        track = bytearray(content[at : at + length])
        struct.pack_into(">I", track, track.index(b"tkhd") + 16, 2)
        track[track.index(b"vide") : track.index(b"vide") + 4] = b"soun"
        reference = box(b"tref", box(b"chap", struct.pack(">I", 1)))
        return in_movie(content, box(b"trak", bytes(track[8:]), reference))

    with pytest.raises(MediaUnsupported, match="no picture stream"):
        sample(chapters(written["mp4"]))


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (b"vvc1", r"H.266 \(VVC\) \(vvc1\)"),
        (b"evc1", "EVC"),
        (b"zzzz", "zzzz"),
        (b"aprn", "ProRes RAW"),
        (b"\x00\xff\n\x01", "codec"),
    ],
)
def test_a_codec_that_is_not_decoded_is_named(sample, written, code: bytes, named: str) -> None:
    def make(body: bytes) -> bytes:  # without what follows the 86 bytes of the entry, which tells the codec again
        return box(b"stsd", body[:8] + struct.pack(">I", 86) + code + body[16:94])

    with pytest.raises(MediaUnsupported, match=named):
        sample(in_tracks(written["mp4"], b"stsd", make))


def test_a_codec_that_is_not_decoded_is_named_in_other_containers_too(sample, written) -> None:
    frames = [saved(Image.fromarray(drawn_frame(0)), "JPEG")] * 3
    with pytest.raises(MediaUnsupported, match="the matroska video's codec V_NONE is not decoded"):
        sample(mkv(frames, codec=b"V_NONE"))
    with pytest.raises(MediaUnsupported, match="the avi video's codec ZZZZ is not decoded"):
        sample(avi(frames).replace(b"MJPG", b"ZZZZ"))


def test_an_encrypted_clip_is_unsupported_and_never_shown_as_noise(sample, written) -> None:
    def make(body: bytes) -> bytes:
        entry = body[8:]
        hidden = box(b"sinf", box(b"frma", entry[4:8]), full_box(b"schm", b"cenc", bytes(4)))
        return box(b"stsd", body[:8] + struct.pack(">I", len(entry) + len(hidden)) + b"encv" + entry[8:] + hidden)

    with pytest.raises(MediaUnsupported, match=r"the mp4 video is encrypted \(codec MPEG-4 Visual \(mp4v\)\)"):
        sample(in_tracks(written["mp4"], b"stsd", make))


def test_what_is_broken_stays_corrupt(sample, written) -> None:
    for content in (written["mp4"][:1000], b"\x00\x00\x00\x18ftypisom" + bytes(12), written["mkv"][:60]):
        with pytest.raises(MediaCorrupt):
            sample(content)
    h264 = B_FRAMES.read_bytes()
    start, end = h264.index(b"mdat") + 4, h264.index(b"moov") - 4
    with pytest.raises(MediaCorrupt):
        sample(h264[:start] + bytes(end - start) + h264[end:])


BROKEN = {
    "text": box(b"udta", box(b"\xa9nam", b"\xff\xff\x00\x00")),
    "cover without a picture": box(b"udta", full_box(b"meta", box(b"ilst", box(b"covr", box(b"data", bytes(8)))))),
    "cover that ends early": box(b"udta", full_box(b"meta", box(b"ilst", box(b"covr", b"\x00\x00\xff\xffdata")))),
    "a length beyond": box(b"udta", b"\x7f\xff\xff\xffmeta" + bytes(20)),
    "a length of 1": box(b"udta", b"\x00\x00\x00\x01meta" + b"\xff" * 8),
    "lengths of 0": box(b"udta", bytes(64)),
    "keys of many": box(b"meta", full_box(b"hdlr", bytes(4), b"mdta", bytes(12)), full_box(b"keys", b"\xff" * 8)),
    "keys without names": box(b"meta", full_box(b"keys", struct.pack(">I", 2), struct.pack(">I4s", 4, b"mdta"))),
    "a nested meta": box(b"udta", full_box(b"meta", full_box(b"meta", full_box(b"meta", b"\xff" * 40)))),
    "chapters": box(b"udta", box(b"chpl", b"\x01\x00\x00\x00" + b"\xff" * 40)),
    "chapters cut": box(b"udta", box(b"chpl", b"\x01")),
    "place": box(b"udta", box(b"\xa9xyz", b"\xff\xff")),
    "a camera's": box(b"udta", box(b"SDLN"), box(b"smrd"), box(b"CAME", b"\x01"), box(b"gsst", b"\xff" * 9)),
    "loudness": box(b"udta", full_box(b"ludt", b"\xff" * 30)),
    "rights": box(b"udta", full_box(b"cprt", b"\xff")),
    "XMP": box(b"udta", box(b"XMP_", b"\xff" * 2000)),
    "custom": box(b"udta", full_box(b"meta", box(b"ilst", box(b"----", box(b"mean"), box(b"name"), box(b"data"))))),
    "an id": box(b"uuid", b"\xff" * 4),
}  # fmt: skip


@pytest.mark.parametrize("first", [False, True], ids=["behind the track", "before the track"])
@pytest.mark.parametrize("metadata", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_metadata_of_a_clip_never_reject_its_pictures(
    sample, written, container: str, metadata: bytes, first: bool
) -> None:
    for content in (in_movie(written[container], metadata, first=first), written[container] + metadata):
        clip = sample(content)
        assert [number_of(frame) for frame in clip.frames] == [0, 19]


def beside(kind: bytes, metadata: bytes) -> Callable[[bytes], bytes]:
    """Put a box behind each one of a kind."""
    return lambda content: in_tracks(content, kind, lambda body: box(kind, body) + metadata)


def described_by(metadata: bytes) -> Callable[[bytes], bytes]:
    """Put a box behind those of the description of the pictures."""

    def longer(body: bytes) -> bytes:
        (length,) = struct.unpack_from(">I", body, 8)
        return box(b"stsd", body[:8] + box(body[12:16], body[16 : 8 + length] + metadata) + body[8 + length :])

    return lambda content: in_tracks(content, b"stsd", longer)


DEEP = {
    "keys of a movie in clear": beside(b"mvhd", box(b"pssh", b"\xff" * 40)),
    "an id of a track": beside(b"mdhd", box(b"uuid", bytes(8))),
    "dependencies": beside(b"stsz", box(b"sdtp")),
    **{
        f"{name} of pictures": described_by(box(name.encode(), b"\x01"))
        for name in ("clli", "CoLL", "mdcv", "SmDm", "amve", "dvcC", "dvvC", "fiel", "hfov", "vexu", "st3d", "sv3d")
    },
    "an id of pictures": described_by(box(b"uuid", bytes(8))),
    "layers of pictures": described_by(box(b"vexu", b"\xff" * 40)),
    "a pixel aspect cut": described_by(box(b"pasp", b"\x00")),
    "no pixel aspect": described_by(box(b"pasp")),
}


@pytest.mark.parametrize("describe", DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_metadata_inside_a_track_never_reject_its_pictures(
    sample, written, container: str, describe: Callable[[bytes], bytes]
) -> None:
    clip = sample(describe(written[container]))
    assert [number_of(frame) for frame in clip.frames] == [0, 19]
    assert clip.frames[0].size == SIZE


def test_streams_of_real_encoders_are_read_as_before() -> None:
    for path, num_frames in ((B_FRAMES, 240), (VARIABLE_RATE, 160)):
        assert number_of(sample_clip(path, 2, POLICY, should_stop=go_on).frames[1]) == num_frames - 1


def test_an_avi_of_sound_beside_pictures_is_a_clip(sample) -> None:
    frames = [saved(Image.fromarray(drawn_frame(number)), "JPEG", quality=95) for number in range(4)]
    sound = struct.pack("<4s4sIIIIIIIIII8x", b"auds", bytes(4), 0, 0, 0, 1, 8000, 0, 0, 0, 0, 1)
    form = struct.pack("<HHIIHH", 1, 1, 8000, 8000, 1, 8)
    both = avi(frames, avi_list(b"strl", chunk(b"strh", sound) + chunk(b"strf", form)), size=SIZE)
    assert [number_of(frame) for frame in sample(both).frames] == [0, 3]


REFUSED = """
import sys
from pathlib import Path
sys.modules["av"] = None
from worker.errors import MediaUnsupported
from worker.media.types import MediaPolicy
from worker.media.video import sample_clip
try:
    sample_clip(Path(sys.argv[1]), 2, MediaPolicy(frozenset()), should_stop=lambda: None)
except MediaUnsupported as error:
    print(error)
"""


def test_without_pyav_an_av1_clip_is_refused_with_the_codec_and_the_remedy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(AV1)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == (
        "the mp4 video's codec AV1 (av01) is not decoded: install the `av1` extra to decode it"
    )
