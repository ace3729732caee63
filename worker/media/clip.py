"""Inspects a clip before decoding: its codec and orientation, and whether it has a picture stream at all.

Also the names of codecs by their codes in containers, and which of them the FFmpeg in OpenCV's wheel decodes.
`ClipFile` opens a file with some boxes hidden from FFmpeg.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from worker.errors import MediaUnsupported
from worker.media.containers import read_avi, read_matroska
from worker.media.sniff import HEAD_BYTES, MediaFormat, MediaKind, sniff
from worker.media.streams import PictureStream, Streams, Tables, Unreadable, read_mp4

AV1: Final = "AV1"

_NAMES: Final = {
    AV1: "av01 dav1 v_av1",
    "H.264": "avc1 avc2 avc3 avc4 h264 x264 davc vssh dva1 dvav v_mpeg4/iso/avc",
    "H.265": "hvc1 hev1 hevc h265 x265 dvh1 dvhe v_mpegh/iso/hevc",
    "H.266 (VVC)": "vvc1 vvi1 h266 v_mpegi/iso/vvc",
    "EVC": "evc1",
    "LCEVC": "lvc1",
    "VP8": "vp08 vp80 v_vp8",
    "VP9": "vp09 vp90 v_vp9",
    "VP6": "vp60 vp61 vp62 vp6f",
    "MPEG-4 Visual": "mp4v fmp4 xvid divx dx50 v_mpeg4/iso/sp v_mpeg4/iso/asp v_mpeg4/iso/ap",
    "Microsoft MPEG-4": "mp42 mp43 div3 mpg4 v_mpeg4/ms/v3",
    "MPEG-2": "mp2v m2v1 mpg2 v_mpeg2 xdvc hdv1 hdv2 hdv3 mx3n mx5n",
    "MPEG-1": "mp1v m1v1 mpg1 mpeg v_mpeg1",
    "H.263": "h263 s263 u263",
    "Motion JPEG": "mjpg mjpa mjpb jpeg avrn v_mjpeg",
    "JPEG 2000": "mjp2 mj2c",
    "JPEG XS": "jxsm",
    "ProRes": "apch apcn apcs apco ap4h ap4x v_prores",
    "ProRes RAW": "aprn aprh",
    "DNxHD": "avdn avdh",
    "CineForm": "cfhd",
    "FFV1": "ffv1 v_ffv1",
    "HuffYUV": "hfyu ffvh",
    "Lagarith": "lags",
    "Ut Video": "ulrg ulra uly0 uly2 uly4",
    "PNG": "png  mpng",
    "Theora": "theo v_theora",
    "Dirac": "drac bbcd v_dirac",
    "Windows Media Video": "wmv1 wmv2 wmv3 wvc1",
    "DV": "dvc  dvcp dvpp dv5n dv5p dvsd dvhd dv25 dv50 dvh5 dvh6",
    "Sorenson Video": "svq1 svq3",
    "Cinepak": "cvid",
    "Apple Animation": "rle ",
    "Apple Video": "rpza",
    "raw frames": "raw  2vuy yuv2 yuy2 v210 i420 iyuv yv12 dib  v_uncompressed",
    "RealVideo": "rv10 rv20 rv30 rv40 v_real/rv10 v_real/rv20 v_real/rv30 v_real/rv40",
    "Apple Intermediate Codec": "icod",
    "REDCODE": "r3d ",
    "AVS2": "avs2",
    "AVS3": "avs3",
    "APV": "apv1",
}
_BY_CODE: Final = {code.strip(): name for name, codes in _NAMES.items() for code in codes.split()}
#: A clip of one of these codecs without a decodable frame is corrupt; one of another codec may just be unsupported.
_DECODED: Final = frozenset(
    {"H.264", "H.265", "VP8", "VP9", "VP6", "MPEG-4 Visual", "Microsoft MPEG-4", "MPEG-2", "MPEG-1", "H.263",
     "Motion JPEG", "JPEG 2000", "ProRes", "DNxHD", "CineForm", "FFV1", "HuffYUV", "Lagarith", "Ut Video", "PNG",
     "Theora", "Dirac", "Windows Media Video", "DV", "Sorenson Video", "Cinepak", "Apple Animation", "Apple Video",
     "raw frames", "RealVideo", "Apple Intermediate Codec"}
)  # fmt: skip

_FREE: Final = b"free"  # ISO 14496-12, 8.1.2: a box that readers skip
_READERS: Final = {
    MediaFormat.MP4: read_mp4,
    MediaFormat.MOV: read_mp4,
    MediaFormat.MATROSKA: read_matroska,
    MediaFormat.AVI: read_avi,
}


def plain_name(code: str) -> str:
    """Return a codec's name; empty for an unknown code."""
    return _BY_CODE.get(code.strip().lower(), "")


