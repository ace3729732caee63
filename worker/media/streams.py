"""The streams of a clip, read from its container's tables without a decoder; this module reads MP4 and QuickTime.

In: a clip file. Out: its picture streams, with codec and orientation, and the boxes to hide from FFmpeg. None for a
container whose tables cannot be parsed: then FFmpeg alone decides whether it is a clip. `worker.media.containers` reads
the other formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from worker.media.orientation import AS_STORED, of_matrix

#: Boxes or elements that are read; hostile files may have any number.
MAX_PARTS: Final = 50_000
#: Bytes that are read of one part.
MAX_PART_BYTES: Final = 64 * 1024

_PICTURES, _SOUND = b"vide", b"soun"
_ENCRYPTED: Final = frozenset({b"encv", b"drmi"})
_ENTRY_BYTES: Final = 86  # a visual sample entry before its boxes: ISO 14496-12, 12.1.3
_METADATA: Final = frozenset({b"udta", b"meta", b"uuid"})
#: Boxes needed to decode a movie's pictures, by the box they are in: ISO 14496-12, 6.2.3. The others are metadata.
_NEEDED: Final = {
    b"moov": frozenset({b"mvhd", b"trak", b"mvex"}),
    b"trak": frozenset({b"tkhd", b"mdia", b"edts"}),
    b"mdia": frozenset({b"mdhd", b"hdlr", b"minf"}),
    b"minf": frozenset({b"vmhd", b"smhd", b"gmhd", b"nmhd", b"sthd", b"hdlr", b"dinf", b"stbl"}),
    b"stbl": frozenset(
        {b"stsd", b"stts", b"ctts", b"cslg", b"stsc", b"stsz", b"stz2", b"stco", b"co64", b"stss", b"stps"}
    ),
}
#: Descriptive boxes in a visual sample entry: HDR, colour, fields, stereo and layers.
_DESCRIBING: Final = frozenset(
    {b"clli", b"CoLL", b"mdcv", b"SmDm", b"amve", b"dvcC", b"dvvC", b"dvwC", b"fiel", b"hfov", b"vexu", b"st3d",
     b"sv3d", b"uuid", b"colr", b"btrt", b"gama", b"chrm"}
)  # fmt: skip
_PIXEL_ASPECT, _PIXEL_ASPECT_BYTES = b"pasp", 8
_IDENTITY: Final = (1.0, 0.0, 0.0, 1.0)


class Unreadable(Exception):
    """Raised when a container's tables cannot be parsed within the limits."""


@dataclass(frozen=True, slots=True)
class PictureStream:
    """codec: as the container names it. orientation: EXIF's number; None where the container's format has none."""

    codec: str
    orientation: int | None = AS_STORED
    is_encrypted: bool = False


@dataclass(frozen=True, slots=True)
class Streams:
    """The streams of one clip.

    pictures: video streams, without cover art and chapters' pictures.
    to_hide: boxes that FFmpeg would take for pictures of the clip.
    metadata: boxes that only describe the clip, and may be broken.
    Boxes are named by the offset of their type in the file.
    """

    pictures: tuple[PictureStream, ...]
    num_sounds: int = 0
    num_others: int = 0
    has_cover: bool = False
    to_hide: tuple[int, ...] = ()
    metadata: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is no stream of any kind."""
        return not (self.pictures or self.num_sounds or self.num_others or self.has_cover)


@dataclass(frozen=True, slots=True)
class Part:
    """A box, a chunk or an element: its type, the type's offset, and the range of its content in the file."""

    kind: bytes
    type_at: int
    start: int
    end: int


@dataclass
class Tables:
    """Bounded access to a file's parts: at most `MAX_PARTS` of them, at most `MAX_PART_BYTES` of each."""

    file: BinaryIO
    num_bytes: int
    num_parts: int = 0

    def read(self, at: int, num_bytes: int) -> bytes:
        """Return so many bytes, or less where the file ends."""
        self.file.seek(at)
        return self.file.read(max(0, min(num_bytes, MAX_PART_BYTES)))

    def content(self, part: Part) -> bytes:
        """Return a part's content, or its beginning."""
        return self.read(part.start, part.end - part.start)

    def count(self) -> None:
        """Count a part. Raises Unreadable when there are too many."""
        self.num_parts += 1
        if self.num_parts > MAX_PARTS:
            raise Unreadable

    def boxes(self, start: int, end: int) -> Iterator[Part]:
        """Yield the boxes between two places (ISO 14496-12, 4.2), the last one cut where they end."""
        at = start
        while at + 8 <= end:
            self.count()
            head = self.read(at, 16)
            length, kind, head_bytes = int.from_bytes(head[:4], "big"), head[4:8], 8
            if length == 1:
                length, head_bytes = int.from_bytes(head[8:16], "big"), 16
            elif length == 0:
                length = end - at
            if length < head_bytes:
                return
            yield Part(kind, at + 4, at + head_bytes, min(end, at + length))
            at += length

    def find(self, part: Part, *path: bytes) -> Part | None:
        """Return the first box on a path of types inside a box."""
        found: Part | None = part
        for kind in path:
            found = found and next((one for one in self.boxes(found.start, found.end) if one.kind == kind), None)
        return found


@dataclass(frozen=True, slots=True)
class _Track:
    box: Part
    number: int
    handler: bytes
    matrix: tuple[float, ...]
    codec: str
    is_encrypted: bool
    chapters: frozenset[int]


