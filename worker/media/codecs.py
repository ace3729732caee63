"""Plain names of codecs, by the codes that containers give them; and which of them FFmpeg in OpenCV's wheel decodes."""

from __future__ import annotations

from typing import Final

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
#: A clip of one of these that brings no frame is broken; any other may be whole.
_DECODED: Final = frozenset(
    {"H.264", "H.265", "VP8", "VP9", "VP6", "MPEG-4 Visual", "Microsoft MPEG-4", "MPEG-2", "MPEG-1", "H.263",
     "Motion JPEG", "JPEG 2000", "ProRes", "DNxHD", "CineForm", "FFV1", "HuffYUV", "Lagarith", "Ut Video", "PNG",
     "Theora", "Dirac", "Windows Media Video", "DV", "Sorenson Video", "Cinepak", "Apple Animation", "Apple Video",
     "raw frames", "RealVideo", "Apple Intermediate Codec"}
)  # fmt: skip


def plain_name(code: str) -> str:
    """Return a codec's name; empty for a code that is not known here."""
    return _BY_CODE.get(code.strip().lower(), "")


def described(code: str) -> str:
    """Return name and code as a producer may read them."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in code[:32]).strip() or "no code"
    name = plain_name(code)
    return f"{name} ({shown})" if name else shown


def is_decoded(code: str) -> bool:
    """Whether FFmpeg in OpenCV's wheel decodes it for certain."""
    return plain_name(code) in _DECODED
