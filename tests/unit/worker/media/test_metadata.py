"""Stills whose metadata are broken, huge or bombs: the pixels come whole; and pixels that are not whole never come."""

from __future__ import annotations

import io
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.corpus.blocks import PNG_MAGIC, chunk, png, png_chunk
from worker.errors import MediaCorrupt, MediaUnsupported
from worker.media.image import decode_image
from worker.media.types import MediaPolicy

POLICY = MediaPolicy(frozenset())
Decode = Callable[[bytes], Image.Image]
MEBIBYTE = 1 << 20
QUARTER_TURN = 6
#: An EXIF block of one entry, the orientation.
EXIF = b"II*\x00" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, QUARTER_TURN, 0)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.fixture
def decode(tmp_path: Path) -> Decode:
    def decoded(content: bytes) -> Image.Image:
        path = tmp_path / "media-file"
        path.write_bytes(content)
        return decode_image(path, POLICY).pixels

    return decoded


def picture(size: tuple[int, int] = (90, 70), mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(4).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size[0], size[1])).convert(mode)


def saved(still: Image.Image, pillow_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    still.save(file, pillow_format, **options)
    return file.getvalue()


def with_chunks(*chunks: bytes, behind: bool = False) -> bytes:
    """A PNG with chunks before its pixels, or behind them."""
    whole = saved(picture(), "PNG")
    at = whole.index(b"IEND") - 4 if behind else whole.index(b"IDAT") - 4
    return whole[:at] + b"".join(chunks) + whole[at:]


def with_segments(*segments: bytes, **options: Any) -> bytes:
    """A JPEG with segments before all others."""
    whole = saved(picture(), "JPEG", **options)
    return whole[:2] + b"".join(segments) + whole[2:]


def segment(marker: int, body: bytes, length: int | None = None) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2 if length is None else length) + body


ZEROS = zlib.compress(bytes(200 * MEBIBYTE), 9)
BROKEN_CHECKSUM = png_chunk(b"tEXt", b"a\x00b")[:-4] + bytes(4)
PNG_METADATA = {
    "zTXt over 1 MiB": png_chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(2 * MEBIBYTE))),
    "zTXt bomb": png_chunk(b"zTXt", b"Comment\x00\x00" + ZEROS),
    "iTXt bomb": png_chunk(b"iTXt", b"Comment\x00\x01\x00\x00\x00" + ZEROS),
    "XMP bomb": png_chunk(b"iTXt", b"XML:com.adobe.xmp\x00\x01\x00\x00\x00" + ZEROS),
    "EXIF profile bomb": png_chunk(b"zTXt", b"Raw profile type exif\x00\x00" + ZEROS),
    "iCCP bomb": png_chunk(b"iCCP", b"icc\x00\x00" + ZEROS),
    "iCCP over 1 MiB": png_chunk(b"iCCP", b"icc\x00\x00" + zlib.compress(bytes(2 * MEBIBYTE))),
    "iCCP broken": png_chunk(b"iCCP", b"icc\x00\x00no deflate"),
    "iCCP of an unknown method": png_chunk(b"iCCP", b"icc\x00\x07xyz"),
    "iCCP empty": png_chunk(b"iCCP", b""),
    "text of 70 MiB": png_chunk(b"tEXt", b"a\x00" + b"x" * (900 << 10)) * 30,
    "iTXt cut": png_chunk(b"iTXt", b"XML:com.adobe.xmp\x00\x01"),
    "iTXt broken": png_chunk(b"iTXt", b"XML:com.adobe.xmp\x00\x01\x00\x00\x00nonsense"),
    "zTXt of an unknown method": png_chunk(b"zTXt", b"Comment\x00\x09abc"),
    "eXIf nonsense": png_chunk(b"eXIf", b"MM\x00*\xff\xff\xff\xff"),
    "eXIf empty": png_chunk(b"eXIf", b""),
    "pHYs short": png_chunk(b"pHYs", b"\x01"),
    "gAMA short": png_chunk(b"gAMA", b""),
    "cHRM short": png_chunk(b"cHRM", b"\x00"),
    "sRGB empty": png_chunk(b"sRGB", b""),
    "tIME short": png_chunk(b"tIME", b"1"),
    "acTL short": png_chunk(b"acTL", b""),
    "acTL of no frames": png_chunk(b"acTL", bytes(8)),
    "fcTL nonsense": png_chunk(b"acTL", struct.pack(">II", 2, 0)) + png_chunk(b"fcTL", b"\xff" * 26),
    "a wrong checksum": BROKEN_CHECKSUM,
    "transparency of the wrong length": png_chunk(b"tRNS", b"\x00"),
    "an unknown chunk": png_chunk(b"qqQq", b"?" * 100),
    "many chunks": png_chunk(b"tEXt", b"a\x00b") * 50_000,
    "a length beyond the file": struct.pack(">I4s", 0x7FFFFFFF, b"tEXt") + b"a\x00b" + bytes(4),
}


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind the pixels"])
@pytest.mark.parametrize("metadata", PNG_METADATA.values(), ids=PNG_METADATA)
def test_png_metadata_never_reject_pixels(decode: Decode, metadata: bytes, behind: bool) -> None:
    assert decode(with_chunks(metadata, behind=behind)).tobytes() == picture().tobytes()