def read_mp4(tables: Tables) -> Streams | None:
    """MP4 and QuickTime: ISO 14496-12 and Apple's QuickTime File Format."""
    movie: Part | None = None
    metadata: list[int] = []
    try:
        for part in tables.boxes(0, tables.num_bytes):
            if part.kind == b"moov":
                movie = movie or part
            elif part.kind in _METADATA:
                metadata.append(part.type_at)
    except Unreadable:  # many fragments, for instance; the streams are described in `moov`
        tables.num_parts = 0
    if movie is None:
        return None
    tracks: list[_Track] = []
    matrix: tuple[float, ...] = _IDENTITY
    has_cover = False
    for part in tables.boxes(movie.start, movie.end):
        if part.kind == b"cmov":  # a compressed movie header
            return None
        if part.kind == b"mvhd":
            matrix = _matrix(tables.content(part), 36, 48)
        elif part.kind in _METADATA:
            has_cover = has_cover or _has_cover(tables, part)
        elif part.kind == b"trak":
            tracks.append(_track(tables, part))
    metadata += _not_needed(tables, movie)
    chapters = frozenset().union(*(track.chapters for track in tracks))
    pictures = [track for track in tracks if track.handler == _PICTURES]
    described = [one for track in pictures for one in _description(tables, track.box)]
    metadata += [one.type_at for one in described if one.kind in _DESCRIBING]
    # Of a box that is too short, FFmpeg would read the bytes after it.
    short = [one for one in described if one.kind == _PIXEL_ASPECT and one.end - one.start < _PIXEL_ASPECT_BYTES]
    return Streams(
        pictures=tuple(
            PictureStream(track.codec, of_matrix(*_product(track.matrix, matrix)), track.is_encrypted)
            for track in pictures
            if track.number not in chapters
        ),
        num_sounds=sum(track.handler == _SOUND for track in tracks),
        num_others=sum(track.handler not in (_PICTURES, _SOUND) for track in tracks),
        has_cover=has_cover or any(track.number in chapters for track in pictures),
        to_hide=(
            *(metadata if has_cover else ()),
            *(track.box.type_at for track in pictures if track.number in chapters),
            *(one.type_at for one in short),
        ),
        metadata=tuple(metadata),
    )


def _track(tables: Tables, box: Part) -> _Track:
    header = tables.find(box, b"tkhd")
    head = tables.content(header) if header else b""
    number_at = 20 if head[:1] == b"\x01" else 12
    handler = tables.find(box, b"mdia", b"hdlr")
    described = tables.find(box, b"mdia", b"minf", b"stbl", b"stsd")
    codec, is_encrypted = _codec(tables, described) if described else ("", False)
    chapters = tables.find(box, b"tref", b"chap")
    numbers = tables.content(chapters) if chapters else b""
    return _Track(
        box=box,
        number=int.from_bytes(head[number_at : number_at + 4], "big"),
        handler=tables.content(handler)[8:12] if handler else b"",
        matrix=_matrix(head, 40, 52),
        codec=codec,
        is_encrypted=is_encrypted,
        chapters=frozenset(int.from_bytes(numbers[at : at + 4], "big") for at in range(0, len(numbers), 4)),
    )


def _codec(tables: Tables, described: Part) -> tuple[str, bool]:
    """Return the code of the first sample description, and whether it is encrypted: ISO 14496-12, 8.12."""
    entry = next(tables.boxes(described.start + 8, described.end), None)
    if entry is None:
        return "", False
    code, is_encrypted = entry.kind, entry.kind in _ENCRYPTED
    if is_encrypted:
        inner = Part(entry.kind, entry.type_at, entry.start + _ENTRY_BYTES - 8, entry.end)
        original = tables.find(inner, b"sinf", b"frma")
        code = tables.content(original)[:4] if original else code
    return code.decode("latin-1"), is_encrypted


def _not_needed(tables: Tables, part: Part) -> Iterator[int]:
    """Yield the offsets of boxes, at any depth, that are not needed to decode a movie's pictures."""
    for one in tables.boxes(part.start, part.end):
        if one.kind not in _NEEDED[part.kind]:
            yield one.type_at
        elif one.kind in _NEEDED:
            yield from _not_needed(tables, one)


def _description(tables: Tables, track: Part) -> Iterator[Part]:
    """Yield the boxes in the visual sample entries of a track."""
    described = tables.find(track, b"mdia", b"minf", b"stbl", b"stsd")
    for entry in tables.boxes(described.start + 8, described.end) if described else ():
        yield from tables.boxes(entry.start + _ENTRY_BYTES - 8, entry.end)


def _has_cover(tables: Tables, part: Part) -> bool:
    """Whether a movie's metadata hold cover art, as iTunes writes it."""
    for path in ((b"meta",), ()) if part.kind == b"udta" else ((),):
        meta = tables.find(part, *path)
        if meta is None:
            continue
        for skipped in (4, 0):  # ISO's box has a version, QuickTime's has none
            inner = Part(meta.kind, meta.type_at, meta.start + skipped, meta.end)
            if tables.find(inner, b"ilst", b"covr"):
                return True
    return False


def _matrix(header: bytes, at: int, at_in_version_1: int) -> tuple[float, ...]:
    """Return a, b, c and d of a display matrix: ISO 14496-12, 6.2.2; the identity for a truncated one."""
    start = at_in_version_1 if header[:1] == b"\x01" else at
    numbers = [int.from_bytes(header[place : place + 4], "big", signed=True) for place in range(start, start + 20, 4)]
    a, b, _, c, d = (number / 65_536 for number in numbers)
    return (a, b, c, d) if len(header) >= start + 20 and a * d != b * c else _IDENTITY


def _product(first: tuple[float, ...], then: tuple[float, ...]) -> tuple[float, ...]:
    a, b, c, d = first
    e, f, g, h = then
    return a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h
