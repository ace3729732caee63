"""Stills: colours by value, limits before decoding, broken files told apart."""

from __future__ import annotations

import inspect
import io
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)  # fmt: skip

from worker.errors import MediaCorrupt, MediaTooLarge, MediaUnsupported, WorkerError
from worker.media.image import DECODE_ERRORS, decode_image
from worker.media.types import MediaPolicy

POLICY = MediaPolicy(frozenset())
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)

PILLOW_MODULES = (
    PIL, Image, ImageFile, BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin,
    WebPImagePlugin,
)  # fmt: skip
CODED = ("decoded", "media_corrupt", "media_too_large", "media_unsupported")


@pytest.fixture
def decode(tmp_path: Path) -> Callable[..., Image.Image]:
    def decoded(content: bytes, policy: MediaPolicy = POLICY) -> Image.Image:
        path = tmp_path / "media-file"
        path.write_bytes(content)
        pixels = decode_image(path, policy).pixels
        path.unlink()
        pixels.tobytes()
        assert pixels.mode == "RGB"
        return pixels

    return decoded


def saved(picture: Image.Image, pillow_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, pillow_format, **options)
    return file.getvalue()


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))


def assert_close(pixel: Any, colour: tuple[int, int, int], tolerance: int = 0) -> None:
    assert max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= tolerance, f"{pixel} is not {colour}"


@pytest.mark.parametrize("pillow_format", ["PNG", "BMP", "TIFF", "WEBP", "JPEG"])
def test_pixels_survive_every_format(decode, pillow_format: str) -> None:
    picture = Image.new("RGB", (40, 24), RED)
    picture.paste(BLUE, (20, 0, 40, 24))
    options = {"lossless": True} if pillow_format == "WEBP" else {"quality": 100} if pillow_format == "JPEG" else {}
    pixels = decode(saved(picture, pillow_format, **options))
    assert pixels.size == (40, 24)
    assert_close(pixels.getpixel((4, 4)), RED, 3)
    assert_close(pixels.getpixel((36, 20)), BLUE, 3)


@pytest.mark.parametrize("pillow_format", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(decode, pillow_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (GREEN, RED, BLUE)]
    content = saved(frames[0], pillow_format, save_all=True, append_images=frames[1:])
    assert_close(decode(content).getpixel((8, 8)), GREEN, 3)


def test_cmyk_becomes_the_colour_it_prints(decode) -> None:
    content = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert_close(decode(content).getpixel((8, 8)), RED, 2)


@pytest.mark.parametrize(("stored", "shown"), [(0, 0), (0x8000, 128), (0x00FF, 1), (0xFFFF, 255)])
@pytest.mark.parametrize("pillow_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(decode, pillow_format: str, stored: int, shown: int) -> None:
    content = saved(Image.fromarray(np.full((4, 4), stored, np.uint16)), pillow_format)
    assert decode(content).getpixel((1, 1)) == (shown, shown, shown)


def test_big_endian_sixteen_bit_grey_is_scaled_too(decode) -> None:
    rows = zlib.compress(b"".join(b"\x00" + struct.pack(">4H", *[0x4000] * 4) for _ in range(4)))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    assert decode(content).getpixel((0, 0)) == (64, 64, 64)


def test_transparent_parts_lie_over_white(decode) -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 4, 8))
    picture.putpixel((7, 7), (0, 0, 0, 128))
    pixels = decode(saved(picture, "PNG"))
    assert pixels.getpixel((6, 2)) == (255, 255, 255)
    assert pixels.getpixel((1, 1)) == BLUE
    assert_close(pixels.getpixel((7, 7)), (127, 127, 127), 1)


def test_grey_with_alpha_lies_over_white(decode) -> None:
    assert_close(decode(saved(Image.new("LA", (4, 4), (0, 64)), "PNG")).getpixel((0, 0)), (191, 191, 191), 1)


def test_a_palettes_transparent_colour_lies_over_white(decode) -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([*RED, *GREEN])
    picture.putpixel((0, 0), 0)
    pixels = decode(saved(picture, "PNG", transparency=0))
    assert pixels.getpixel((0, 0)) == (255, 255, 255)
    assert pixels.getpixel((3, 3)) == GREEN


