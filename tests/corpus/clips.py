"""Clips: lying counts, sizes and times, loops of structure, bombs inside frames."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from tests.corpus.blocks import box, chunk, element, full_box
from tests.corpus.case import ANY, DECODED, REFUSED, TOO_LARGE, UNSUPPORTED, Case, clip
from tests.corpus.images import saved, textured
from worker.media.clip_reader import HAS_AV1

H264 = Path(__file__).parents[1] / "unit" / "worker" / "media" / "clips"
AV1 = H264.parent / "clips_av1" / "av1.mp4"
FRAMES = 12
CODECS = {"mp4": "mp4v", "mov": "mp4v", "mjpeg.avi": "MJPG", "xvid.avi": "XVID", "mkv": "mp4v", "webm": "VP80"}
UNKNOWN_SIZE = b"\x01\xff\xff\xff\xff\xff\xff\xff"


@cache
def bases() -> dict[str, bytes]:
    """One good clip of every container and codec at hand."""
    with tempfile.TemporaryDirectory() as directory:
        written = {name: _written(Path(directory) / f"clip.{name}", codec) for name, codec in CODECS.items()}
    return written | {path.name: path.read_bytes() for path in (*sorted(H264.iterdir()), AV1)}


def _written(path: Path, codec: str) -> bytes:
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), 25.0, (64, 48))
    for number in range(FRAMES):
        writer.write(np.full((48, 64, 3), 20 * number, np.uint8))
    writer.release()
    return path.read_bytes()


def avi(
    frames: list[bytes], *extra: bytes, size: tuple[int, int] = (48, 40), rate: int = 25, index: bytes = b""
) -> bytes:
    """A Motion JPEG AVI by hand; `extra` are stream lists and come behind the picture's."""
    main = struct.pack("<14I", 40_000, 0, 0, 0x10, len(frames), 0, 1 + len(extra), 0, *size, 0, 0, 0, 0)
    stream = struct.pack("<4s4sIIIIIIIIII8x", b"vids", b"MJPG", 0, 0, 0, 1, rate, 0, len(frames), 0, 0, 0)
    form = struct.pack("<IiiHH4sIIIII", 40, *size, 1, 24, b"MJPG", 0, 0, 0, 0, 0)
    header = chunk(b"avih", main) + avi_list(b"strl", chunk(b"strh", stream) + chunk(b"strf", form)) + b"".join(extra)
    movie = b"".join(frame if frame[2:4] == b"tx" else chunk(b"00dc", frame) for frame in frames)
    body = b"AVI " + avi_list(b"hdrl", header) + avi_list(b"movi", movie) + (chunk(b"idx1", index) if index else b"")
    return chunk(b"RIFF", body)


def avi_list(kind: bytes, body: bytes) -> bytes:
    return chunk(b"LIST", kind + body)


def mkv(
    blocks: list[bytes], *extra: bytes, codec: bytes = b"V_MJPEG", size: tuple[int, int] = (48, 40), ends: bool = True
) -> bytes:
    """A Matroska file by hand; `extra` elements come before the pictures. Without `ends`, sizes are unknown."""
    head = element(b"\x1a\x45\xdf\xa3", element(b"\x42\x82", b"matroska"))
    picture = element(b"\xb0", struct.pack(">I", size[0])) + element(b"\xba", struct.pack(">I", size[1]))
    track = element(b"\xd7", b"\x01") + element(b"\x73\xc5", b"\x01") + element(b"\x83", b"\x01")
    tracks = element(b"\x16\x54\xae\x6b", element(b"\xae", track + element(b"\x86", codec) + element(b"\xe0", picture)))
    simple = b"".join(element(b"\xa3", b"\x81" + struct.pack(">h", 40 * n) + b"\x80" + b) for n, b in enumerate(blocks))
    size_of = None if ends else UNKNOWN_SIZE
    cluster = element(b"\x1f\x43\xb6\x75", element(b"\xe7", b"\x00") + simple, size_of)
    info = element(b"\x15\x49\xa9\x66", element(b"\x2a\xd7\xb1", struct.pack(">I", 1_000_000)))
    return head + element(b"\x18\x53\x80\x67", info + tracks + b"".join(extra) + cluster, size_of)


