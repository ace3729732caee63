"""Formats by first bytes."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from worker.errors import MediaUnsupported
from worker.media.sniff import MediaFormat, MediaKind, sniff


def picture(pillow_format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(file, pillow_format)
    return file.getvalue()


@pytest.mark.parametrize("found", [one for one in MediaFormat if one.kind is MediaKind.IMAGE])
def test_stills_that_pillow_writes_are_recognised(found: MediaFormat) -> None:
    assert sniff(picture(found.value.upper())[:256]) is found


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2mp41", MediaFormat.MP4),
        (b"\x00\x00\x00\x18ftypmp42", MediaFormat.MP4),
        (b"\x00\x00\x00\x14ftypqt  ", MediaFormat.MOV),
        (b"\x00\x00\x00\x08wide\x00\x10\x00\x00mdat", MediaFormat.MOV),
        (b"\x1aE\xdf\xa3\xa3B\x86\x81\x01B\x82\x88matroska", MediaFormat.MATROSKA),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\x82\x84webm", MediaFormat.MATROSKA),
        (b"RIFF\x00\x10\x00\x00AVI LIST", MediaFormat.AVI),
        (b"MM\x00*\x00\x00\x00\x08", MediaFormat.TIFF),
        (b"GIF87a\x01\x00", MediaFormat.GIF),
    ],
)
def test_containers_and_old_variants_are_recognised(head: bytes, found: MediaFormat) -> None:
    assert sniff(head) is found


@pytest.mark.parametrize(
    ("head", "seen"),
    [
        (b"", "unknown format"),
        (b"\x00\x01\x02\x03\x04\x05\x06\x07", "00 01 02 03 04 05 06 07"),
        (b"hello, this is a picture of a cat", "but text"),
        ("грустный кот ".encode() * 20, "but text"),
        (b"\xef\xbb\xbf<!DOCTYPE HTML><html>", "HTML"),
        (b"\n <svg xmlns='http://www.w3.org/2000/svg'>", "SVG"),
        (b"<?xml version='1.0'?><MPD>", "XML"),
        (b"#EXTM3U\n#EXT-X-VERSION:3\nhttp://169.254.169.254/", "an M3U playlist"),
        (b"ffconcat version 1.0\nfile /etc/passwd", "an FFmpeg concat list"),
        (b"%PDF-1.7", "a PDF"),
        (b"PK\x03\x04", "a ZIP"),
        (b"RIFF\x00\x10\x00\x00WAVEfmt ", "'WAVE'"),
        (b"\x00\x00\x00\x1cftypheic\x00\x00\x00\x00mif1", r"HEIF \(HEIC\)"),
        (b"\x00\x00\x00\x1cftypavif", "AVIF"),
        (b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1avif", "AVIF"),
        (b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1heic", r"HEIF \(HEIC\)"),
        (b"\x00\x00\x00\x14ftypmif1\x00\x00\x00\x00mif1", "HEIF$"),
        (b"\x00\x00\x00\x18ftypcrx \x00\x00\x00\x01crx isom", r"a camera's raw file \(CR3\)"),
        (b"\x00\x00\x00\x1cftypM4A ", "MPEG-4 audio, which has no picture stream"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51\x00\x2f", "JPEG 2000"),
        (b"II+\x00\x08\x00", "BigTIFF"),
        (b"FUJIFILMCCD-RAW 0201", r"\(RAF\)"),
        (b"IIRO\x08\x00\x00\x00", r"\(ORF\)"),
        (b"IIU\x00\x18\x00\x00\x00", r"\(RW2\)"),
        (b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript"),
        (b"P6\n640 480\n255\n", "Netpbm"),
        (b"v/1\x01\x02\x00", "OpenEXR"),
        (bytes(128) + b"DICM", "DICOM"),
        ((b"G" + bytes(187)) * 2, "an MPEG transport stream"),
        (b"DKIF\x00\x00 \x00AV01", "an IVF stream"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9", "Windows Media"),
        (b"\x1aE\xdf\xa3\x9fB\x82\x84doom", "unknown format"),
        (b"BMusic is my life", "but text"),
    ],
)
def test_everything_else_is_refused_with_what_was_seen(head: bytes, seen: str) -> None:
    with pytest.raises(MediaUnsupported, match=seen):
        sniff(head)


def test_text_cut_inside_a_character_is_still_text() -> None:
    with pytest.raises(MediaUnsupported, match="but text"):
        sniff(("x" + "é" * 200).encode()[:256])
