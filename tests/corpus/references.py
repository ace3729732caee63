"""Files that ask whoever decodes them to open something else: a URL, another file, a list of either.

In: the address of a server and the path of a file that nobody may ever open. Out: cases that name both in every way
in which playlists and containers can.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tests.corpus.blocks import box, chunk, element, full_box
from tests.corpus.case import ANY, CORRUPT, REFUSED, UNSUPPORTED, Case, clip, image
from tests.corpus.clips import avi, avi_list, bases, mkv, replaced
from tests.corpus.images import saved, textured


def references(url: str, secret: Path) -> Iterator[Case]:
    """Return the cases; `url` ends with a slash."""
    for what, place in (("url", f"{url}x.mp4"), ("file", str(secret)), ("concat", f"concat:{secret}|{secret}")):
        for name, content in _lists(place).items():
            yield clip(f"list-{what}-{name}", content, UNSUPPORTED)
            yield image(f"list-{what}-{name}.jpg", content, UNSUPPORTED)
        for name, content in _disguised(place).items():
            yield clip(f"disguised-{what}-{name}", content, *REFUSED)
        for name, content in _containers(place).items():
            yield clip(f"refers-{what}-{name}", content, *ANY)
    yield clip("list-numbered.avi", b"image%03d.jpg", UNSUPPORTED, CORRUPT)


def _lists(place: str) -> dict[str, bytes]:
    """Text that FFmpeg takes for a list or a description of streams, when it may."""
    playlist = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{place}\n#EXT-X-ENDLIST\n"
    keyed = playlist.replace("#EXTINF", f'#EXT-X-KEY:METHOD=AES-128,URI="{place}"\n#EXTINF')
    texts = {
        "list.m3u8": playlist, "key.m3u8": keyed, "marked.m3u8": "\ufeff" + playlist,
        "list.ffconcat": f"ffconcat version 1.0\nfile '{place}'\n",
        "session.sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\na=control:{place}\nm=video 9 RTP/AVP 96\n",
        "manifest.mpd": f'<?xml version="1.0"?><MPD><Period><BaseURL>{place}</BaseURL></Period></MPD>',
        "list.pls": f"[playlist]\nFile1={place}\nNumberOfEntries=1\n", "list.asx": f'<asx><ref href="{place}"/></asx>',
        "effects.txt": f"FFEDL\n{place}\n", "script.avs": f'AviSource("{place}")\n', "plain.txt": f"{place}\n",
    }  # fmt: skip
    return {name: text.encode() for name, text in texts.items()}


def _disguised(place: str) -> dict[str, bytes]:
    """Lists behind the first bytes of an allowed container, long enough to pass for one."""
    playlist = _lists(place)["list.m3u8"]
    return {
        "list.avi": b"RIFF" + struct.pack("<I", len(playlist) + 4) + b"AVI " + playlist,
        "list.mp4": box(b"ftyp", b"isom" + bytes(4)) + playlist,
        "list.mov": box(b"free") + playlist,
        "list.mkv": element(b"\x1a\x45\xdf\xa3", element(b"\x42\x82", b"matroska")) + playlist,
        "list-first.mov": b"\x00\x00\x00\x08wide#EXTM3U\n" + playlist,
    }


def _containers(place: str) -> dict[str, bytes]:
    """Containers that name other files by their own means."""
    frames = [saved(textured(), "JPEG")] * 4
    named = place.encode()
    mp4, mov = bases()["mp4"], bases()["mov"]
    by_url = full_box(b"dref", struct.pack(">I", 1), box(b"url ", bytes(4), named + b"\x00"))
    by_alias = full_box(b"dref", struct.pack(">I", 1), box(b"alis", bytes(4), _alias(place)))
    pointer = box(b"rdrf", bytes(4), b"url ", struct.pack(">I", len(named) + 1), named + b"\x00")
    movie = box(b"moov", box(b"rmra", box(b"rmda", pointer)))
    linked = element(b"\x15\x49\xa9\x66", element(b"\x3e\x83\xbb", named) + element(b"\x3c\x83\xab", named))
    subtitle = b"GAB2\x00\x02\x00" + struct.pack("<I", 2) + b"x\x00" + b"\x04\x00"
    playlist = _lists(place)["list.m3u8"]
    stream = struct.pack("<4s4sIIIIIIIIII8x", b"txts", bytes(4), 0, 0, 0, 1, 25, 0, 1, 0, 0, 0)
    texts = avi_list(b"strl", chunk(b"strh", stream) + chunk(b"strf", b""))
    packet = chunk(b"01tx", subtitle + struct.pack("<I", len(playlist)) + playlist)
    return {
        "data-url.mp4": replaced(mp4, b"dref", lambda _: by_url),
        "data-url.mov": replaced(mov, b"dref", lambda _: by_url),
        "data-alias.mov": replaced(mov, b"dref", lambda _: by_alias),
        "reference-movie.mov": box(b"ftyp", b"qt  " + bytes(4)) + movie,
        "reference-movie-old.mov": movie,
        "linked-segment.mkv": mkv(frames, linked),
        "subtitle-playlist.avi": avi([packet, *frames, packet], texts),
    }


def _alias(place: str) -> bytes:
    """A Macintosh alias record whose absolute path is `place`, as FFmpeg's mov.c reads one."""
    name = place.encode()[-60:]
    path = place.encode().replace(b"/", b":")
    path += b"\x00" * (len(path) % 2)
    head = bytes(10) + b"\x04disk".ljust(28, b"\x00") + bytes(12) + bytes([len(name)]) + name.ljust(63, b"\x00")
    entry = struct.pack(">HH", 2, len(path)) + path
    return head + bytes(16) + struct.pack(">hh", 1, 1) + bytes(16) + entry + struct.pack(">HH", 0xFFFF, 0)
