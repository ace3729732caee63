"""What a worker tries without any job: one prompt through the model at its start, and each of its parts when jobs fail.

The prompt, about one plain picture, warms the worker up and tells whether the model answers. The proofs tell whether
failing jobs or the worker are to blame: each does in small what every job does there, and takes seconds at most.
No job, no ledger, no events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from PIL import Image

from api_stub.contract.job import CaptionJob
from api_stub.contract.sampling import SamplingParams
from worker.engine.request import Ended, Finish, GenerationRequest, RequestOutput
from worker.errors import Component, EngineDead, GenerationFailed
from worker.media.collect import job_directory
from worker.media.decoders import Decoders
from worker.media.fetch import ObjectFetcher
from worker.media.sniff import MediaKind
from worker.media.types import DecodedImage, MediaPolicy
from worker.prompting.prepare import PromptBuilder

PLAIN_SIZE: Final = 64
PICTURE_COLOUR: Final = (200, 120, 40)
MAX_NEW_TOKENS: Final = 16
TIMEOUT_S: Final = 600.0  # a large model tunes kernels on its first prompt

#: An answer or a decoded picture that takes longer is no proof. Jobs before it may take their time.
PROOF_S: Final = 60.0
DISK_BYTES: Final = 1024 * 1024
PICTURE_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class TriedOut:
    """The model's answer, its counts and times, and the tokens that the picture cost."""

    text: str
    finish: Finish
    num_media_tokens: int


class Answering(Protocol):
    """What is asked: an engine, or what stands for it."""

    def generate(self, requests: Sequence[GenerationRequest], timeout_s: float) -> Iterator[RequestOutput]: ...


def try_out(engine: Answering, prompts: PromptBuilder, timeout_s: float = TIMEOUT_S) -> TriedOut:
    """Ask once and wait. One caller at a time. Raises the WorkerError that prevents an answer."""
    turns = prompts.turns(CaptionJob(media=("s3://try-out/picture",)))
    picture = DecodedImage(Image.new("RGB", (PLAIN_SIZE, PLAIN_SIZE), PICTURE_COLOUR))
    inputs = prompts.prepare(turns, [picture])
    request = GenerationRequest("try-out", inputs, SamplingParams(max_new_tokens=MAX_NEW_TOKENS, seed=0))
    outputs = list(engine.generate([request], timeout_s))
    finish = outputs[-1].finish
    if finish is None:
        raise EngineDead("the engine stopped before the answer was complete")
    check_finish(finish)
    return TriedOut("".join(output.text for output in outputs), finish, inputs.num_media_tokens)


def check_finish(finish: Finish | None) -> None:
    """Raise EngineDead or GenerationFailed for an end that is no answer's; None is no end."""
    if finish is None:
        return
    if finish.reason is Ended.CANCELLED:
        raise EngineDead("the engine stopped before the answer was complete")
    if finish.error is not None:
        raise GenerationFailed(finish.error)


@dataclass(frozen=True, slots=True)
class Proofs:
    """The proofs of one worker. `answers` asks the model about a picture for at most so many seconds."""

    fetcher: ObjectFetcher
    decoders: Decoders
    policy: MediaPolicy
    answers: Callable[[float], object]

    def __call__(self, component: Component) -> bool:
        """Return whether a component of the worker works; it does not, either, when this raises."""
        match component:
            case Component.STORAGE:
                return self.fetcher.is_served()
            case Component.DISK:
                self._write()
            case Component.DECODERS:
                self._decode()
            case Component.ENGINE | Component.PROGRAM:
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