def test_metadata_bombs_are_stepped_over_and_not_unpacked(decode: Decode) -> None:
    content = with_chunks(*[body for name, body in PNG_METADATA.items() if "bomb" in name] * 20)
    before, started_at = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    decode(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"
    assert time.process_time() - started_at < 5


ORIENTED = {
    "eXIf": png_chunk(b"eXIf", EXIF),
    "EXIF profile": png_chunk(
        b"zTXt", b"Raw profile type exif\x00\x00" + zlib.compress(b"\nexif\n 26\n" + EXIF.hex().encode())
    ),
    "APP1 profile": png_chunk(
        b"tEXt", b"Raw profile type APP1\x00\nexif\n 32\n" + (b"Exif\x00\x00" + EXIF).hex().encode() + b"\n"
    ),
    "XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\x00\x00\x00\x00\x00" + XMP),
    "XMP packed": png_chunk(b"iTXt", b"XML:com.adobe.xmp\x00\x01\x00\x00\x00" + zlib.compress(XMP)),
}  # fmt: skip


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind the pixels"])
@pytest.mark.parametrize("oriented", ORIENTED.values(), ids=ORIENTED)
def test_a_png_is_turned_upright_although_other_metadata_are_broken(
    decode: Decode, oriented: bytes, behind: bool
) -> None:
    broken = PNG_METADATA["iCCP over 1 MiB"] + PNG_METADATA["zTXt over 1 MiB"] + BROKEN_CHECKSUM
    upright = picture().transpose(Image.Transpose.ROTATE_270)
    assert decode(with_chunks(broken, oriented, behind=behind)).tobytes() == upright.tobytes()


def test_a_png_without_its_end_chunk_is_whole(decode: Decode) -> None:
    whole = saved(picture(), "PNG")
    assert decode(whole[: whole.index(b"IEND") - 4]).tobytes() == picture().tobytes()


def test_a_png_that_lost_pixels_is_corrupt_wherever_it_is_cut(decode: Decode) -> None:
    whole = saved(picture(), "PNG")
    for place in range(50, whole.index(b"IEND") - 20, 997):
        with pytest.raises(MediaCorrupt):
            decode(whole[:place])


