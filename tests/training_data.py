"""Small data sets on disk, and what reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.decoding import shared_decoders
from tests.tiny.families import picture
from worker.demo_model.clips import Action, make_clip
from worker.demo_model.draw import write_clip
from worker.media.access import MediaAccess
from worker.media.fetch import ObjectFetcher
from worker.media.storage import s3_client
from worker.media.types import MediaPolicy
from worker.training.dataset import Dataset, Split, open_dataset

POLICY = MediaPolicy(buckets=frozenset({"media"}), max_image_pixels=200 * 200)
NOWHERE = "http://127.0.0.1:1"

Row = Mapping[str, Any] | str


@cache
def access(s3_url: str = NOWHERE) -> MediaAccess:
    """Return what reads media: the decoders of the whole run, and storage at a URL."""
    fetcher = ObjectFetcher(s3_client(s3_url, "us-east-1", 10.0), POLICY, retries=1)
    return MediaAccess(POLICY, fetcher, shared_decoders())


@dataclass(frozen=True)
class DataFolder:
    """A folder with pictures and rows."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    def picture(self, name: str, seed: int = 0, width: int = 40, height: int = 30) -> str:
        """Write a PNG of noise, and return its name."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed, width, height).save(self.path / name, format="PNG")
        return name

    def clip(self, name: str) -> str:
        """Write a clip, and return its name."""
        write_clip(self.path / name, make_clip(Random(0), 12, Action.MOVE))
        return name

    def write(self, rows: Iterable[Row]) -> None:
        """Write `metadata.jsonl`; a row of text stands there as it is."""
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (self.path / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def open(self, seed: int = 1, needed: tuple[Split, ...] = ("train", "validation")) -> Dataset:
        """Open it as a data set."""
        return open_dataset(str(self.path), seed=seed, access=access(), directory=self.path, needed=needed)


def asked(question: str, answer: str) -> list[dict[str, str]]:
    """Return the turns of one question."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