def replaced(content: bytes, kind: bytes, make: Callable[[bytes], bytes]) -> bytes:
    """Return an MP4 with each box of this kind made anew from its content; the boxes around it fit again."""
    made, at = b"", 0
    while at + 8 <= len(content):
        length, found = struct.unpack_from(">I", content, at)[0], content[at + 4 : at + 8]
        body = content[at + 8 : at + length]
        if found == kind:
            made += make(body)
        elif found in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"edts"):
            made += box(found, replaced(body, kind, make))
        else:
            made += content[at : at + length]
        at += length
    return made


def by_hand() -> Iterator[Case]:
    """Well-formed clips of our own make: so that the hostile ones fail for what is wrong in them."""
    frames = [saved(textured(), "JPEG")] * 6
    yield clip("hand-made.avi", avi(frames), DECODED)
    yield clip("hand-made.mkv", mkv(frames), DECODED)
    yield clip("hand-made-unknown-sizes.mkv", mkv(frames, ends=False), DECODED)
    for name, content in bases().items():
        yield clip(f"whole-{name}", content, DECODED if name != AV1.name or HAS_AV1 else UNSUPPORTED)
    yield from _without_pictures()
    yield from _described()


def _without_pictures() -> Iterator[Case]:
    """Sound alone, with a cover and without, and what is under lock."""
    sound = replaced(bases()["mp4"], b"hdlr", lambda body: box(b"hdlr", body[:8] + b"soun" + body[12:]))
    yield clip("sound.mp4", sound, UNSUPPORTED)
    yield clip("sound-with-cover.mp4", with_cover(sound), UNSUPPORTED)
    yield clip("sound.avi", bases()["mjpeg.avi"].replace(b"vids", b"auds"), UNSUPPORTED)
    yield clip(
        "locked.mp4",
        replaced(bases()["mp4"], b"stsd", lambda body: box(b"stsd", body.replace(b"mp4v", b"encv", 1))),
        UNSUPPORTED,
    )


def _described() -> Iterator[Case]:
    """Covers and metadata beside pictures, whole and broken."""
    whole = bases()["mp4"]
    yield clip("cover.mp4", with_cover(whole), DECODED)
    for number, broken in enumerate((b"\x7f\xff\xff\xffmeta", box(b"meta", b"\xff" * 90), box(b"covr", b"\xff" * 9))):
        added = box(b"udta", broken)
        yield clip(
            f"broken-{number}.mp4",
            replaced(whole, b"mvhd", lambda body, added=added: box(b"mvhd", body) + added),
            DECODED,
        )


def with_cover(content: bytes) -> bytes:
    """An MP4 with a picture in its metadata, before its tracks."""
    picture = box(b"covr", box(b"data", struct.pack(">II", 13, 0), saved(textured(), "JPEG")))
    described = box(
        b"udta", full_box(b"meta", full_box(b"hdlr", bytes(4), b"mdirappl", bytes(9)), box(b"ilst", picture))
    )
    return replaced(content, b"mvhd", lambda body: box(b"mvhd", body) + described)


def lies_and_loops() -> Iterator[Case]:
    """All of them must end, and soon, in little memory."""
    yield from _lying_boxes()
    yield from _looping_boxes()
    yield from _lying_avis()
    yield from _lying_matroskas()
    yield from _frame_bombs()


