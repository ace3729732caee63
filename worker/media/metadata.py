"""Strips the metadata from a still image, so that broken or huge metadata cannot fail its decoding.

In: a file's bytes. Out: a smaller file of the same format, and its orientation. Text, profiles, comments, previews and
further pages are skipped by their lengths and never decompressed, except those that may hold the orientation, which are
decompressed up to `MAX_METADATA_BYTES`. A file whose structure cannot be parsed is returned unchanged. JPEG has a
module of its own.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from PIL.TiffImagePlugin import COMPRESSION_INFO

from worker.errors import MediaUnsupported
from worker.media.orientation import AS_STORED, of_exif, of_xmp
from worker.media.sniff import MediaFormat

#: Decompressed bytes of one metadata block that may hold the orientation.
MAX_METADATA_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Stripped:
    """A file without its metadata.

    orientation: EXIF's number.
    coding: the coding of the pixels where Pillow may not decode it, for the error text; else empty.
    """

    content: bytes
    orientation: int = AS_STORED
    coding: str = ""


_PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS: Final = frozenset({b"IHDR", b"PLTE", b"IDAT"})
_PNG_END: Final = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
_PNG_KIND: Final = re.compile(rb"[A-Za-z]{4}")
_PNG_TRANSPARENCY_BYTES: Final = {0: range(2, 3), 2: range(6, 7), 3: range(1, 257)}  # tRNS by colour type
_PNG_XMP: Final = b"XML:com.adobe.xmp"
#: ImageMagick's: a name, a length and hexadecimal digits, one a line.
_PNG_EXIF: Final = frozenset({b"Raw profile type exif", b"Raw profile type APP1"})


def strip_png(content: bytes) -> Stripped:
    """PNG (third edition): header, palette, transparency and the default image, which is an animation's first frame."""
    kept: list[bytes | memoryview] = [_PNG_MAGIC]
    exif = xmp = None
    colour = content[25] if len(content) > 25 else 0
    is_whole = True
    for kind, start, end in _png_chunks(content):
        body = memoryview(content)[start + 8 : end - 4]
        if kind in _PNG_PIXELS or (kind == b"tRNS" and _is_png_transparency(content, colour, start, end)):
            kept.append(memoryview(content)[start:end])
            is_whole = end <= len(content)
        elif kind == b"eXIf":
            exif = exif or of_exif(bytes(body[:MAX_METADATA_BYTES]))
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            name, text = _png_text(kind, bytes(body[: 2 * MAX_METADATA_BYTES]))
            exif = exif or (of_exif(_hex_profile(text)) if name in _PNG_EXIF else None)
            xmp = xmp or (of_xmp(text) if name == _PNG_XMP else None)
    if is_whole:
        kept.append(_PNG_END)
    return Stripped(b"".join(kept), exif or xmp or AS_STORED)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's type, start and end; the end may be beyond the end of the file."""
    at, num_bytes = len(_PNG_MAGIC), len(content)
    while at + 8 <= num_bytes:
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        is_chunk = _PNG_KIND.fullmatch(kind) is not None
        if kind not in _PNG_PIXELS and (not is_chunk or end > num_bytes):
            # A broken length: go on at the next chunk named IDAT.
            at = content.find(b"IDAT", at + 8) - 4
            if at < 0:
                return
            continue
        if kind == b"IEND":
            return
        yield kind, at, end
        at = end


def _is_png_transparency(content: bytes, colour: int, start: int, end: int) -> bool:
    """Whether a tRNS chunk is complete and has the size that fits the colour type."""
    (checksum,) = struct.unpack_from(">I", content, end - 4)
    fits = end - start - 12 in _PNG_TRANSPARENCY_BYTES.get(colour, range(0))
    return fits and zlib.crc32(content[start + 4 : end - 4]) == checksum


def _png_text(kind: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Return a text chunk's keyword and text; the text is empty unless it may hold the orientation."""
    name, _, rest = body.partition(b"\x00")
    if name != _PNG_XMP and name not in _PNG_EXIF:
        return name, b""
    is_packed = kind == b"zTXt"
    if kind == b"iTXt":
        is_packed = rest[:1] == b"\x01"
        rest = rest[2:].partition(b"\x00")[2].partition(b"\x00")[2]  # language, translated name
    elif is_packed:
        rest = rest[1:]
    return name, _unpacked(rest) if is_packed else rest


def _unpacked(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, MAX_METADATA_BYTES)
    except zlib.error:
        return b""


def _hex_profile(text: bytes) -> bytes:
    digits = b"".join(text.split(b"\n")[3:])
    try:
        return bytes.fromhex(digits.decode("ascii", "replace"))
    except ValueError:
        return b""


_WEBP_PIXELS: Final = frozenset({b"VP8X", b"ALPH", b"VP8 ", b"VP8L", b"ANIM", b"ANMF"})
_WEBP_FRAMES: Final = frozenset({b"VP8 ", b"VP8L", b"ANMF"})
_WEBP_METADATA_FLAGS: Final = 0x20 | 0x08 | 0x04  # profile, EXIF, XMP: RFC 9649, section 2.7


def strip_webp(content: bytes) -> Stripped:
    """RFC 9649: the image, or of an animation the first frame."""
    kept = bytearray()
    exif = xmp = None
    at, has_frame = 12, False
    while at + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, at)
        end = at + 8 + length + length % 2
        if kind in _WEBP_PIXELS and not has_frame:
            has_frame = kind in _WEBP_FRAMES
            chunk = bytearray(content[at:end])
            if kind == b"VP8X" and len(chunk) > 8:
                chunk[8] &= ~_WEBP_METADATA_FLAGS
            kept += chunk + bytes(len(chunk) % 2 if len(chunk) == 8 + length else 0)
        elif kind == b"EXIF":
            exif = exif or of_exif(content[at + 8 : at + 8 + min(length, MAX_METADATA_BYTES)])
        elif kind == b"XMP ":
            xmp = xmp or of_xmp(content[at + 8 : at + 8 + min(length, MAX_METADATA_BYTES)])
        at = end
    return Stripped(b"RIFF" + struct.pack("<I", 4 + len(kept)) + b"WEBP" + bytes(kept), exif or xmp or AS_STORED)


