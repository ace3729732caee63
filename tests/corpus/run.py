"""Run the corpus through the media layer, from S3 to pixels, and measure what it costs."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from api_stub.contract.conversation import ImagePart, VideoPart
from api_stub.contract.job import TaskName
from tests.corpus import clips, images, mutations, references
from tests.corpus.case import DECODED, Case
from tests.corpus.traps import Traps
from worker.errors import WorkerError
from worker.media.cache import MediaCache
from worker.media.collect import MediaCollector
from worker.media.decoders import Decoders
from worker.media.fetch import ObjectFetcher
from worker.media.sniff import MediaKind
from worker.media.storage import s3_client
from worker.media.types import DecodedImage, DecodedMedia, MediaPolicy

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

POLICY = MediaPolicy(frozenset({"media"}))
NUM_FRAMES = 8
#: Off what a colour may be: JPEG, CMYK.
TOLERANCE = 12
INTERNAL = "internal"


def all_cases(traps: Traps) -> list[Case]:
    """Return the whole corpus; names are unique."""
    return [
        *images.odd_and_right(), *images.bombs_and_lies(), *images.pretenders(), *clips.by_hand(),
        *clips.lies_and_loops(), *mutations.mutations(), *references.references(traps.url, traps.secret),
    ]  # fmt: skip


@dataclass(frozen=True)
class Handled:
    """What became of one file, and how long that took, storage included."""

    case: Case
    outcome: str
    words: str
    seconds: float
    colour: tuple[int, ...] | None = None

    @property
    def is_right(self) -> bool:
        """Whether it is one of the outcomes that the case allows, in the right colour."""
        wanted, seen = self.case.colour, self.colour
        is_off = wanted and seen and max(abs(a - b) for a, b in zip(wanted, seen, strict=True)) > TOLERANCE
        return self.outcome in self.case.outcomes and not is_off


@dataclass(frozen=True)
class Report:
    """`grown_bytes`: the calling process's highest resident memory over its resident memory before.
    `decoder_bytes`: the highest resident memory of any decoder."""

    handled: list[Handled]
    wall_s: float
    grown_bytes: int
    decoder_bytes: int

    def seconds(self, share: float) -> float:
        """Return a quantile of the handling times."""
        times = sorted(one.seconds for one in self.handled)
        return times[min(len(times) - 1, int(share * len(times)))]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in Counter(o.outcome for o in self.handled).most_common())
        slowest = max(self.handled, key=lambda one: one.seconds)
        return (
            f"{len(self.handled)} files in {self.wall_s:.1f} s: {counts}; handling time p50 {self.seconds(0.5):.3f} s, "
            f"p99 {self.seconds(0.99):.2f} s, max {slowest.seconds:.2f} s ({slowest.case.name}); resident memory: "
            f"worker +{self.grown_bytes >> 20} MiB at its highest, a decoder {self.decoder_bytes >> 20} MiB"
        )


def run(cases: Sequence[Case], decoders: Decoders, storage: S3Client, storage_url: str, at_once: int = 2) -> Report:
    """Upload each case and collect it as a job would, `at_once` at a time."""
    fetcher = ObjectFetcher(s3_client(storage_url, "us-east-1", 30.0), POLICY, retries=0)
    collector = MediaCollector(fetcher, POLICY, MediaCache(0), decoders)

    def handle(case: Case) -> Handled:
        storage.put_object(Bucket="media", Key=f"corpus/{case.name}", Body=case.make())
        started_at = time.monotonic()
        outcome, words, colour = INTERNAL, "", None
        try:
            colour = _middle(_collect(collector, case))
            outcome = DECODED
        except WorkerError as error:
            outcome, words = error.code.value, str(error)
        except Exception as error:  # noqa: BLE001 - what a job would end as `internal`
            words = repr(error)
        return Handled(case, outcome, words, time.monotonic() - started_at, colour)

    started_at, before = time.monotonic(), _memory(os.getpid(), "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory starts anew: proc(5)
    with ThreadPoolExecutor(at_once) as pool, _watched(decoders) as highest:
        handled = list(pool.map(handle, cases))
    grown = _memory(os.getpid(), "VmHWM") - before
    return Report(handled, time.monotonic() - started_at, max(0, grown), max(highest))


def _collect(collector: MediaCollector, case: Case) -> DecodedMedia:
    uri = f"s3://media/corpus/{case.name}"
    is_clip = case.kind is MediaKind.VIDEO
    collected = collector.collect(
        [VideoPart(uri=uri) if is_clip else ImagePart(uri=uri)],
        task=TaskName.VIDEO_QA if is_clip else TaskName.CAPTION,
        num_frames=NUM_FRAMES,
        should_stop=lambda: None,
        on_progress=lambda done, total: None,
    )
    return collected.media[0]


def _middle(media: DecodedMedia) -> tuple[int, ...]:
    """Return the colour in the middle of the (first) picture, which must be one that a model can read."""
    picture: Image.Image = media.pixels if isinstance(media, DecodedImage) else media.frames[0]
    assert picture.mode == "RGB"
    assert 0 < media.num_pixels <= POLICY.max_clip_pixels
    colour = picture.getpixel((picture.width // 2, picture.height // 2))
    assert isinstance(colour, tuple)
    return colour


@contextmanager
def _watched(decoders: Decoders) -> Iterator[list[int]]:
    """Note the decoders' resident memory while the block runs, also of those that die."""
    highest, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.05):
            highest.extend(_memory(pid, "VmHWM") for pid in decoders.pids)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        is_over.set()
        thread.join()


def _memory(pid: int, what: str) -> int:
    """Return a line of /proc/PID/status in bytes; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:")), 0)
