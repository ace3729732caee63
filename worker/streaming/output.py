"""From engine outputs to contract events, and to the thread that waits for the answer.

In: the engine's outputs of one step. Out: `output.delta` bodies for the publisher; and, once
everything said so far is in Redis, the end of the request for the waiting job.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from api_stub.contract.event import DeltaBody
from worker.engine.request import Finish, RequestOutput
from worker.streaming.publisher import AttemptStream, Outgoing


class Answer:
    """What the engine has said for one attempt. Written by the publisher's thread, read by the job's own."""

    def __init__(self, request_id: str, stream: AttemptStream) -> None:
        self.request_id = request_id
        self.stream = stream
        self.num_tokens = 0
        self._pieces: list[str] = []
        self._finish: Finish | None = None
        self._ended = threading.Event()

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    def wait(self, timeout_s: float) -> Finish | None:
        """Return how generation ended, or None when it has not after `timeout_s`."""
        return self._finish if self._ended.wait(timeout_s) else None

    def take(self, output: RequestOutput) -> Iterable[Outgoing]:
        """Keep what one step said; return what readers shall see of it."""
        self.num_tokens += output.num_tokens
        if output.text:
            self._pieces.append(output.text)
            body = DeltaBody(text=output.text, offset=output.offset, num_tokens=output.num_tokens)
            yield Outgoing(self.stream, body)
        if output.finish is not None:
            self._finish = output.finish
            # The job may be finished in the ledger only after its last delta: the final event is the last one.
            yield Outgoing(self.stream, None, on_sent=self._ended.set)


class Answers:
    """The answers under way, by request id. Thread-safe."""

    def __init__(self) -> None:
        self._answers: dict[str, Answer] = {}

    def open(self, request_id: str, stream: AttemptStream) -> Answer:
        """Begin to collect the answer of a request."""
        answer = self._answers[request_id] = Answer(request_id, stream)
        return answer

    def close(self, answer: Answer) -> None:
        """Forget an answer; what the engine still says for it is dropped."""
        self._answers.pop(answer.request_id, None)

    def translate(self, step: list[RequestOutput]) -> Iterable[Outgoing]:
        """Turn one engine step into outgoing events. Called on the publisher's thread only."""
        for output in step:
            answer = self._answers.get(output.request_id)
            if answer is not None:
                yield from answer.take(output)
