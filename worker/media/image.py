"""Decodes one still image into upright RGB, within the policy's limits.

The header is checked first; pixels are decoded only if the image fits. Of an animation the first frame is taken. Colour
profiles are not applied. A truncated image is refused, also where Pillow decodes it: of a PNG with too little data it
leaves the last rows black if the zlib stream ends properly, and ignores the checksums. So the bytes of a PNG are
counted when its last row is blank or a checksum is wrong; `worker.media.jpeg` does the same for JPEG.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from worker.errors import MediaCorrupt, MediaTooLarge, MediaUnsupported
from worker.media.jpeg import Jpeg, read_jpeg
from worker.media.metadata import STRIPPERS, Stripped
from worker.media.orientation import upright
from worker.media.sniff import HEAD_BYTES, MediaFormat, sniff
from worker.media.types import DecodedImage, MediaPolicy

#: What Pillow raises on broken files: its plugins do not catch most of Python's own errors.
DECODE_ERRORS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

# Opened by class, not by Image.open: no other plugin can be reached, and Image.open checks sizes against a global
# (Image.MAX_IMAGE_PIXELS) with warnings that can be configured for the whole process only.
_READERS: Final[dict[MediaFormat, type[ImageFile.ImageFile]]] = {
    MediaFormat.JPEG: JpegImageFile,
    MediaFormat.PNG: PngImageFile,
    MediaFormat.WEBP: WebPImageFile,
    MediaFormat.GIF: GifImageFile,
    MediaFormat.BMP: BmpImageFile,
    MediaFormat.TIFF: TiffImageFile,
}

_DEEP_GREY_MODES: Final = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_WEBP_HEADER_BYTES: Final = 30
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF 6.0, section 15
_WHITE: Final = (255, 255, 255, 255)
_PNG_HEAD_BYTES: Final = 8
_NUM_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
#: Adam7's passes: first column, first row, steps to the next ones.
_PASSES: Final = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip
#: Bytes inflated at once, and deflated bytes handed in at once: zlib copies what it has not consumed each time.
_INFLATED_BYTES: Final = 256 * 1024
_DEFLATED_BYTES: Final = 16 * 1024


def decode_image(path: Path, policy: MediaPolicy) -> DecodedImage:
    """Decode the image at `path`: RGB, upright, transparent parts over white, 16 bits scaled to 8.

    The result does not refer to the file, which may be removed. Metadata are read for the orientation only; broken or
    huge metadata do not fail the image. Accesses nothing but the file; any thread.

    Raises MediaUnsupported (not an image, or pixels of a kind that is not decoded or has no defined range),
    MediaTooLarge (pixels or aspect, before decoding), MediaCorrupt (also where pixels are missing).
    """
    content = path.read_bytes()
    found = sniff(content[:HEAD_BYTES])
    reader = _READERS.get(found)
    if reader is None:
        raise MediaUnsupported(f"an image is due here, the object is a {found.value} video")
    if found is MediaFormat.WEBP:  # its decoder allocates the canvas when the file is opened
        check_size(_webp_canvas(content[:_WEBP_HEADER_BYTES]), policy, policy.max_image_pixels)
    stripped: Jpeg | Stripped = Stripped(b"")
    try:
        stripped = read_jpeg(content) if found is MediaFormat.JPEG else STRIPPERS[found](content)
        del content
        image = _pixels(reader, stripped.content, policy)
        if not _is_whole(found, stripped, image, policy):
            raise MediaCorrupt(f"the {found.value} image cannot be decoded: image file is truncated")
        return DecodedImage(_rgb(upright(image, stripped.orientation)))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaTooLarge(f"the {found.value} image is too large: {error}") from error
    except DECODE_ERRORS as error:
        if stripped.coding:
            raise MediaUnsupported(
                f"a {found.value} image of a coding that is not decoded: {stripped.coding}"
            ) from error
        raise MediaCorrupt(f"the {found.value} image cannot be decoded: {_reason(error)}") from error


def _pixels(reader: type[ImageFile.ImageFile], content: bytes, policy: MediaPolicy) -> Image.Image:
    with reader(io.BytesIO(content)) as image:
        check_size(image.size, policy, policy.max_image_pixels)
        if isinstance(image, TiffImageFile):
            _check_tile(image, policy)
        image.load()
        return image


def _is_whole(found: MediaFormat, stripped: Jpeg | Stripped, image: Image.Image, policy: MediaPolicy) -> bool:
    """Whether no pixel is missing. Only JPEG and PNG need the check; other formats' decoders raise."""
    if not isinstance(stripped, Jpeg):
        return found is not MediaFormat.PNG or not _lacks_pixels(stripped.content, image)
    last = image.getpixel((image.width - 1, image.height - 1))
    bands = last if isinstance(last, tuple) else (int(last or 0),)
    return not stripped.is_doubtful(bands) or stripped.is_whole(
        lambda content: _pixels(JpegImageFile, content, policy).tobytes()
    )