def _lying_boxes() -> Iterator[Case]:
    whole = bases()["mp4"]
    most = 0xFFFFFFFF
    tables: dict[str, tuple[bytes, bytes]] = {
        "samples-constant-size": (b"stsz", struct.pack(">III", 0, 1, most)),
        "samples-many": (b"stsz", struct.pack(">III", 0, 0, most)),
        "samples-huge": (b"stsz", struct.pack(">III", 0, most, 12)),
        "times-many": (b"stts", struct.pack(">III", 0, most, 1)),
        "times-repeat": (b"stts", struct.pack(">IIII", 0, 1, most, 1)),
        "times-repeat-often": (b"stts", struct.pack(">II", 0, 1000) + struct.pack(">II", most, 1) * 1000),
        "times-zero": (b"stts", struct.pack(">IIII", 0, 1, 12, 0)),
        "times-giant": (b"stts", struct.pack(">IIII", 0, 1, 12, 0x7FFFFFFF)),
        "chunks-many": (b"stco", struct.pack(">II", 0, most)),
        "chunks-far": (b"stco", struct.pack(">III", 0, 1, 0x7FFFFFFF)),
        "chunks-own": (b"stco", struct.pack(">II", 0, 12) + bytes(48)),
        "chunk-runs": (b"stsc", struct.pack(">II", 0, 3) + struct.pack(">III", 1, most, 1) * 3),
        "chunk-runs-back": (b"stsc", struct.pack(">II", 0, 2) + struct.pack(">IIIIII", 9, 1, 1, 1, 1, 1)),
        "clock-zero": (b"mdhd", struct.pack(">IIIIII", 0, 0, 0, 0, most, 0)),
        "clock-one": (b"mdhd", struct.pack(">IIIIII", 0, 0, 0, 1, most, 0)),
        "clock-fast": (b"mdhd", struct.pack(">IIIIII", 0, 0, 0, most, 1, 0)),
        "edits-many": (b"elst", struct.pack(">II", 0, most) + bytes(24)),
        "edits-endless": (b"elst", struct.pack(">II", 0, 500) + struct.pack(">III", most, 0, 1 << 16) * 500),
        "descriptions-many": (b"stsd", struct.pack(">II", 0, most)),
    }  # fmt: skip
    for name, (kind, body) in tables.items():
        yield clip(f"lie-{name}.mp4", replaced(whole, kind, lambda _, kind=kind, body=body: box(kind, body)), *ANY)

    def sized(width: int, height: int) -> Callable[[bytes], bytes]:
        def make(body: bytes) -> bytes:
            return box(b"stsd", body[:40] + struct.pack(">HH", width, height) + body[44:])

        return make

    for size in ((65_535, 65_535), (1, 65_535), (0, 0), (65_535, 48)):
        yield clip(f"lie-size-{size[0]}x{size[1]}.mp4", replaced(whole, b"stsd", sized(*size)), *ANY)
    far = struct.pack(">I", 1) + b"mdat" + struct.pack(">Q", 1 << 62)
    yield clip("lie-length-of-2-to-62.mp4", box(b"ftyp", b"isom" + bytes(4)) + far + bytes(100), *REFUSED)
    yield clip("lie-codec.mp4", whole.replace(b"mp4v", b"prob"), *ANY)
    yield clip("lie-other-codec.mp4", whole.replace(b"mp4v", b"avc1"), *ANY)


def _looping_boxes() -> Iterator[Case]:
    head = box(b"ftyp", b"isom" + bytes(4))
    nested = b""
    for _ in range(2000):
        nested = box(b"moov", nested)
    whole = bases()["mp4"]
    movie = whole[whole.index(b"moov") - 4 :]
    yield clip("loop-nested.mp4", head + nested, *REFUSED)
    yield clip("loop-length-0.mp4", head + struct.pack(">I", 0) + b"moov" + struct.pack(">I", 0) + b"trak", *REFUSED)
    yield clip("loop-length-8.mp4", head + box(b"free") * 200_000, *REFUSED)
    yield clip("loop-length-1.mp4", head + struct.pack(">I", 1) + b"moov" + struct.pack(">Q", 8), *REFUSED)
    yield clip("loop-many-movies.mp4", whole + movie * 500, *ANY)
    yield clip("loop-many-tracks.mp4", head + box(b"moov", *[movie[8:]] * 300), *ANY)
    fragment = box(b"moof", box(b"traf", full_box(b"tfhd", struct.pack(">I", 1)), _run(0xFFFFFFFF)))
    yield clip("loop-fragments.mp4", whole + fragment * 1000, *ANY)
    yield clip("loop-index.mp4", whole + full_box(b"sidx", struct.pack(">IIIIHH", 1, 1, 0, 0, 0, 65_535)) * 20, *ANY)
    metadata = box(b"udta", full_box(b"meta", box(b"ilst", *[box(b"\xa9nam", bytes(100))] * 5000)))
    yield clip("loop-metadata.mp4", replaced(whole, b"mvhd", lambda body: box(b"mvhd", body) + metadata), *ANY)


def _run(count: int) -> bytes:
    return box(b"trun", struct.pack(">II", 0, count))


