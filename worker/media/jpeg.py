"""JPEG (ITU T.81): strips its metadata, and finds out whether its pixels are complete.

libjpeg fills missing pixels with grey and reports nothing to Pillow, while Pillow refuses every file without an end
marker. Here the two cases are told apart: the pixels are complete if they do not change with the bytes that follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from worker.media.metadata import MAX_METADATA_BYTES
from worker.media.orientation import AS_STORED, of_exif, of_xmp

_SOI, _EOI, _SOS, _DQT, _DHT, _DRI = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD
_END: Final = b"\xff\xd9"
_JPEG_LS: Final = 0xF7
_TABLES: Final = frozenset({_DHT, 0xCC, _DQT, 0xDC, _DRI, 0xDE, 0xDF})
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {_DHT, 0xC8, 0xCC}
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_ARITHMETIC: Final = frozenset(range(0xC9, 0xD0)) - {0xCC}
#: What libjpeg decodes for certain: baseline, extended and progressive, in Huffman codes.
_COMMON: Final = frozenset({0xC0, 0xC1, 0xC2})
_RARE: Final = {0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical", _JPEG_LS: "JPEG-LS"}
_PIXELS: Final = _FRAMES | _TABLES | {_SOS, _JPEG_LS}
_NO_BODY: Final = frozenset({0x01, *range(0xD0, 0xD8)})
_MARKER: Final = re.compile(rb"\xff+[\x01-\xfe]")
#: In entropy-coded data: a marker that is neither a stuffed byte nor a restart.
_SCAN_END: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_RESTART: Final = re.compile(rb"\xff[\xd0-\xd7]")
_EXIF, _XMP = b"Exif\x00", b"http://ns.adobe.com/xap/1.0/\x00"
#: Bytes appended to a scan to see whether its pixels change. They differ in their first bits, and so in the first code
#: read from them, and are longer than one unit of pixels: of an unfinished unit libjpeg shows nothing.
_PADDINGS: Final = tuple(byte * 4096 for byte in (b"\x00", b"\xaa", b"\x6d", b"\xd6"))
#: A complete scan must become incomplete without its last bytes, of one number or the other: else these are not its
#: own.
_LAST_BYTES: Final = (64, 40)
#: Zero bytes at the end that may belong to the scan.
_LAST_ZEROS: Final = 3
_MID_GREY: Final = range(126, 130)


@dataclass
class _Frame:
    """A frame header: T.81, B.2.2. `components`: id → (horizontal, vertical) sampling."""

    process: int
    precision: int
    size: tuple[int, int]
    components: dict[int, tuple[int, int]]


@dataclass
class Jpeg:
    """A JPEG without metadata. `data` ends with the last scan's, without the end marker."""

    data: bytes
    has_end: bool
    orientation: int = AS_STORED
    frame: _Frame | None = None
    interval: int = 0
    scans: list[tuple[tuple[int, ...], int, int, int]] = field(default_factory=list)
    last_scan: bytes = b""

    @property
    def content(self) -> bytes:
        """The file with an end marker; where it had none, padded first, because libjpeg reads some bytes ahead."""
        return self.data + (b"" if self.has_end else _PADDINGS[0]) + _END

    @property
    def coding(self) -> str:
        """The coding where not every decoder supports it, for the error text; else empty."""
        if self.frame is None or (self.frame.process in _COMMON and self.frame.precision == 8):
            return ""
        return f"{_RARE.get(self.frame.process, 'arithmetic')} coding, {self.frame.precision} bits"

    def is_doubtful(self, last_pixel: tuple[int, ...]) -> bool:
        """Whether pixels may be missing, so that `is_whole` must decide.

        So it is without an end marker, with too little data, with several scans (the last may be truncated without an
        effect on the pixels), or when the last pixel is libjpeg's grey. Arithmetic coding with an end marker is
        trusted: its encoders leave out zeros at the end.
        """
        if not (self.has_end and self._has_scans() and self._has_restarts()):
            return True
        if self.frame is not None and self.frame.process in _ARITHMETIC:
            return False
        return len(self.scans) > 1 or _is_mid_grey(last_pixel)

    def is_whole(self, pixels: Callable[[bytes], bytes]) -> bool:
        """Whether no pixel is missing. `pixels` decodes a file; it is called twice or more.

        A truncated scan takes its next pixels from the bytes that follow, so different bytes give different pixels. A
        file without an end marker must also have all its scans, and few bytes after the last one.
        """
        if not self._has_restarts():
            return False
        if self.has_end:  # a progressive file may leave out its last refinements
            return self._has_components() and not _depends_on_continuation(self.data, pixels, _PADDINGS[:2])
        data = self.data.rstrip(b"\xff")
        shorn = data.rstrip(b"\x00")
        if len(data) - len(shorn) > _LAST_ZEROS:  # truncated files are often padded with zeros
            data = shorn + (b"\x00" if shorn.endswith(b"\xff") else b"")
        if not self._has_scans() or _depends_on_continuation(data, pixels):
            return False
        if len(self.last_scan) - (len(self.data) - len(data)) <= max(_LAST_BYTES):
            return True
        shorter = (data[:-num_bytes].rstrip(b"\xff") for num_bytes in _LAST_BYTES)
        return any(_depends_on_continuation(one, pixels) for one in shorter)

    def _has_restarts(self) -> bool:
        """Whether the last scan has as many restart markers as its size asks for."""
        if self.frame is None or not self.interval or not self.scans or 0 in self.frame.size:
            return True
        components = [self.frame.components.get(one, (1, 1)) for one in self.scans[-1][0]]
        sampling = list(self.frame.components.values())
        across, down = max(h for h, _ in sampling), max(v for _, v in sampling)
        width, height = self.frame.size
        if len(components) == 1:
            h, v = components[0]
            num_units = _ceil(_ceil(width * h, across), 8) * _ceil(_ceil(height * v, down), 8)
        else:
            num_units = _ceil(width, 8 * across) * _ceil(height, 8 * down)
        return len(_RESTART.findall(self.last_scan)) >= _ceil(num_units, self.interval) - 1

    def _has_components(self) -> bool:
        """Whether there is a first scan for every component."""
        begun = {one for components, first, _, _ in self.scans if first == 0 for one in components}
        return self.frame is not None and begun >= set(self.frame.components)

    def _has_scans(self) -> bool:
        """Whether the scans hold every coefficient of every component to its last bit (T.81, G.1.1.1)."""
        if self.frame is None:
            return False
        if self.frame.process not in _PROGRESSIVE:
            return self._has_components()
        finished: dict[int, set[int]] = {one: set() for one in self.frame.components}
        for components, first, last, low in self.scans:
            for one in components:
                if low == 0 and one in finished:
                    finished[one] |= set(range(first, last + 1))
        return all(len(ones) == 64 for ones in finished.values())


