"""The streams of clips in AVI (Microsoft's RIFF reference), Matroska and WebM (RFC 9559, RFC 8794)."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Final

from worker.media.orientation import AS_STORED, of_rotation
from worker.media.streams import Part, PictureStream, Streams, Tables, Unreadable


def read_avi(tables: Tables) -> Streams | None:
    """Return the streams in an AVI's header; the format has no orientation."""
    pictures, num_sounds, num_others = [], 0, 0
    header = next((one for one in _chunks(tables, 12, tables.num_bytes) if one.kind == b"LISThdrl"), None)
    if header is None:
        return None
    for stream in _chunks(tables, header.start, header.end):
        if stream.kind != b"LISTstrl":
            continue
        parts = {one.kind: tables.content(one) for one in _chunks(tables, stream.start, stream.end)}
        kind, form = parts.get(b"strh", b"")[:8], parts.get(b"strf", b"")
        if kind[:4] in (b"vids", b"iavs"):
            pictures.append(PictureStream((form[16:20] or kind[4:8]).decode("latin-1"), None))
        num_sounds += kind[:4] == b"auds"
        num_others += kind[:4] in (b"txts", b"mids")
    return Streams(tuple(pictures), num_sounds, num_others)


def _chunks(tables: Tables, start: int, end: int) -> Iterator[Part]:
    """Yield RIFF chunks; of a list, the kind is `LIST` and the list's own."""
    at = start
    while at + 8 <= end:
        tables.count()
        head = tables.read(at, 12)
        length, is_list = int.from_bytes(head[4:8], "little"), head[:4] == b"LIST"
        yield Part(
            head[:4] + (head[8:12] if is_list else b""), at, at + (12 if is_list else 8), min(end, at + 8 + length)
        )
        at += 8 + length + length % 2


_SEGMENT, _TRACKS, _TRACK, _CLUSTER = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\x1f\x43\xb6\x75"
_ATTACHMENTS: Final = b"\x19\x41\xa4\x69"
_KIND, _CODEC, _PRIVATE, _VIDEO, _ENCODINGS = b"\x83", b"\x86", b"\x63\xa2", b"\xe0", b"\x6d\x80"
_ENCODING, _ENCODING_KIND = b"\x62\x40", b"\x50\x33"
_PROJECTION, _PROJECTION_KIND, _YAW, _PITCH, _ROLL = b"\x76\x70", b"\x76\x71", b"\x76\x73", b"\x76\x74", b"\x76\x75"
_PICTURES, _SOUND = 1, 2
_RECTANGULAR: Final = 0
_ENCRYPTION: Final = 1
_FOUR_LETTERS: Final = "V_MS/VFW/FOURCC"


def read_matroska(tables: Tables) -> Streams | None:
    """Return the streams of the first segment; None when its tracks come after its first cluster."""
    segment = next((one for one in _elements(tables, 0, tables.num_bytes) if one.kind == _SEGMENT), None)
    if segment is None:
        return None
    has_cover = False
    tracks: Part | None = None
    for part in _elements(tables, segment.start, segment.end):
        if part.kind == _CLUSTER:
            break
        has_cover = has_cover or part.kind == _ATTACHMENTS
        tracks = part if part.kind == _TRACKS and tracks is None else tracks
    if tracks is None:
        return None
    pictures, num_sounds, num_others = [], 0, 0
    for part in _elements(tables, tracks.start, tracks.end):
        if part.kind != _TRACK:
            continue
        track = {one.kind: one for one in _elements(tables, part.start, part.end)}
        if _KIND not in track:  # it may follow an invalid element
            raise Unreadable
        kind = _number(tables, track[_KIND])
        num_sounds += kind == _SOUND
        num_others += kind not in (_SOUND, _PICTURES)
        if kind == _PICTURES:
            pictures.append(
                PictureStream(_codec(tables, track), _orientation(tables, track), _is_encrypted(tables, track))
            )
    return Streams(tuple(pictures), num_sounds, num_others, has_cover)


def _elements(tables: Tables, start: int, end: int) -> Iterator[Part]:
    """Yield EBML elements up to the first invalid one; one of unknown size reaches to the end of its parent.

    Raises Unreadable when there are too many.
    """
    at = start
    while at < end:
        tables.count()
        head = tables.read(at, 12)
        id_bytes = 9 - head[0].bit_length() if head and head[0] else 9
        if id_bytes > 4 or len(head) <= id_bytes or not head[id_bytes]:
            return
        size_bytes = 9 - head[id_bytes].bit_length()
        size = int.from_bytes(head[id_bytes : id_bytes + size_bytes], "big") & ((1 << 7 * size_bytes) - 1)
        content = at + id_bytes + size_bytes
        is_unknown = size == (1 << 7 * size_bytes) - 1
        yield Part(head[:id_bytes], at, content, end if is_unknown else min(end, content + size))
        at = end if is_unknown else content + size


def _codec(tables: Tables, track: dict[bytes, Part]) -> str:
    """Return the codec's id, or for Microsoft's codecs its FourCC."""
    name = tables.content(track[_CODEC])[:64].rstrip(b"\x00").decode("latin-1") if _CODEC in track else ""
    if name == _FOUR_LETTERS and _PRIVATE in track:
        return tables.content(track[_PRIVATE])[16:20].decode("latin-1")
    return name


def _orientation(tables: Tables, track: dict[bytes, Part]) -> int:
    """Return the orientation of a rectangular projection: rotated counter-clockwise by its roll, mirrored by a yaw of
    180°.
    """
    video = track.get(_VIDEO)
    parts = {one.kind: one for one in _elements(tables, video.start, video.end)} if video else {}
    projection = parts.get(_PROJECTION)
    if projection is None:
        return AS_STORED
    parts = {one.kind: one for one in _elements(tables, projection.start, projection.end)}
    yaw, pitch, roll = (_float(tables, parts.get(kind)) for kind in (_YAW, _PITCH, _ROLL))
    is_flat = _number(tables, parts.get(_PROJECTION_KIND)) == _RECTANGULAR and pitch == 0
    if not is_flat or abs(yaw) not in (0, 180) or not math.isfinite(roll):
        return AS_STORED
    return of_rotation(roll if yaw else -roll, then_mirrored=yaw != 0)


def _is_encrypted(tables: Tables, track: dict[bytes, Part]) -> bool:
    encodings = track.get(_ENCODINGS)
    for encoding in _elements(tables, encodings.start, encodings.end) if encodings else ():
        parts = {one.kind: one for one in _elements(tables, encoding.start, encoding.end)}
        if encoding.kind == _ENCODING and _number(tables, parts.get(_ENCODING_KIND)) == _ENCRYPTION:
            return True
    return False


def _number(tables: Tables, part: Part | None) -> int:
    """Return an unsigned number; 0, the default of all elements read here, when it is absent."""
    return int.from_bytes(tables.content(part)[:8], "big") if part else 0


def _float(tables: Tables, part: Part | None) -> float:
    content = tables.content(part) if part else b""
    return float(struct.unpack({4: ">f", 8: ">d"}[len(content)], content)[0]) if len(content) in (4, 8) else 0.0
