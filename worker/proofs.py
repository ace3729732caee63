"""What a well worker can do without any job: tried when jobs fail, to tell whether they or the worker are to blame.

Each proof does in small what every job does there, and takes seconds at most. No ledger, no events.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from PIL import Image

from worker.errors import Part
from worker.media.decoders import Decoders
from worker.media.fetch import MediaFetcher
from worker.media.policy import MediaPolicy
from worker.media.scratch import job_directory
from worker.media.sniff import MediaKind

#: An answer or a decoded picture that takes longer is no proof. Jobs before it may take their time.
PROOF_S: Final = 60.0
DISK_BYTES: Final = 1024 * 1024
PICTURE_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class Proofs:
    """The proofs of one worker. `answers` asks the model about a picture for at most so many seconds."""

    fetcher: MediaFetcher
    decoders: Decoders
    policy: MediaPolicy
    answers: Callable[[float], object]

    def __call__(self, part: Part) -> bool:
        """Tell whether a part of the worker works; it does not, either, when this raises."""
        match part:
            case Part.STORAGE:
                return self.fetcher.is_served()
            case Part.DISK:
                self._write()
            case Part.DECODERS:
                self._decode()
            case Part.ENGINE | Part.PROGRAM:
                self.answers(PROOF_S)
        return True

    def _write(self) -> None:
        with job_directory() as directory:
            (directory / "proof").write_bytes(bytes(DISK_BYTES))

    def _decode(self) -> None:
        give_up_at = time.monotonic() + PROOF_S

        def should_stop() -> None:
            if time.monotonic() > give_up_at:
                raise TimeoutError

        with job_directory() as directory:
            path = directory / "proof"
            Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE)).save(path, "PNG")
            self.decoders.decode(path, MediaKind.IMAGE, 0, self.policy, should_stop=should_stop)