@pytest.mark.parametrize("lace", [0, 1], ids=["rows", "passes"])
def test_a_png_whose_data_end_before_its_last_row_is_corrupt(decode: Decode, lace: int) -> None:
    width, height = 16, 9
    row = b"\x00" + bytes(range(1, 1 + 3 * width))
    passes = ((2, 2), (2, 2), (4, 1), (4, 3), (8, 2), (8, 5), (16, 4))  # Adam7's: pixels and rows
    widths = [pixels for pixels, rows in passes for _ in range(rows)] if lace else [width] * height
    rows = [row[: 1 + 3 * pixels] for pixels in widths]
    assert decode(png(width, height, zlib.compress(b"".join(rows)), lace=lace)).size == (width, height)
    for num_rows in range(len(rows)):
        with pytest.raises(MediaCorrupt, match="cannot be decoded"):
            decode(png(width, height, zlib.compress(b"".join(rows[:num_rows])), lace=lace))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_a_cut_png_that_is_filled_up_with_zeros_is_corrupt(decode: Decode, mode: str) -> None:
    whole = saved(picture((40, 30)).convert(mode), "PNG")
    first, end = whole.index(b"IDAT") + 8, whole.index(b"IEND") - 12
    for place in np.linspace(first, end, 60).astype(int):
        with pytest.raises(MediaCorrupt):
            decode(whole[:place] + bytes(len(whole) - place))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_a_black_png_and_one_with_a_wrong_checksum_are_whole(decode: Decode, mode: str) -> None:
    still = Image.new(mode, (30, 20))
    whole = bytearray(saved(still, "PNG"))
    seen = decode(bytes(whole)).tobytes()
    whole[whole.index(b"IEND") - 5] ^= 1
    assert decode(bytes(whole)).tobytes() == seen


PROFILE_HEAD = b"ICC_PROFILE\x00"
JPEG_METADATA = {
    "EXIF nonsense": segment(0xE1, b"Exif\x00\x00II*\x00\xff\xff\xff\xff"),
    "EXIF empty": segment(0xE1, b"Exif\x00\x00"),
    "EXIF of the wrong byte order": segment(0xE1, b"Exif\x00\x00XX*\x00" + bytes(20)),
    "EXIF entry beyond": segment(0xE1, b"Exif\x00\x00II*\x00" + struct.pack("<IHHHII", 8, 900, 0x010F, 2, 1 << 31, 99)),
    "XMP nonsense": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\x00\xff\xfe<"),
    "profile head alone": segment(0xE2, PROFILE_HEAD),
    "profile part 0 of 0": segment(0xE2, PROFILE_HEAD + b"\x00\x00" + bytes(100)),
    "profile part 7 of 3": segment(0xE2, PROFILE_HEAD + b"\x07\x03" + bytes(100)),
    "profiles of 16 MiB": segment(0xE2, PROFILE_HEAD + b"\x01\xff" + bytes(65_000)) * 255,
    "FlashPix": segment(0xE2, b"FPXR\x00"),
    "pictures of many": segment(0xE2, b"MPF\x00" + b"\xff" * 40),
    "Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\x00\x00\xff\xff\xff\xff"),
    "Photoshop resolution": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\x00\x00\x00\x00\x00\x02ab"),
    "JFIF short": segment(0xE0, b"JFIF\x00\x01"),
    "Adobe short": segment(0xEE, b"Adobe\x00"),
    "comment": segment(0xFE, b"\xff\xd8\xff\xd9" * 1000),
    "a length of 0": segment(0xE5, b"", 0),
    "a length too short": segment(0xE5, bytes(50), 20),
    "a length too long": segment(0xE5, bytes(50), 70),
    "a length beyond all tables": segment(0xE5, bytes(50), 600),
    "many segments": segment(0xEB, b"") * 20_000,
}


@pytest.mark.parametrize("metadata", JPEG_METADATA.values(), ids=JPEG_METADATA)
def test_jpeg_metadata_never_reject_pixels(decode: Decode, metadata: bytes) -> None:
    assert decode(with_segments(metadata)).tobytes() == decode(with_segments()).tobytes()


def test_a_broken_preview_is_never_taken_for_the_picture(decode: Decode) -> None:
    preview = b"Exif\x00\x00" + EXIF + saved(Image.new("RGB", (16, 16)), "JPEG")
    for length in (10, 60, len(preview) - 100):
        try:
            assert decode(with_segments(segment(0xE1, preview, length))).size == picture().size
        except MediaCorrupt:
            continue


CODINGS: dict[str, dict[str, Any]] = {
    "baseline": {}, "4:4:4": {"subsampling": 0}, "4:2:2": {"subsampling": 1}, "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 2}, "restarts, progressive": {"restart_marker_rows": 1, "progressive": True},
    "optimised": {"optimize": True}, "coarse": {"quality": 5}, "fine": {"quality": 100},
}  # fmt: skip