def described(code: str) -> str:
    """Return a codec's name and code for an error message; unprintable characters become question marks."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in code[:32]).strip() or "no code"
    name = plain_name(code)
    return f"{name} ({shown})" if name else shown


def is_decoded(code: str) -> bool:
    """Whether the FFmpeg in OpenCV's wheel decodes it for certain."""
    return plain_name(code) in _DECODED


@dataclass(frozen=True, slots=True)
class ClipFile:
    """A clip's file. `hidden`: offsets of the types of boxes that are to be read as free space."""

    path: Path
    hidden: tuple[int, ...] = ()

    def without(self, places: tuple[int, ...]) -> ClipFile:
        """Return the same file with more boxes hidden."""
        return replace(self, hidden=tuple(sorted({*self.hidden, *places})))

    def open_hiding(self) -> io.BufferedIOBase:
        """Open it for reading with the hidden boxes replaced by free space; the file does not change."""
        return _HidingFile(self.path, self.hidden)


class _HidingFile(io.BufferedIOBase):
    def __init__(self, path: Path, hidden: tuple[int, ...]) -> None:
        self._file = path.open("rb", buffering=0)
        self._hidden = hidden

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):  # FFmpeg may seek anywhere, and an exception would end OpenCV
            return -1

    def read(self, size: int | None = -1, /) -> bytes:
        start = self._file.tell()
        content = bytearray(self._file.read(-1 if size is None else size))
        for place in self._hidden:
            first, last = max(place, start), min(place + len(_FREE), start + len(content))
            if first < last:
                content[first - start : last - start] = _FREE[first - place : last - place]
        return bytes(content)

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True, slots=True)
class Clip:
    """An inspected clip. `stream` is None where the container's tables cannot be parsed; `metadata`: boxes that may be
    hidden too, when FFmpeg does not open the clip.
    """

    file: ClipFile
    format: MediaFormat
    stream: PictureStream | None = None
    metadata: tuple[int, ...] = ()

    @property
    def is_av1(self) -> bool:
        """Whether the codec is AV1: OpenCV's FFmpeg can index such a clip and not decode it."""
        return self.stream is not None and plain_name(self.stream.codec) == AV1

    @property
    def undecoded(self) -> str:
        """The codec's name if OpenCV may not decode it, so that a clip without decodable frames need not be corrupt;
            else
        empty.
        """
        return "" if self.stream is None or is_decoded(self.stream.codec) else described(self.stream.codec)


def inspect_clip(path: Path) -> Clip:
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
        raise MediaUnsupported(f"the {found.value} video has no picture stream{_other_streams(streams)}")
    # OpenCV takes the first stream that it has a decoder for, and reports to have one for AV1.
    stream = next((one for one in streams.pictures if _has_decoder(one)), streams.pictures[0])
    if stream.is_encrypted:
        raise MediaUnsupported(f"the {found.value} video is encrypted (codec {described(stream.codec)})")
    return Clip(ClipFile(path, streams.to_hide), found, stream, streams.metadata)


def _has_decoder(stream: PictureStream) -> bool:
    return is_decoded(stream.codec) or plain_name(stream.codec) == AV1


def _other_streams(streams: Streams) -> str:
    seen = [*(["sound"] if streams.num_sounds else []), *(["cover art"] if streams.has_cover else [])]
    return f", only {' and '.join(seen)}" if seen else ""