# TIFF 6.0 and its supplements: tags that say where the pixels are and what they mean.
_TIFF_PIXELS: Final = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 277, 278, 279, 280, 281, 284, 290, 291, 292, 293, 317, 320, 322,
     323, 324, 325, 332, 333, 334, 336, 338, 339, 340, 341, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530,
     531, 532}
)  # fmt: skip
_SUBFILE, _COMPRESSION, _PHOTOMETRIC, _SUB_DIRECTORIES, _XMP, _DNG_VERSION = 254, 259, 262, 330, 700, 50706
_SENSOR: Final = frozenset({32803, 34892})  # a colour filter array, linear raw
_IS_PREVIEW: Final = 1
_SHORT: Final = 3
_TIFF_ENTRY_BYTES: Final = 12


def strip_tiff(content: bytes) -> Stripped:
    """TIFF 6.0: the first directory with its pixels' tags only. Raises MediaUnsupported for a camera's raw file, whose
    first directory is a preview."""
    order = "<" if content.startswith(b"II") else ">"
    try:
        (directory,) = struct.unpack_from(f"{order}I", content, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", content, directory)
        first = directory + 2
        places = range(first, first + _TIFF_ENTRY_BYTES * num_entries, _TIFF_ENTRY_BYTES)
        entries = [_TiffEntry(*struct.unpack_from(f"{order}HHI4s", content, at)) for at in places]
    except struct.error:
        return Stripped(content)
    found = {one.tag: one.number(order) for one in entries}
    _check_is_no_raw(content, found)
    kept = [content[at : at + _TIFF_ENTRY_BYTES] for one, at in zip(entries, places, strict=True)
            if one.tag in _TIFF_PIXELS]  # fmt: skip
    table = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    coding = found.get(_COMPRESSION, 1)
    xmp_at = found.get(_XMP, len(content))
    return Stripped(
        content[:directory] + table + content[directory + len(table) :],
        of_exif(content) or of_xmp(content[xmp_at : xmp_at + MAX_METADATA_BYTES]) or AS_STORED,
        "" if coding in COMPRESSION_INFO else f"compression {coding}",
    )


@dataclass(frozen=True, slots=True)
class _TiffEntry:
    """A directory's entry: TIFF 6.0, section 2."""

    tag: int
    kind: int
    count: int
    value: bytes

    def number(self, order: str) -> int:
        """Return the value, or the offset of a value that does not fit; the first of several short ones."""
        (number,) = struct.unpack_from(f"{order}{'H' if self.kind == _SHORT else 'I'}", self.value)
        return int(number)


def _check_is_no_raw(content: bytes, found: dict[int, int]) -> None:
    is_preview = bool(found.get(_SUBFILE, 0) & _IS_PREVIEW) and _SUB_DIRECTORIES in found
    is_raw = _DNG_VERSION in found or found.get(_PHOTOMETRIC) in _SENSOR or is_preview
    if is_raw or content[8:10] == b"CR":
        name = "CR2" if content[8:10] == b"CR" else "DNG" if _DNG_VERSION in found else "DNG, NEF, ARW and the like"
        raise MediaUnsupported(f"not an image or video of a supported format but a camera's raw file ({name})")


_BMP_CODINGS: Final = {4: "JPEG inside", 5: "PNG inside"}


def strip_bmp(content: bytes) -> Stripped:
    """Return a bitmap unchanged: Pillow reads no metadata of it."""
    coding = int.from_bytes(content[30:34], "little") if int.from_bytes(content[14:18], "little") >= 40 else 0
    return Stripped(content, coding=_BMP_CODINGS.get(coding, ""))


def strip_gif(content: bytes) -> Stripped:
    """GIF89a: the first picture with the control block before it."""
    if len(content) < 13:
        return Stripped(content)
    at = 13 + (3 << (content[10] & 7) + 1 if content[10] & 0x80 else 0)
    kept, control = bytearray(content[:at]), b""
    while content[at : at + 1] == b"!":  # an extension, known or not
        end = _end_of_blocks(content, at + 2)
        if content[at + 1 : at + 3] == b"\xf9\x04":
            control = content[at:end]
        at = end
    if content[at : at + 1] != b",":
        return Stripped(content)
    return Stripped(bytes(kept) + control + content[at:])


def _end_of_blocks(content: bytes, at: int) -> int:
    """Return the place after a series of sub-blocks and the empty one that ends it."""
    while at < len(content) and content[at]:
        at += 1 + content[at]
    return at + 1


STRIPPERS: Final[dict[MediaFormat, Callable[[bytes], Stripped]]] = {
    MediaFormat.PNG: strip_png,
    MediaFormat.WEBP: strip_webp,
    MediaFormat.TIFF: strip_tiff,
    MediaFormat.BMP: strip_bmp,
    MediaFormat.GIF: strip_gif,
}