def check_size(size: tuple[int, int], policy: MediaPolicy, max_pixels: int) -> None:
    """Raise MediaTooLarge for the size that a header claims, or MediaCorrupt when a side is 0."""
    width, height = size
    if width < 1 or height < 1:
        raise MediaCorrupt(f"the header claims {width}×{height} pixels")
    if width * height > max_pixels:
        raise MediaTooLarge(f"{width}×{height} = {width * height} pixels, the limit is {max_pixels}")
    if max(size) > policy.max_aspect * min(size):
        raise MediaTooLarge(f"{width}×{height} pixels: one side is over {policy.max_aspect:g} times the other")


def _check_tile(image: TiffImageFile, policy: MediaPolicy) -> None:
    """Limit the tiles of a TIFF: a tile is decoded whole, also when the image covers little of it."""
    width, height = (image.tag_v2.get(tag, 1) for tag in (_TILE_WIDTH, _TILE_LENGTH))
    if width * height > policy.max_image_pixels:
        raise MediaTooLarge(f"tiles of {width}×{height} pixels, the limit is {policy.max_image_pixels}")


def _webp_canvas(header: bytes) -> tuple[int, int]:
    """Return width and height from the first chunk (RFC 9649, sections 2.5 to 2.7; RFC 6386, section 9.1)."""
    kind, body = header[12:16], header[20:]
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise MediaCorrupt("the webp image cannot be decoded: its first chunk is no picture")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_GREY_MODES:
        return _scaled_grey(image).convert("RGB")
    if image.mode in ("I", "F"):
        raise MediaUnsupported(f"pixels of 32 bits (mode {image.mode}) have no defined range")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, _WHITE)
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Map 0…65535 to 0…255; Pillow's own conversion would clip at 255."""
    wide = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((wide * 255 + 32_767) // 65_535).astype(np.uint8))


def _reason(error: Exception) -> str:
    """Return Pillow's own message where it has one; such messages name sizes and chunks, no paths."""
    text = str(error) if isinstance(error, (OSError, SyntaxError, ValueError)) else ""
    return text[:200] or type(error).__name__


def _lacks_pixels(content: bytes, image: Image.Image) -> bool:
    """Return whether pixels are missing in a PNG that Pillow decoded to `image`.

    The data are inflated again only in doubt: when the last row is blank as a missing one is, the image is interlaced,
    or a checksum is wrong.
    """
    chunks = list(_chunks(content))
    header = next((body for kind, body, _ in chunks if kind == b"IHDR" and len(body) == 13), None)
    if header is None:
        return False
    is_damaged = any(kind == b"IDAT" and not is_right for kind, _, is_right in chunks)
    is_blank = not any(image.crop((0, image.height - 1, image.width, image.height)).tobytes())
    if not (is_damaged or is_blank or header[12]):
        return False
    num_bytes = _num_bytes(*struct.unpack(">IIBB2xB", header))
    return not _inflates_to((body for kind, body, _ in chunks if kind == b"IDAT"), num_bytes, to_its_end=is_damaged)


def _chunks(content: bytes) -> Iterator[tuple[bytes, memoryview, bool]]:
    """Yield each chunk's type, content and whether its checksum is right (or truncated)."""
    at, view = _PNG_HEAD_BYTES, memoryview(content)
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        checksum = content[end : end + 4]
        is_right = len(checksum) < 4 or zlib.crc32(view[at + 4 : end]) == int.from_bytes(checksum, "big")
        yield kind, view[at + 8 : end], is_right
        at = end + 4


def _num_bytes(width: int, height: int, bits: int, colour: int, interlace: int) -> int:
    """Return the inflated size: the bytes of all rows, with one filter byte each."""
    pixel_bits = bits * _NUM_CHANNELS.get(colour, 1)
    passes = _PASSES if interlace else ((0, 0, 1, 1),)
    total = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * pixel_bits // 8))
    return total


def _inflates_to(chunks: Iterator[memoryview], num_bytes: int, *, to_its_end: bool) -> bool:
    """Whether chunks inflate to `num_bytes` or more; `to_its_end`: and end with the right checksum."""
    unpacker, found = zlib.decompressobj(), 0
    try:
        for piece in (
            chunk[at : at + _DEFLATED_BYTES] for chunk in chunks for at in range(0, len(chunk), _DEFLATED_BYTES)
        ):
            left: bytes | memoryview = piece
            while left and not unpacker.eof:
                found += len(unpacker.decompress(left, _INFLATED_BYTES))
                left = unpacker.unconsumed_tail
                if found >= num_bytes and (not to_its_end or found > num_bytes + _INFLATED_BYTES):
                    return not to_its_end
    except zlib.error:
        return False
    return found >= num_bytes and (unpacker.eof or not to_its_end)
