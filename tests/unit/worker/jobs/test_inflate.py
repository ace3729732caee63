"""Compressed bodies: kombu's methods, and no more bytes than are allowed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tracemalloc
import zlib

import pytest
from kombu import compression

from worker.jobs.entry import inflate

TEXT = b"hello " * 100


@pytest.mark.parametrize("method", ["gzip", "zlib", "bzip2", "bzip", "lzma", "xz"])
def test_what_kombu_compresses_is_inflated(method: str) -> None:
    packed, content_type = compression.compress(TEXT, method)
    assert inflate(packed, method, 600) == inflate(packed, content_type, 600) == TEXT


def test_gzip_s_own_format_is_read_too() -> None:
    assert inflate(gzip.compress(TEXT), "gzip", 600) == TEXT


@pytest.mark.parametrize(
    ("method", "packed"),
    [
        ("gzip", zlib.compress(bytes(100_000_000))),
        ("bzip2", bz2.compress(bytes(100_000_000))),
        ("lzma", lzma.compress(bytes(100_000_000), preset=0)),
    ],
    ids=["gzip", "bzip2", "lzma"],
)
def test_a_hundred_megabytes_in_little_are_refused_in_little_memory(method: str, packed: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 1000000 bytes"):
        inflate(packed, method, 1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("method", ["gzip", "bzip2", "lzma"])
@pytest.mark.parametrize("packed", [b"", b"x", b"hello" * 9])
def test_what_is_not_compressed_is_refused(method: str, packed: bytes) -> None:
    with pytest.raises(ValueError, match=r"the body is n"):
        inflate(packed, method, 1_000)


@pytest.mark.parametrize("method", ["gzip", "bzip2", "lzma"])
def test_half_a_body_is_refused(method: str) -> None:
    packed, _ = compression.compress(TEXT, method)
    with pytest.raises(ValueError, match=r"not whole|is no"):
        inflate(packed[:-9], method, 1_000)


@pytest.mark.parametrize("method", ["zstd", "brotli", "rot13", "x" * 1_000])
def test_an_unknown_method_is_refused_by_name(method: str) -> None:
    with pytest.raises(ValueError, match=method[:80]):
        inflate(b"x", method, 1_000)
