"""What a clip is, before any of it is decoded: which codec, which side up, and whether it has pictures at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from worker.errors import MediaUnsupported
from worker.media.avi import read_avi
from worker.media.clip_file import ClipFile
from worker.media.codecs import AV1, described, is_decoded, plain_name
from worker.media.matroska import read_matroska
from worker.media.sniff import HEAD_BYTES, MediaFormat, MediaKind, sniff
from worker.media.streams import PictureStream, Streams, Tables, Unreadable, read_mp4

_READERS: Final = {
    MediaFormat.MP4: read_mp4,
    MediaFormat.MOV: read_mp4,
    MediaFormat.MATROSKA: read_matroska,
    MediaFormat.AVI: read_avi,
}


@dataclass(frozen=True, slots=True)
class Clip:
    """`stream` is None where the container's tables cannot be followed. `metadata`: boxes that may be hidden too."""

    file: ClipFile
    format: MediaFormat
    stream: PictureStream | None = None
    metadata: tuple[int, ...] = ()

    @property
    def is_av1(self) -> bool:
        """Whether OpenCV's FFmpeg, which finds its frames, cannot decode them."""
        return self.stream is not None and plain_name(self.stream.codec) == AV1

    @property
    def undecoded(self) -> str:
        """The codec's name when a clip without a decodable frame may be whole nevertheless; else empty."""
        return "" if self.stream is None or is_decoded(self.stream.codec) else described(self.stream.codec)


def look_at(path: Path) -> Clip:
    """Read the tables of the clip at `path`. Raises MediaUnsupported for what is no clip, has no picture stream or is
    encrypted."""
    with path.open("rb") as file:
        found = sniff(file.read(HEAD_BYTES))
        if found.kind is not MediaKind.VIDEO:
            raise MediaUnsupported(f"a video is due here, the object is a {found.value} image")
        try:
            streams = _READERS[found](Tables(file, path.stat().st_size))
        except Unreadable:
            streams = None
    if streams is None or streams.is_empty:
        return Clip(ClipFile(path), found)
    if not streams.pictures:
        raise MediaUnsupported(f"the {found.value} video has no picture stream{_instead(streams)}")
    # OpenCV takes the first stream that it has a decoder for, and believes to have one for AV1.
    stream = next((one for one in streams.pictures if _has_decoder(one)), streams.pictures[0])
    if stream.is_encrypted:
        raise MediaUnsupported(f"the {found.value} video is encrypted (codec {described(stream.codec)})")
    return Clip(ClipFile(path, streams.in_the_way), found, stream, streams.metadata)


def _has_decoder(stream: PictureStream) -> bool:
    return is_decoded(stream.codec) or plain_name(stream.codec) == AV1


def _instead(streams: Streams) -> str:
    seen = [*(["sound"] if streams.num_sounds else []), *(["cover art"] if streams.has_cover else [])]
    return f", only {' and '.join(seen)}" if seen else ""
