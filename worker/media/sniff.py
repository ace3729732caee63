"""Tell what a file is by its first bytes, never by its name: an allow-list of image and clip formats.

Playlists, scripts and containers that could make a decoder open something else are refused here, because only
what this module recognises is ever handed to Pillow or FFmpeg.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from worker.errors import MediaUnsupported

HEAD_BYTES = 256

_BMP_HEADER_BYTES = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
_QUICKTIME_ATOMS = frozenset({b"moov", b"mdat", b"wide", b"free", b"skip"})
_STILL_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis"})
_AUDIO_BRANDS = frozenset({b"M4A ", b"M4B ", b"M4P "})
_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"#EXTM3U", "an M3U playlist"),
    (b"ffconcat", "an FFmpeg concat list"),
    (b"%PDF-", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"8BPS", "a Photoshop document"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\x00\x00\x01\x00", "a Windows icon"),
    (b"ID3", "MP3 audio"),
    (b"OggS", "an Ogg stream"),
    (b"fLaC", "FLAC audio"),
    (b"FLV", "Flash video"),
)
_MARKUP: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", "HTML"),
    (b"<html", "HTML"),
    (b"<svg", "SVG"),
    (b"<mpd", "a DASH playlist"),
    (b"<?xml", "XML"),
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class MediaKind(StrEnum):
    """What a job sees in an object."""

    IMAGE = "image"
    VIDEO = "video"


class MediaFormat(StrEnum):
    """The formats a job may use."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    GIF = "gif"
    BMP = "bmp"
    TIFF = "tiff"
    MP4 = "mp4"
    MOV = "mov"
    MATROSKA = "matroska"
    AVI = "avi"

    @property
    def kind(self) -> MediaKind:
        """Stills are images, an animated GIF or WebP too (its first frame counts)."""
        return MediaKind.VIDEO if self in _VIDEO_FORMATS else MediaKind.IMAGE


_VIDEO_FORMATS = frozenset({MediaFormat.MP4, MediaFormat.MOV, MediaFormat.MATROSKA, MediaFormat.AVI})


@dataclass(frozen=True, slots=True)
class _Signature:
    format: MediaFormat
    offset: int
    magic: bytes


_SIGNATURES = (
    _Signature(MediaFormat.JPEG, 0, b"\xff\xd8\xff"),
    _Signature(MediaFormat.PNG, 0, b"\x89PNG\r\n\x1a\n"),
    _Signature(MediaFormat.GIF, 0, b"GIF87a"),
    _Signature(MediaFormat.GIF, 0, b"GIF89a"),
    _Signature(MediaFormat.TIFF, 0, b"II*\x00"),
    _Signature(MediaFormat.TIFF, 0, b"MM\x00*"),
)


def sniff(head: bytes) -> MediaFormat:
    """Return the format of a file that starts with `head` (its first `HEAD_BYTES`, or all of a shorter file).

    Raises MediaUnsupported, saying what was seen instead.
    """
    for signature in _SIGNATURES:
        if head.startswith(signature.magic, signature.offset):
            return signature.format
    found = _riff(head) or _bitmap(head) or _iso_media(head) or _matroska(head)
    if found is None:
        raise MediaUnsupported(f"not an image or video of a supported format but {_seen(head)}")
    return found


def _riff(head: bytes) -> MediaFormat | None:
    if not head.startswith(b"RIFF"):
        return None
    return {b"WEBP": MediaFormat.WEBP, b"AVI ": MediaFormat.AVI}.get(head[8:12])


def _bitmap(head: bytes) -> MediaFormat | None:
    is_bitmap = head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADER_BYTES
    return MediaFormat.BMP if is_bitmap else None


def _iso_media(head: bytes) -> MediaFormat | None:
    """MP4 and QuickTime: a box length, then `ftyp` and a brand; the oldest QuickTime files have no `ftyp`."""
    box, brand = head[4:8], head[8:12]
    if box in _QUICKTIME_ATOMS:
        return MediaFormat.MOV
    if box != b"ftyp" or brand in _STILL_BRANDS or brand in _AUDIO_BRANDS:
        return None
    return MediaFormat.MOV if brand == b"qt  " else MediaFormat.MP4


def _matroska(head: bytes) -> MediaFormat | None:
    """Matroska and WebM share EBML with other files: the document type, near the start, tells."""
    is_matroska = head.startswith(b"\x1aE\xdf\xa3") and (b"matroska" in head[:64] or b"webm" in head[:64])
    return MediaFormat.MATROSKA if is_matroska else None


def _seen(head: bytes) -> str:
    for magic, name in _REFUSED:
        if head.startswith(magic):
            return name
    if head[4:8] == b"ftyp":
        return "MPEG-4 audio" if head[8:12] in _AUDIO_BRANDS else "HEIF or AVIF"
    if head.startswith(b"RIFF"):
        return f"a RIFF file of type {head[8:12].decode('ascii', 'replace')!r}"
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    for tag, name in _MARKUP:
        if text[: len(tag)].lower() == tag:
            return name
    return "text" if _is_text(text) else f"an unknown format (first bytes {head[:8].hex(' ')})"


def _is_text(head: bytes) -> bool:
    printable = sum(byte >= 0x20 or byte in b"\t\r\n\f" for byte in head)
    return bool(head) and b"\x00" not in head and printable == len(head) and _is_utf8(head)


def _is_utf8(head: bytes) -> bool:
    try:
        head[:-3].decode() if len(head) >= HEAD_BYTES - 3 else head.decode()
    except UnicodeDecodeError:
        return False
    return True