def read_jpeg(content: bytes) -> Jpeg:
    """Parse the segments up to the end marker, the end of the file or the first that cannot be parsed."""
    kept: list[bytes | memoryview] = [b"\xff\xd8"]
    jpeg = Jpeg(b"", has_end=False)
    exif = xmp = None
    at, view = 2, memoryview(content)
    while (found := _MARKER.match(content, at)) is not None:
        marker, start = content[found.end() - 1], found.end()
        if marker in (_EOI, _SOI):  # another picture may follow one that lacks its end marker
            jpeg.has_end = marker == _EOI
            break
        if marker in _NO_BODY:
            at = start
            continue
        at = start + int.from_bytes(content[start : start + 2], "big")
        body = content[start + 2 : at]
        if marker == _SOS:
            end = found_end.start() if (found_end := _SCAN_END.search(content, at)) else len(content)
            _note_scan(jpeg, body, content[at:end])
            at = end
        elif marker not in _PIXELS:
            if at < start + 2 or _MARKER.match(content, at) is None:
                at, body = _after_broken_length(content, start), b""
            if marker == 0xE1 and body.startswith(_EXIF):
                exif = exif or of_exif(body)
            elif marker == 0xE1 and body.startswith(_XMP):
                xmp = xmp or of_xmp(body[:MAX_METADATA_BYTES])
            if not _sets_colour_space(marker, body):
                continue
        elif marker in _FRAMES or marker == _JPEG_LS:
            jpeg.frame = jpeg.frame or _frame(marker, body)
        elif marker == _DRI and len(body) == 2:
            jpeg.interval = int.from_bytes(body, "big")
        kept.append(b"\xff")
        kept.append(view[start - 1 : at])
    jpeg.data = b"".join(kept)
    jpeg.orientation = exif or xmp or AS_STORED
    return jpeg


def _note_scan(jpeg: Jpeg, header: bytes, data: bytes) -> None:
    """A scan header: T.81, B.2.3."""
    count = header[0] if header else 0
    if len(header) >= 4 + 2 * count:
        first, last, bits = header[1 + 2 * count : 4 + 2 * count]
        jpeg.scans.append((tuple(header[1 : 1 + 2 * count : 2]), first, min(last, 63), bits & 15))
    jpeg.last_scan = data


def _frame(process: int, body: bytes) -> _Frame | None:
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        return None
    components = {
        body[at]: (max(1, body[at + 1] >> 4), max(1, body[at + 1] & 15)) for at in range(6, 6 + 3 * body[5], 3)
    }
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    return _Frame(process, body[0], (width, height), components)


def _sets_colour_space(marker: int, body: bytes) -> bool:
    """JFIF's and Adobe's segments, whole: libjpeg takes the colour space from them."""
    is_jfif = marker == 0xE0 and body.startswith(b"JFIF\x00") and len(body) >= 14
    return is_jfif or (marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12)


def _after_broken_length(content: bytes, start: int) -> int:
    """Return the start of the next segment after metadata with a wrong length; the end of the file if it may belong to
    an embedded preview, which is a JPEG too.
    """
    for found in _MARKER.finditer(content, start + 2):
        marker, at = content[found.end() - 1], found.end()
        if marker == _SOI:
            break
        if marker in _PIXELS or 0xE0 <= marker <= 0xEF:
            end = at + int.from_bytes(content[at : at + 2], "big")
            if end >= at + 2 and _MARKER.match(content, end):
                return found.start()
    return len(content)


def _depends_on_continuation(
    data: bytes, pixels: Callable[[bytes], bytes], paddings: tuple[bytes, ...] = _PADDINGS
) -> bool:
    first = pixels(data + paddings[0] + _END)
    return any(pixels(data + padding + _END) != first for padding in paddings[1:])


def _is_mid_grey(pixel: tuple[int, ...]) -> bool:
    """Whether a pixel is as bright as a missing one; its colour may come from its neighbours (subsampled chroma)."""
    if len(pixel) == 3:  # T.871, 7
        red, green, blue = pixel
        return round(0.299 * red + 0.587 * green + 0.114 * blue) in _MID_GREY
    return all(band in _MID_GREY for band in pixel)


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