def test_palette_and_one_bit_keep_their_colours(decode) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([*RED, *GREEN])
    assert decode(saved(palette, "GIF")).getpixel((2, 2)) == GREEN
    bits = Image.new("1", (4, 4), 0)
    bits.putpixel((1, 1), 1)
    pixels = decode(saved(bits, "PNG"))
    assert (pixels.getpixel((0, 0)), pixels.getpixel((1, 1))) == ((0, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("pillow_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_rotation_is_undone(decode, pillow_format: str, orientation: int) -> None:
    upright = Image.new("RGB", (48, 32), BLUE)
    upright.paste(RED, (0, 0, 24, 16))  # red: upper left quarter
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if pillow_format == "WEBP" else {"quality": 95} if pillow_format == "JPEG" else {}
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that makes the stored form of each
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    pixels = decode(saved(stored, pillow_format, exif=exif, **options))
    assert pixels.size == (48, 32)
    assert_close(pixels.getpixel((8, 6)), RED, 12)
    assert_close(pixels.getpixel((40, 6)), BLUE, 12)
    assert_close(pixels.getpixel((8, 26)), BLUE, 12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_a_broken_exif_block_does_not_spoil_the_picture(decode) -> None:
    content = saved(Image.new("RGB", (16, 16), RED), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert_close(decode(content).getpixel((8, 8)), RED, 3)


def test_a_header_bomb_is_refused_with_both_numbers_and_without_memory(decode) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MediaTooLarge, match="20000×20000 = 400000000 pixels, the limit is 50000000"):
        decode(png_header(20_000, 20_000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_the_limit_is_the_policys_and_not_pillows(decode) -> None:
    wide = MediaPolicy(frozenset(), max_image_pixels=400_000_000)
    with pytest.raises(MediaCorrupt, match="truncated"):
        decode(png_header(10_000, 10_000), wide)
    with pytest.raises(MediaTooLarge, match="the limit is 4095"):
        decode(saved(noise(), "PNG"), MediaPolicy(frozenset(), max_image_pixels=4_095))
    assert decode(saved(noise(), "PNG"), MediaPolicy(frozenset(), max_image_pixels=4_096)).size == (64, 64)


def test_an_image_at_the_side_limits_of_webp_is_refused(decode) -> None:
    header = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\x00" * 2
    with pytest.raises((MediaTooLarge, MediaCorrupt)):
        decode(b"RIFF" + struct.pack("<I", 4 + len(header)) + b"WEBP" + header)


@pytest.mark.parametrize("size", [(20_000, 1), (3, 700)])
def test_a_strip_is_refused(decode, size: tuple[int, int]) -> None:
    with pytest.raises(MediaTooLarge, match="one side is over 200 times the other"):
        decode(saved(Image.new("RGB", size), "PNG"))


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("pillow_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_corrupt_and_never_half_a_picture(decode, pillow_format: str, kept: float) -> None:
    content = saved(noise(), pillow_format)
    with pytest.raises(MediaCorrupt, match=f"the {pillow_format.lower()} image cannot be decoded"):
        decode(content[: max(30, int(len(content) * kept))])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_flipped_bytes_give_a_picture_or_a_coded_error(decode) -> None:
    rng = np.random.default_rng(7)
    for pillow_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = saved(noise(32), pillow_format)
        for _ in range(40):
            content = bytearray(whole)
            for place in rng.integers(0, min(len(content), 400), 4):
                content[place] = rng.integers(0, 256)
            assert outcome(decode, bytes(content)) in CODED


def outcome(decode: Callable[[bytes], object], content: bytes) -> str:
    """Return the error's code, or "decoded"; anything without a code passes through and fails the test."""
    try:
        decode(content)
    except WorkerError as error:
        return error.code.value
    return "decoded"


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_defined_range_are_refused(decode, mode: str) -> None:
    with pytest.raises(MediaUnsupported, match=f"mode {mode}"):
        decode(saved(Image.new(mode, (4, 4), 1), "TIFF"))


def test_a_clip_is_no_image(decode) -> None:
    with pytest.raises(MediaUnsupported, match="an image is due here, the object is a mp4 video"):
        decode(b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2mp41")


def test_formats_that_pillow_knows_and_jobs_may_not_use_are_refused(decode) -> None:
    for pillow_format in ("PPM", "TGA", "ICO", "PCX", "EPS", "PDF"):
        with pytest.raises(MediaUnsupported):
            decode(saved(Image.new("RGB", (16, 16), RED), pillow_format))


def test_every_error_that_pillow_defines_is_caught() -> None:
    defined = {one for module in PILLOW_MODULES for _, one in inspect.getmembers(module, inspect.isclass)}
    errors = {one for one in defined if issubclass(one, Exception) and one.__module__.split(".")[0] == "PIL"}
    assert UnidentifiedImageError in errors
    bombs = {Image.DecompressionBombError, Image.DecompressionBombWarning}
    assert not [one for one in errors - bombs if not issubclass(one, DECODE_ERRORS)]


def test_decoding_leaves_pillows_globals_alone(decode) -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    decode(saved(noise(), "PNG"))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before == (89_478_485, False)
