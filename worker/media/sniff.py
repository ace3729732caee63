"""Detects the format of a file by its first bytes, never by its name: an allow-list of image and clip formats.

Only formats that this module recognises are passed to Pillow or FFmpeg. So playlists, scripts and containers that could
make a decoder open other files are refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from worker.errors import MediaUnsupported

HEAD_BYTES = 256

_BMP_HEADER_BYTES = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
_QUICKTIME_ATOMS = frozenset({b"moov", b"mdat", b"wide", b"free", b"skip"})
_AUDIO_BRANDS = frozenset({b"M4A ", b"M4B ", b"M4P "})
#: Names of still formats in ISO boxes (ISO 23008-12 and others), by brand; the general brands do not name the codec.
_STILL_BRANDS = {
    b"heic": "HEIF (HEIC)", b"heix": "HEIF (HEIC)", b"heim": "HEIF (HEIC)", b"heis": "HEIF (HEIC)",
    b"hevc": "HEIF (HEIC)", b"hevx": "HEIF (HEIC)", b"avif": "AVIF", b"avis": "AVIF", b"mif1": "HEIF", b"msf1": "HEIF",
    b"mif2": "HEIF", b"jpeg": "HEIF", b"jpgs": "HEIF", b"j2ki": "HEIF", b"vvic": "HEIF",
    b"crx ": "a camera's raw file (CR3)",
    b"jp2 ": "JPEG 2000", b"jpx ": "JPEG 2000", b"jph ": "JPEG 2000", b"jxl ": "JPEG XL",
}  # fmt: skip
_GENERAL_BRANDS = frozenset({b"mif1", b"msf1", b"mif2"})
_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"#EXTM3U", "an M3U playlist"),
    (b"ffconcat", "an FFmpeg concat list"),
    (b"%PDF-", "a PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"8BPS", "a Photoshop document"),
    (b"gimp xcf", "a GIMP document"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"\x8aMNG\r\n", "MNG"),
    (b"\x8bJNG\r\n", "JNG"),
    (b"BPG\xfb", "BPG"),
    (b"FLIF", "FLIF"),
    (b"qoif", "QOI"),
    (b"DDS ", "a DirectDraw surface (DDS)"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"SIMPLE  =", "FITS"),
    (b"icns", "an Apple icon"),
    (b"\x00\x00\x01\x00", "a Windows icon"),
    (b"\x00\x00\x02\x00", "a Windows cursor"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"II+\x00", "BigTIFF"),
    (b"MM\x00+", "BigTIFF"),
    (b"FUJIFILMCCD-RAW", "a camera's raw file (RAF)"),
    (b"IIU\x00", "a camera's raw file (RW2)"),
    (b"IIRO", "a camera's raw file (ORF)"),
    (b"IIRS", "a camera's raw file (ORF)"),
    (b"MMOR", "a camera's raw file (ORF)"),
    (b"FOVb", "a camera's raw file (X3F)"),
    (b"\x00MRM", "a camera's raw file (MRW)"),
    (b"ID3", "MP3 audio, which has no picture stream"),
    (b"OggS", "an Ogg stream"),
    (b"fLaC", "FLAC audio, which has no picture stream"),
    (b"FLV", "Flash video"),
    (b"DKIF", "an IVF stream"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media (ASF)"),
    (b".RMF", "RealMedia"),
    (b"\x00\x00\x01\xba", "an MPEG program stream"),
    (b"\x00\x00\x01\xb3", "an MPEG video stream"),
    (b"\x00\x00\x00\x01", "a video stream without a container"),
)
#: The second byte of Netpbm formats, whose first is P.
_NETPBM = b"123456"
_MARKUP: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", "HTML"),
    (b"<html", "HTML"),
    (b"<svg", "SVG"),
    (b"<mpd", "a DASH playlist"),
    (b"<?xml", "XML"),
    (b"<!--", "XML"),
    (b"<!doctype svg", "SVG"),
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class MediaKind(StrEnum):
    """Whether an object is a still image or a clip."""

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

    Raises MediaUnsupported, naming the format that was found.
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
    """Matroska and WebM are EBML files with their document type near the start."""
    is_matroska = head.startswith(b"\x1aE\xdf\xa3") and (b"matroska" in head[:64] or b"webm" in head[:64])
    return MediaFormat.MATROSKA if is_matroska else None


def _seen(head: bytes) -> str:
    for magic, name in _REFUSED:
        if head.startswith(magic):
            return name
    if head[4:8] == b"ftyp":
        return "MPEG-4 audio, which has no picture stream" if head[8:12] in _AUDIO_BRANDS else _still(head)
    if head.startswith(b"RIFF"):
        return f"a RIFF file of type {head[8:12].decode('ascii', 'replace')!r}"
    if head[128:132] == b"DICM":
        return "DICOM"
    if head[:1] == b"P" and head[1:2] in _NETPBM and head[2:3].isspace():
        return "a Netpbm image (PBM, PGM, PPM)"
    if head[:1] == b"G" and head[188:189] == b"G":
        return "an MPEG transport stream"
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    for tag, name in _MARKUP:
        if text[: len(tag)].lower() == tag:
            return "SVG" if b"<svg" in text.lower() else name
    return "text" if _is_text(text) else f"an unknown format (first bytes {head[:8].hex(' ')})"


def _still(head: bytes) -> str:
    """Name a still in boxes; a general brand leaves the codec to the compatible ones."""
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, min(len(head), int.from_bytes(head[:4], "big")), 4))]
    special = [brand for brand in brands if brand in _STILL_BRANDS and brand not in _GENERAL_BRANDS]
    return _STILL_BRANDS[special[0] if head[8:12] in _GENERAL_BRANDS and special else head[8:12]]


def _is_text(head: bytes) -> bool:
    printable = sum(byte >= 0x20 or byte in b"\t\r\n\f" for byte in head)
    return bool(head) and b"\x00" not in head and printable == len(head) and _is_utf8(head)


def _is_utf8(head: bytes) -> bool:
    try:
        head[:-3].decode() if len(head) >= HEAD_BYTES - 3 else head.decode()
    except UnicodeDecodeError:
        return False
    return True
