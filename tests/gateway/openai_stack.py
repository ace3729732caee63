"""What OpenAI's own client needs: a gateway, a key's name or none, and workers that answer whatever comes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import openai
import redis

from api_stub.contract import names
from api_stub.contract.error import ErrorCode
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.workers import ScriptedWorker

WAIT_S = 60.0


def openai_client(url: str, key: str = "none", max_retries: int = 0) -> openai.OpenAI:
    """OpenAI's package, unmodified."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=max_retries, timeout=WAIT_S)


class EagerWorker:
    """Answers every job of a model with what its last turn says, and counts how often it claimed each."""

    def __init__(self, redis_url: str, model: str = "default") -> None:
        self.num_claims: dict[str, int] = {}
        self._ledger = Ledger.connect(redis_url, LedgerConfig())
        self._model = model
        self._redis = redis.Redis.from_url(redis_url, decode_responses=True, socket_timeout=10)
        self._stop = threading.Event()
        self._may_go = threading.Event()
        self._may_go.set()
        self._thread = threading.Thread(target=self._run, name="eager-worker")

    def pause(self) -> None:
        self._may_go.clear()

    def go_on(self) -> None:
        self._may_go.set()

    def start(self) -> None:
        self._ledger.beat("scripted@test:1", self._model, [])
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._may_go.set()
        self._thread.join(WAIT_S)
        self._ledger.close()
        self._redis.close()

    def _run(self) -> None:
        lists = [names.waiting_key(names.list_id(self._model, step)) for step in names.PRIORITY_STEPS]
        while not self._stop.is_set():
            self._may_go.wait(1)
            found = [job_id for key in lists for job_id in self._redis.zrange(key, 0, 63)]
            if not self._may_go.is_set() or not found:
                self._stop.wait(0.01)
                continue
            for job_id in found:
                self._answer(str(job_id))

    def _answer(self, job_id: str) -> None:
        claim = self._ledger.claim(job_id, "scripted@test:1")
        if not isinstance(claim, Claim):
            return
        self.num_claims[job_id] = self.num_claims.get(job_id, 0) + 1
        worker = ScriptedWorker(self._ledger)
        worker.hold(claim)
        text = json.loads(claim.body)["messages"][-1]["content"][-1].get("text", "nothing")
        if text == "fail":
            worker.fail(ErrorCode.MEDIA_NOT_FOUND)
        else:
            worker.say("you said ", text)
            worker.finish()


@contextmanager
def eager_worker(redis_url: str, model: str = "default") -> Iterator[EagerWorker]:
    worker = EagerWorker(redis_url, model)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def in_background(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread
