"""Stills: odd ones that must come out right, bombs, lying headers, loops, and what only pretends to be a picture."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from tests.corpus.blocks import PNG_MAGIC, box, chunk, png, png_chunk, tiff
from tests.corpus.case import ANY, CORRUPT, DECODED, REFUSED, TOO_LARGE, UNSUPPORTED, Case, image
from worker.media.sniff import MediaKind

RED, GREEN = (255, 0, 0), (0, 255, 0)
SIZE = (48, 40)


def saved(picture: Image.Image, pillow_format: str, **options: Any) -> bytes:
    """Return a picture as a file."""
    file = io.BytesIO()
    picture.save(file, pillow_format, **options)
    return file.getvalue()


def textured() -> Image.Image:
    """A picture with something to lose everywhere."""
    noise = np.random.default_rng(1).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def bases() -> dict[str, bytes]:
    """One good file of every kind that jobs may use: what mutations start from."""
    frames = [Image.new("RGB", SIZE, colour) for colour in (RED, GREEN)]
    return {
        "baseline.jpg": saved(textured(), "JPEG"),
        "progressive.jpg": saved(textured(), "JPEG", progressive=True, exif=_exif()),
        "plain.png": saved(textured(), "PNG"),
        "palette.png": saved(textured().quantize(32), "PNG", transparency=3),
        "lossy.webp": saved(textured(), "WEBP"),
        "lossless.webp": saved(textured(), "WEBP", lossless=True),
        "moving.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "plain.gif": saved(textured().quantize(16), "GIF"),
        "moving.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "plain.bmp": saved(textured(), "BMP"),
        "plain.tiff": saved(textured(), "TIFF"),
        "lzw.tiff": saved(textured(), "TIFF", compression="tiff_lzw"),
        "deflate.tiff": saved(textured(), "TIFF", compression="tiff_adobe_deflate"),
    }


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    return exif


def odd_and_right() -> Iterator[Case]:
    """Files that a careless decoder gets wrong; their colour is known."""
    red = Image.new("RGB", SIZE, RED)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cmyk = Image.new("CMYK", SIZE, (0, 255, 255, 0))
    grey16 = Image.fromarray(np.full((40, 48), 0x8000, np.uint16))
    half = Image.new("RGBA", SIZE, (255, 0, 0, 128))
    bits = Image.new("1", SIZE, 1)
    palette = Image.new("P", SIZE, 1)
    palette.putpalette([*GREEN, *RED])
    deep = zlib.compress(b"".join(b"\x00" + b"\xff\xff\x00\x00\x00\x00" * 48 for _ in range(40)))
    grey, pink = (128, 128, 128), (255, 127, 127)
    files = {
        "progressive.jpg": (saved(red, "JPEG", progressive=True, quality=95), RED),
        "restarts.jpg": (saved(red, "JPEG", restart_marker_blocks=1, quality=95), RED),
        "cmyk.jpg": (saved(cmyk, "JPEG", quality=95), RED),
        "profile.jpg": (saved(red, "JPEG", icc_profile=profile, quality=95), RED),
        "grey.jpg": (saved(Image.new("L", SIZE, 128), "JPEG"), grey),
        "upright.jpg": (saved(red, "JPEG", exif=_exif(), quality=95), RED),
        "broken-exif.jpg": (saved(red, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f", quality=95), RED),
        "trailing.jpg": (saved(red, "JPEG", quality=95) + bytes(5000), RED),
        "no-end.jpg": (saved(red, "JPEG", quality=95)[:-2], RED),
        "no-end-progressive.jpg": (saved(red, "JPEG", progressive=True, quality=95)[:-2], RED),
        "broken-profile.jpg": (_with_segment(saved(red, "JPEG", quality=95), b"ICC_PROFILE\x00\x07\x03"), RED),
        "big-text.png": (_described_png(b"zTXt", b"words\x00\x00" + zlib.compress(bytes(40_000_000), 9)), RED),
        "big-profile.png": (_described_png(b"iCCP", b"icc\x00\x00" + zlib.compress(bytes(40_000_000), 9)), RED),
        "broken-exif.png": (_described_png(b"eXIf", b"MM\x00*\xff\xff\xff\xff"), RED),
        "grey16.png": (saved(grey16, "PNG"), grey),
        "rgb16.png": (png(48, 40, deep, depth=16), RED),
        "alpha.png": (saved(half, "PNG"), pink),
        "grey-alpha.png": (saved(Image.new("LA", SIZE, (0, 128)), "PNG"), (127, 127, 127)),
        "palette.png": (saved(palette, "PNG"), RED),
        "palette-clear.png": (saved(palette, "PNG", transparency=1), (255, 255, 255)),
        "interlaced.png": (_interlaced(), RED),
        "bits.png": (saved(bits, "PNG"), (255, 255, 255)),
        "profile.png": (saved(red, "PNG", icc_profile=profile), RED),
        "moving.png": (saved(red, "PNG", save_all=True, append_images=[Image.new("RGB", SIZE, GREEN)]), RED),
        "grey16.tiff": (saved(grey16, "TIFF"), grey),
        "cmyk.tiff": (saved(cmyk, "TIFF"), RED),
        "palette.tiff": (saved(palette, "TIFF"), RED),
        "bits.tiff": (saved(bits, "TIFF", compression="group4"), (255, 255, 255)),
        "jpeg.tiff": (saved(red, "TIFF", compression="jpeg"), RED),
        "pages.tiff": (saved(red, "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))] * 50), RED),
        "big-endian.tiff": (_big_endian_tiff(), RED),
        "palette.gif": (saved(palette, "GIF"), RED),
        "frames.gif": (saved(red, "GIF", save_all=True, append_images=_frames(60)), RED),
        "alpha.webp": (saved(half, "WEBP", lossless=True), pink),
        "frames.webp": (saved(red, "WEBP", save_all=True, append_images=_frames(40), lossless=True), RED),
        "palette.bmp": (saved(palette, "BMP"), RED),
        "top-down.bmp": (_top_down_bmp(), RED),
    }
    for name, (content, colour) in files.items():
        yield image(f"odd-{name}", content, DECODED, colour=colour)


def _with_segment(content: bytes, body: bytes) -> bytes:
    return content[:2] + b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body + content[2:]


def _described_png(kind: bytes, body: bytes) -> bytes:
    return png(*SIZE, zlib.compress((b"\x00" + bytes(RED) * SIZE[0]) * SIZE[1]), png_chunk(kind, body))


def _frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", SIZE, (0, 255 - number, number)) for number in range(count)]


def _interlaced() -> bytes:
    """Adam7 by hand: Pillow writes none. Seven passes, each of its own size."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b""
    for left, top, across, down in passes:
        width, height = -(-(SIZE[0] - left) // across), -(-(SIZE[1] - top) // down)
        rows += (b"\x00" + bytes(RED) * width) * height
    return png(*SIZE, zlib.compress(rows), lace=1)


def _big_endian_tiff() -> bytes:
    tags = [(256, 4, 48), (257, 4, 40), (258, 4, 8), (262, 4, 2), (273, 4, 134), (277, 4, 3), (279, 4, 5760)]
    entries = b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"MM\x00*" + struct.pack(">IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(134, b"\x00") + bytes(RED) * (48 * 40)


def _top_down_bmp() -> bytes:
    content = bytearray(saved(Image.new("RGB", SIZE, RED), "BMP"))
    struct.pack_into("<i", content, 22, -SIZE[1])
    return bytes(content)


def bombs_and_lies() -> Iterator[Case]:
    """Small files that ask for much, and headers that are not true."""
    yield from _png_bombs()
    yield from _tiff_bombs()
    yield from _other_bombs()
    yield from _lying_sizes()


def _png_bombs() -> Iterator[Case]:
    zeros = zlib.compress(bytes(30_000_000), 9)
    yield Case("bomb-49-megapixels.png", MediaKind.IMAGE, _solid_png, frozenset({DECODED}), (0, 0, 0))
    yield image("bomb-header.png", png(60_000, 60_000, zlib.compress(b"")), TOO_LARGE)
    yield image("bomb-too-much-data.png", png(10, 10, zeros), DECODED, CORRUPT)
    yield image("bomb-text.png", png(10, 10, b"", png_chunk(b"zTXt", b"words\x00\x00" + zeros)), *REFUSED)
    itxt = b"words\x00\x01\x00\x00\x00" + zeros
    yield image("bomb-many-texts.png", png(10, 10, b"", *[png_chunk(b"iTXt", itxt)] * 20), *REFUSED)
    yield image("bomb-profile.png", png(10, 10, b"", png_chunk(b"iCCP", b"icc\x00\x00" + zeros)), *ANY)
    yield image("many-chunks.png", png(10, 10, b"", *[png_chunk(b"tEXt", b"a\x00b")] * 20_000), *ANY)
    yield image("endless-chunk.png", PNG_MAGIC + b"\xff\xff\xff\xffIHDR" + bytes(1000), *REFUSED)
    frames = png_chunk(b"acTL", struct.pack(">II", 1 << 31, 0))
    yield image("moving-lie.png", png(10, 10, zlib.compress(bytes(310)), frames), *ANY)


def _solid_png() -> bytes:
    press = zlib.compressobj(1)
    row = bytes(1 + 3 * 7000)
    return png(7000, 7000, b"".join(press.compress(row) for _ in range(7000)) + press.flush())


def _tiff_bombs() -> Iterator[Case]:
    def strips(*changes: tuple[int, int, int, int], **options: Any) -> bytes:
        entries = {256: (256, 4, 1, 48), 257: (257, 4, 1, 40), 258: (258, 4, 1, 8), 259: (259, 3, 1, 1)} | {
            262: (262, 3, 1, 1), 273: (273, 4, 1, 8), 277: (277, 3, 1, 1), 278: (278, 4, 1, 40), 279: (279, 4, 1, 1920)
        }  # fmt: skip
        return tiff(*(entries | {change[0]: change for change in changes}).values(), **options)

    squeezed = zlib.compress(bytes(50_000_000), 9)
    deflate = (259, 3, 1, 8)
    tiles = ((322, 4, 1, 1 << 31), (323, 4, 1, 1 << 31), (324, 4, 1, 8), (325, 4, 1, 100))
    loop = b"".join(struct.pack("<HHHIII", 1, 254, 4, 1, 0, 8) for _ in range(5000))
    yield image("huge-tile.tiff", strips(*tiles), *REFUSED)
    yield image("huge-tile-deflate.tiff", strips(deflate, *tiles, tail=squeezed), *REFUSED)
    yield image("huge-tile-fits.tiff", strips(deflate, (322, 4, 1, 30_000), (323, 4, 1, 30_000), *tiles[2:]), TOO_LARGE)
    yield image("deflate-bomb.tiff", strips(deflate, (273, 4, 1, 200), (279, 4, 1, 48_000), tail=squeezed), *ANY)
    yield image("directory-loop.tiff", strips(next_at=8, tail=bytes(4000)), *ANY)
    yield image("many-directories.tiff", strips(next_at=130, tail=loop + bytes(4000)), *ANY)
    yield image("endless-count.tiff", strips((273, 4, 0xFFFFFFFF, 8)), *REFUSED)
    yield image("far-directory.tiff", b"II*\x00\xf0\xff\xff\xff" + bytes(100), *REFUSED)
    yield image("own-directory.tiff", b"II*\x00\x00\x00\x00\x00" + bytes(100), *REFUSED)
    yield image("many-samples.tiff", strips((277, 3, 1, 65_535), tail=bytes(4000)), *REFUSED)
    yield image("deep-samples.tiff", strips((258, 3, 1, 64), tail=bytes(40_000)), *REFUSED)
    yield image("exif-loop.tiff", strips((0x8769, 4, 1, 8), (0x8825, 4, 1, 8), tail=bytes(4000)), *ANY)
    yield image("no-directory.tiff", b"II*\x00\x08\x00\x00\x00\x00\x00", *REFUSED)
    yield image("zero-rows.tiff", strips((278, 4, 1, 0), tail=bytes(4000)), *ANY)


def _other_bombs() -> Iterator[Case]:
    gif = b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\x00\x00" + bytes(6)
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\x00\x02\x02\x4c\x01\x00"
    small = b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\x00\x00" + bytes(6)
    wide = b"\x2c" + struct.pack("<HHHH", 60_000, 60_000, 5_000, 5_000) + b"\x00\x02\x02\x4c\x01\x00;"
    canvas = chunk(b"VP8X", bytes(4) + b"\xff\x3f\x00\xff\x3f\x00")
    webp = bases()["lossless.webp"]
    yield image("bomb-screen.gif", gif + frame + b";", TOO_LARGE, CORRUPT)
    yield image("bomb-frames.gif", small + frame * 100_000 + b";", *ANY)
    yield image("bomb-frame-outside.gif", small + wide, *REFUSED)
    yield image("endless-comment.gif", small + b"\x21\xfe" + b"\xffcomment".ljust(256, b"!") * 20_000, *REFUSED)
    yield image("bomb-canvas.webp", b"RIFF" + struct.pack("<I", 22) + b"WEBP" + canvas, TOO_LARGE)
    yield image("canvas-lie.webp", b"RIFF" + struct.pack("<I", 22 + len(webp)) + b"WEBP" + canvas + webp[12:], *REFUSED)
    yield image("long-riff.webp", webp[:4] + b"\xff\xff\xff\xff" + webp[8:], *ANY)
    whole = saved(textured(), "JPEG")
    yield image("cut-with-end.jpg", whole[: len(whole) * 2 // 3] + b"\xff\xd9", CORRUPT)
    yield image("bomb-scans.jpg", slow_jpeg(200, side=1500), *ANY)
    yield image(
        "no-tables.jpg", b"\xff\xd8\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + bytes(100) + b"\xff\xd9", *REFUSED
    )
    yield image("fill-bytes.jpg", b"\xff\xd8" + b"\xff" * 1_000_000, *REFUSED)
    yield image("many-comments.jpg", b"\xff\xd8" + b"\xff\xfe\x00\x02" * 100_000 + bases()["baseline.jpg"][2:], *ANY)
    bmp = bytearray(saved(textured().quantize(16), "BMP"))
    struct.pack_into("<I", bmp, 30, 1)
    yield image("run-length-lie.bmp", bytes(bmp), *ANY)
    struct.pack_into("<I", bmp, 46, 0xFFFFFFFF)
    yield image("endless-palette.bmp", bytes(bmp), *ANY)
    struct.pack_into("<I", bmp, 10, 0xFFFFFFF0)
    yield image("pixels-far-away.bmp", bytes(bmp), *REFUSED)


def slow_jpeg(num_scans: int = 20_000, side: int = 3000) -> bytes:
    """Every scan of a progressive JPEG refines the whole picture: a short file asks for it many times."""
    progressive = saved(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")
    return progressive[:last] + progressive[last:-2] * num_scans + b"\xff\xd9"


#: Where a file of each format tells its width and its height, and how.
_SIZE_FIELDS = {
    "plain.png": (">I", 16, 20), "plain.bmp": ("<i", 18, 22), "plain.gif": ("<H", 6, 8), "lossy.webp": ("<H", 26, 28),
}  # fmt: skip


def _lying_sizes() -> Iterator[Case]:
    files = bases()
    jpeg = files["baseline.jpg"]
    frame_at = jpeg.index(b"\xff\xc0") + 5
    places = {name: (files[name], *fields) for name, fields in _SIZE_FIELDS.items()} | {
        "baseline.jpg": (jpeg, ">H", frame_at + 2, frame_at)
    }
    for name, (content, kind, width_at, height_at) in places.items():
        most = 0x3FFF if kind == "<H" else 0xFFFF
        for width, height in ((most, most), (1, most), (most, 1), (0, 0), (0, 40), (48, 4000)):
            lying = bytearray(content)
            struct.pack_into(kind, lying, width_at, width)
            struct.pack_into(kind, lying, height_at, height)
            if name == "plain.png":
                struct.pack_into(">I", lying, 29, zlib.crc32(lying[12:29]))
            may_be_right = height == 4000 or (kind == "<H" and width == 0)  # a GIF's frame may stand out of its screen
            yield image(f"size-{width}x{height}-{name}", bytes(lying), *(ANY if may_be_right else REFUSED))


def pretenders() -> Iterator[Case]:
    """What is no picture, whatever its name says, and what is two things at once."""
    files = bases()
    words = {
        "empty.jpg": b"", "one-byte.png": b"\x89", "text.png": b"no picture\n", "page.jpg": b"<html><script>1</script>",
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "entity.png": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><svg>&b;</svg>',
        "program.gif": b"\x7fELF\x02\x01\x01" + bytes(100), "script.jpg": b"#!/bin/sh\nid\n",
        "paper.jpg": b"%PDF-1.7\n",
        "archive.png": b"PK\x03\x04" + bytes(100), "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n",
        "magick.jpg": b"push graphic-context\nfill 'url(http://127.0.0.1/)'\n", "photoshop.tiff": b"8BPS" + bytes(60),
        "heic.jpg": box(b"ftyp", b"heic" + bytes(4)), "icon.bmp": bytes([0, 0, 1, 0, 1, 0]) + bytes(40),
        "xl.jpg": b"\xff\x0a" + bytes(60), "big.tiff": b"II+\x00\x08\x00\x00\x00" + bytes(60),
        "netpbm.png": b"P6 9999999 9999999 255\n", "zeros.bmp": bytes(4096), "magic-only.gif": b"GIF89a",
    }  # fmt: skip
    for name, content in words.items():
        yield image(f"no-{name}", content, CORRUPT, UNSUPPORTED)
    whole = {"jpg": files["baseline.jpg"], "png": files["plain.png"], "gif": files["plain.gif"]}
    yield image("both-jpeg-zip.zip", whole["jpg"] + b"PK\x03\x04" + bytes(300), DECODED)
    yield image("both-png-page.html", whole["png"] + b"<script>alert(1)</script>", DECODED)
    yield image("both-gif-script.js", whole["gif"] + b"=1;alert(1)//", DECODED)
    yield image("both-gif-archive.zip", whole["gif"] + b"PK\x05\x06" + bytes(18), DECODED)
    yield image("both-paper-jpeg.jpg", b"%PDF-1.4\n" + whole["jpg"], UNSUPPORTED)
    yield image("both-bmp-page.bmp", b"BM<script>/*" + bytes(200), UNSUPPORTED)
    yield image("wrong-name.gif", whole["png"], DECODED)
