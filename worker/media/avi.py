"""The streams of an AVI file: Microsoft's RIFF reference."""

from __future__ import annotations

from collections.abc import Iterator

from worker.media.streams import Part, PictureStream, Streams, Tables


def read_avi(tables: Tables) -> Streams | None:
    """Return the streams that the header lists; the format knows no orientation."""
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