def _lying_avis() -> Iterator[Case]:
    frames = [saved(textured(), "JPEG")] * 6
    wrong = b"".join(struct.pack("<4sIII", b"00dc", 0x10, 0xFFFFFFF0 - n, 0xFFFFFFFF) for n in range(100))
    backwards = b"".join(struct.pack("<4sIII", b"00dc", 0x10, 4, 100) for _ in range(100_000))
    super_index = chunk(b"indx", struct.pack("<HBBI4s12x", 4, 0, 0, 100, b"00dc") + struct.pack("<QII", 12, 8, 1) * 100)
    yield clip("lie-index.avi", avi(frames, index=wrong), *ANY)
    yield clip("lie-index-same-place.avi", avi(frames, index=backwards), *ANY)
    yield clip("loop-super-index.avi", avi(frames, avi_list(b"strl", super_index)), *ANY)
    yield clip("lie-rate.avi", avi(frames, rate=0xFFFFFFFF), *ANY)
    yield clip("lie-rate-zero.avi", avi(frames, rate=0), *ANY)
    yield clip("lie-size.avi", avi(frames, size=(65_535, 65_535)), *ANY)
    yield clip("lie-thin.avi", avi(frames, size=(1, 65_535)), *ANY)
    yield clip("many-streams.avi", avi(frames, *[avi_list(b"strl", chunk(b"strh", bytes(56)))] * 3000), *ANY)
    yield clip("no-frames.avi", avi([]), *REFUSED)
    yield clip("empty-frames.avi", avi([b""] * 20_000), *ANY)
    yield clip("broken-frames.avi", avi([b"\xff\xd8\xff\xdb"] * 100), *ANY)
    yield clip("one-frame.avi", avi(frames[:1]), DECODED)


def _lying_matroskas() -> Iterator[Case]:
    frames = [saved(textured(), "JPEG")] * 6
    huge = b"\x01\xff\xff\xff\xff\xff\xff\xfe"
    nested = b""
    for _ in range(2000):
        nested = element(b"\xae", nested)
    laced = b"\x81\x00\x00\x86\xff" + b"\xff" * 2000
    ebml = element(b"\x1a\x45\xdf\xa3", element(b"\x42\x82", b"webm"))
    yield clip("lie-size-of-2-to-56.mkv", ebml + b"\x18\x53\x80\x67" + huge + bytes(100), *REFUSED)
    yield clip("loop-unknown-sizes.mkv", ebml + (b"\x18\x53\x80\x67" + UNKNOWN_SIZE) * 20_000, *REFUSED)
    yield clip("loop-nested.mkv", mkv(frames, nested), *ANY)
    yield clip("loop-voids.mkv", mkv(frames, element(b"\xec", b"") * 100_000), *ANY)
    yield clip("lie-lacing.mkv", mkv([laced]), *REFUSED)
    yield clip("lie-size.mkv", mkv(frames, size=(0xFFFFFFFF, 0xFFFFFFFF)), *ANY)
    yield clip("lie-thin.mkv", mkv(frames, size=(65_535, 1)), *ANY)
    yield clip("lie-codec.mkv", mkv(frames, codec=b"V_VP9"), *ANY)
    yield clip("unknown-codec.mkv", mkv(frames, codec=b"V_NONE"), *REFUSED)
    yield clip("endless-codec-name.mkv", mkv(frames, codec=b"V" * 1_000_000), *ANY)
    seek = element(b"\x4d\xbb", element(b"\x53\xab", b"\x11\x4d\x9b\x74") + element(b"\x53\xac", b"\x00"))
    yield clip("loop-seek-head.mkv", mkv(frames, element(b"\x11\x4d\x9b\x74", seek * 500)), *ANY)
    attached = element(b"\x61\xa7", element(b"\x46\x6e", b"../../etc/passwd") + element(b"\x46\x5c", bytes(1 << 20)))
    yield clip("attachments.mkv", mkv(frames, element(b"\x19\x41\xa4\x69", attached * 3)), *ANY)


def _frame_bombs() -> Iterator[Case]:
    """Pictures inside a clip that are other than its header says."""
    small = saved(textured(), "JPEG")
    jpeg = bytearray(small)
    frame_at = small.index(b"\xff\xc0") + 5
    struct.pack_into(">HH", jpeg, frame_at, 30_000, 30_000)
    lying = bytes(jpeg)
    sizes = [saved(Image.new("RGB", (16 * n, 16 * n), (9 * n, 0, 0)), "JPEG") for n in range(1, 20)]
    large = saved(Image.new("RGB", (8000, 4400)), "JPEG", quality=10)
    yield clip("bomb-first-frame.avi", avi([lying] * 6), *REFUSED)
    yield clip("bomb-later-frame.avi", avi([small] * 3 + [lying] * 3), *ANY)
    yield clip("bomb-first-frame.mkv", mkv([lying] * 6), *REFUSED)
    yield clip("growing-frames.avi", avi(sizes), *ANY)
    yield clip("large-later-frame.avi", avi([small] * 3 + [large] * 3), TOO_LARGE, *ANY)
    yield clip("large-frames.mkv", mkv([large] * 3, size=(8000, 4400)), TOO_LARGE)