@pytest.mark.parametrize("tail", [b"", bytes(1), bytes(4000), b"\xff", b"\xff\xff\xff"], ids=["", "0", "0s", "1", "1s"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
def test_a_jpeg_without_its_end_marker_is_whole(decode: Decode, coding: dict[str, Any], mode: str, tail: bytes) -> None:
    for size in ((90, 70), (64, 48), (17, 33), (1, 1)):
        whole = saved(picture(size, mode), "JPEG", **coding)
        assert whole.endswith(b"\xff\xd9")
        assert decode(whole[:-2] + tail).tobytes() == decode(whole).tobytes(), size


@pytest.mark.parametrize(
    "tail", [b"\xff\xd9", b"", bytes(4000), b"\xff\xd9" + bytes(99)], ids=["end", "nothing", "zeros", "end, zeros"]
)
@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
def test_a_jpeg_cut_inside_its_first_scan_is_corrupt_and_never_half_a_picture(
    decode: Decode, coding: dict[str, Any], tail: bytes
) -> None:
    whole = saved(picture(), "JPEG", **coding)
    first = whole.index(b"\xff\xda")
    end = whole.find(b"\xff\xc4", first) if "progressive" in coding else len(whole) - 2
    for place in np.linspace(first + 20, first + (end - first) * 7 // 8, 17).astype(int):
        with pytest.raises(MediaCorrupt, match="the jpeg image cannot be decoded"):
            decode(whole[:place] + tail)


@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
def test_a_jpeg_cut_anywhere_is_corrupt_or_every_pixel_is_right(decode: Decode, coding: dict[str, Any]) -> None:
    whole = saved(picture((40, 30)), "JPEG", **coding)
    right = decode(whole).tobytes()
    for place in range(whole.index(b"\xff\xda"), len(whole) - 2):
        try:
            assert decode(whole[:place]).tobytes() == right, f"cut at {place} of {len(whole)}"
        except MediaCorrupt:
            continue


def test_a_progressive_jpeg_that_lost_the_end_of_its_last_scan_is_corrupt_though_it_has_an_end_marker(
    decode: Decode,
) -> None:
    for still in (picture((40, 30)), picture((40, 30), "L")):
        whole = saved(still, "JPEG", progressive=True)
        last = whole.rindex(b"\xff\xda") + 20
        for place in range(last, len(whole) - 4):
            with pytest.raises(MediaCorrupt, match="truncated"):
                decode(whole[:place] + b"\xff\xd9")


def test_a_jpeg_that_lost_its_last_blocks_is_corrupt_though_colours_of_others_reach_into_them(decode: Decode) -> None:
    down, across = np.mgrid[0:33, 0:65]
    waves = [np.sin(across / 7 + band) * 60 + np.cos(down / 5 - band) * 60 + 128 for band in range(3)]
    whole = saved(Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)), "JPEG", quality=80)
    for place in range(whole.index(b"\xff\xda") + 20, len(whole) - 12):
        with pytest.raises(MediaCorrupt, match="cannot be decoded"):
            decode(whole[:place] + b"\xff\xd9")


@pytest.mark.parametrize("grey", range(124, 133))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_picture_that_ends_in_mid_grey_is_whole(decode: Decode, mode: str, grey: int) -> None:
    still = picture(mode=mode)
    still.paste((grey,) * len(still.getbands()) if mode != "L" else grey, (0, 20, 90, 70))
    for coding in CODINGS.values():
        content = saved(still, "JPEG", **coding)
        with Image.open(io.BytesIO(content)) as plain:
            assert decode(content).tobytes() == plain.convert("RGB").tobytes()


@pytest.mark.parametrize(
    "garbage", [bytes(3000), b"\xff\xd8\xff\xe0", b"PK\x03\x04", b"\xff" * 99, bytes(range(256))],
    ids=["zeros", "a picture's head", "an archive", "ones", "all bytes"],
)  # fmt: skip
def test_garbage_behind_a_jpeg_does_not_matter(decode: Decode, garbage: bytes) -> None:
    whole = saved(picture(), "JPEG")
    assert decode(whole + garbage).tobytes() == decode(whole).tobytes()


def test_orientation_survives_broken_neighbours(decode: Decode) -> None:
    upright = decode(with_segments()).transpose(Image.Transpose.ROTATE_270).tobytes()
    for oriented in (b"Exif\x00\x00" + EXIF, b"http://ns.adobe.com/xap/1.0/\x00" + XMP):
        broken = JPEG_METADATA["profile head alone"] + JPEG_METADATA["Photoshop"] + JPEG_METADATA["a length too long"]
        assert decode(with_segments(broken, segment(0xE1, oriented))).tobytes() == upright


def riff(content: bytes, *chunks: bytes, flags: int = 0x2C) -> bytes:
    """A simple WebP made an extended one, with chunks behind its pixels."""
    with Image.open(io.BytesIO(content)) as still:
        canvas = b"".join(struct.pack("<I", side - 1)[:3] for side in still.size)
    body = b"WEBP" + chunk(b"VP8X", bytes([flags]) + bytes(3) + canvas) + content[12:] + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


WEBP_METADATA = {
    "none that the flags promise": b"",
    "EXIF nonsense": chunk(b"EXIF", b"\xff" * 30),
    "XMP nonsense": chunk(b"XMP ", b"\xff" * 30),
    "profile nonsense": chunk(b"ICCP", b""),
    "cut EXIF": chunk(b"EXIF", bytes(500))[:-200],
    "unknown": chunk(b"\xff\xff\xff\xff", bytes(9)),
    "garbage": b"\x00\x01\x02",
    "a length beyond": b"XMP \xff\xff\xff\x7f" + bytes(9),
}


@pytest.mark.parametrize("metadata", WEBP_METADATA.values(), ids=WEBP_METADATA)
def test_webp_metadata_never_reject_pixels(decode: Decode, metadata: bytes) -> None:
    plain = saved(picture(), "WEBP", lossless=True)
    assert decode(riff(plain, metadata)).tobytes() == picture().tobytes()
    turned = decode(riff(plain, chunk(b"EXIF", EXIF), metadata))
    assert turned.tobytes() == picture().transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_webp_cut_anywhere_is_corrupt(decode: Decode, mode: str) -> None:
    whole = saved(picture((20, 10), mode), "WEBP", lossless=mode == "RGB", exif=b"Exif\x00\x00" + EXIF)
    end = whole.index(b"EXIF")
    for place in range(12, end - 1):
        with pytest.raises(MediaCorrupt):
            decode(whole[:place])


def test_a_webp_animation_cut_behind_its_first_frame_shows_it(decode: Decode) -> None:
    frames = [picture(), picture().transpose(Image.Transpose.ROTATE_180)]
    content = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode(content).tobytes() == decode(content[:-500]).tobytes() == frames[0].tobytes()


GIF_METADATA = {
    "endless comment": b"\x21\xfe" + b"\xff".ljust(256, b"!") * 2000 + b"\x00",
    "empty application": b"\x21\xff\x00",
    "short loop": b"\x21\xff\x0bNETSCAPE2.0\x01\x01\x00",
    "empty control": b"\x21\xf9\x00",
    "short control": b"\x21\xf9\x01\x00\x00",
    "plain text": b"\x21\x01\x02ab\x00",
    "unknown": b"\x21\x99\x03abc\x00",
}


@pytest.mark.parametrize("metadata", GIF_METADATA.values(), ids=GIF_METADATA)
def test_gif_metadata_never_reject_pixels(decode: Decode, metadata: bytes) -> None:
    whole = saved(picture().quantize(16), "GIF")
    at = 13 + 3 * 16
    assert whole[at : at + 1] in b"!,"
    assert decode(whole[:at] + metadata + whole[at:]).tobytes() == decode(whole).tobytes()
    assert decode(whole[:-1]).tobytes() == decode(whole).tobytes(), "without its end"


def tiff_with(*entries: tuple[int, int, int, int], **options: Any) -> bytes:
    """A TIFF whose directory is written anew at the end, with more entries."""
    content = saved(picture(), "TIFF", **options)
    (directory,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, directory)
    old = [struct.unpack_from("<HHII", content, directory + 2 + 12 * n) for n in range(count)]
    added = {entry[0] for entry in entries}
    table = sorted([entry for entry in old if entry[0] not in added] + list(entries))
    raw = struct.pack("<H", len(table)) + b"".join(struct.pack("<HHII", *entry) for entry in table) + bytes(4)
    content += bytes(len(content) % 2)
    return content[:4] + struct.pack("<I", len(content)) + content[8:] + raw


FAR = 0x7FFFFFF0
TIFF_METADATA = {
    "profile far away": (34675, 7, 500, FAR),
    "profile huge": (34675, 7, FAR, 8),
    "EXIF far away": (34665, 4, 1, FAR),
    "EXIF loop": (34665, 4, 1, 8),
    "place loop": (34853, 4, 1, 8),
    "XMP far away": (700, 1, 5000, FAR),
    "text of an unknown type": (270, 99, 1, 1),
    "text huge": (270, 2, FAR, 8),
    "resolution far away": (282, 5, 1, FAR),
    "resolution of many": (283, 5, 1 << 28, 8),
    "newspaper": (33723, 4, 1 << 28, 8),
    "Photoshop": (34377, 1, FAR, 8),
    "orientation of many": (274, 3, 1 << 30, 8),
    "orientation 99": (274, 3, 1, 99),
    "private": (65000, 7, FAR, FAR),
}


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("entry", TIFF_METADATA.values(), ids=TIFF_METADATA)
def test_tiff_metadata_never_reject_pixels(decode: Decode, entry: tuple[int, int, int, int], compression: str) -> None:
    assert decode(tiff_with(entry, compression=compression)).tobytes() == picture().tobytes()
    turned = decode(tiff_with(entry, (274, 3, 1, QUARTER_TURN), compression=compression)) if entry[0] != 274 else None
    assert turned is None or turned.tobytes() == picture().transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (tiff_with((50706, 1, 4, 0x00000401)), "camera's raw file"),
        (tiff_with((254, 4, 1, 1), (330, 4, 1, 8)), "camera's raw file"),
        (tiff_with((262, 3, 1, 32803)), "camera's raw file"),
        (b"II*\x00\x10\x00\x00\x00CR\x02\x00" + bytes(300), "camera's raw file"),
        (tiff_with((259, 3, 1, 34712)), "compression 34712"),
        (saved(picture(), "BMP")[:30] + b"\x04" + saved(picture(), "BMP")[31:], "JPEG inside"),
        (saved(picture(), "JPEG").replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"), "12 bits"),
        (saved(picture(), "JPEG").replace(b"\xff\xc0", b"\xff\xf7"), "JPEG-LS"),
        (saved(picture(), "JPEG").replace(b"\xff\xc0", b"\xff\xc5"), "hierarchical"),
    ],
)  # fmt: skip
def test_a_coding_that_nothing_here_decodes_is_unsupported_by_name(decode: Decode, content: bytes, name: str) -> None:
    with pytest.raises(MediaUnsupported, match=name):
        decode(content)


def test_magic_alone_is_corrupt(decode: Decode) -> None:
    for content in (PNG_MAGIC, b"\xff\xd8\xff\xe0", b"II*\x00", b"GIF89a"):
        with pytest.raises(MediaCorrupt):
            decode(content)


def test_zeros_at_the_end_of_a_jpeg_are_its_own_or_a_filling_and_never_pixels(decode: Decode) -> None:
    """Encoders end a scan with ones, but for one whose last bits fill a byte; a flat picture may end in zero bytes."""
    for width in range(60, 124, 4):
        whole = saved(Image.new("RGB", (width, 31), (width, 9, 200)), "JPEG", quality=50)
        right = decode(whole).tobytes()
        assert decode(whole[:-2]).tobytes() == right, width
        noisy = saved(picture((width, 31)), "JPEG", quality=5, optimize=True)
        right = decode(noisy).tobytes()
        for lost in (30, 60, 90):
            with pytest.raises(MediaCorrupt):
                decode(noisy[: -2 - lost] + bytes(lost + 20))
