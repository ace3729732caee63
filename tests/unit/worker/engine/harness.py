"""Runs an engine in a test and collects what it says, request by request."""

from __future__ import annotations

import itertools
import queue
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from api_stub.contract.sampling import SamplingParams
from tests.tiny.jobs import TinyModel
from worker.engine.config import EngineConfig, PagedConfig
from worker.engine.engine import Engine
from worker.engine.request import Finish, GenerationRequest, RequestOutput
from worker.models.inputs import LoadedAdapter, ModelInputs

TIMEOUT_S = 60.0


@dataclass
class Outbox:
    """Where an engine's outputs go."""

    steps: queue.SimpleQueue[list[RequestOutput]] = field(default_factory=queue.SimpleQueue)
    outputs: dict[str, list[RequestOutput]] = field(default_factory=lambda: defaultdict(list))

    def read(self) -> list[RequestOutput]:
        """Wait for the outputs of the next step that has any."""
        outputs = self.steps.get(timeout=TIMEOUT_S)
        for output in outputs:
            self.outputs[output.request_id].append(output)
        return outputs

    def finish(self, request_id: str) -> Finish:
        """Wait for a request's end and check that its outputs fit together."""
        while not (self.outputs[request_id] and self.outputs[request_id][-1].finish):
            self.read()
        outputs = self.outputs[request_id]
        assert [output.finish for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        offset = 0
        for output in outputs:
            assert output.offset == offset
            offset += len(output.text)
        finish = outputs[-1].finish
        assert finish is not None
        return finish

    def text(self, request_id: str) -> str:
        """Return the text told so far."""
        return "".join(output.text for output in self.outputs[request_id])


_numbers = itertools.count()


def request(inputs: ModelInputs, max_new_tokens: int = 8, **sampling: object) -> GenerationRequest:
    """Make a request with a fresh id."""
    params = SamplingParams.model_validate({"seed": 0, "max_new_tokens": max_new_tokens, **sampling})
    return GenerationRequest(f"request-{next(_numbers)}", inputs, params)


@contextmanager
def running_engine(
    tiny: TinyModel,
    max_num_seqs: int = 8,
    max_model_len: int = 512,
    paged: PagedConfig | None = None,
    adapters: Sequence[LoadedAdapter] = (),
) -> Iterator[tuple[Engine, Outbox]]:
    """Start an engine for the block and end it afterwards."""
    outbox = Outbox()
    config = EngineConfig(max_num_seqs, max_model_len, paged=paged, adapters=adapters)
    engine = Engine(tiny.model, tiny.tokenizer, config, outbox.steps.put)
    engine.start()
    try:
        yield engine, outbox
    finally:
        engine.stop(timeout_s=TIMEOUT_S)
        assert not engine.is_alive
