"""Workers of both releases without a model: they claim, beat, speak, give back and finish through their own ledger."""

from __future__ import annotations

from typing import Protocol

from api_stub.contract.event import CompletedBody, DeltaBody, RetryReason
from api_stub.contract.job import TaskName
from api_stub.contract.result import FinishReason, Result, Timings, Usage
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim, Finished, Hold, Publication
from tests.compat.earlier import Earlier

TEXT = ("A ", "red ", "circle.")


class Worker(Protocol):
    """Serves one model."""

    def claim(self, job_id: str) -> int | None:
        """Take a job; its fence, or None when it may not be had."""

    def beat(self, model: str, *held: tuple[str, int]) -> list[str]:
        """Live on; say of each held job `held`, `cancel` or `lost`."""

    def say(self, job_id: str, fence: int) -> bool:
        """Publish the three pieces of TEXT; False: the job is another's."""

    def give_back(self, job_id: str, fence: int) -> bool:
        """Queue the job again at once."""

    def finish(self, job_id: str, fence: int) -> str:
        """Complete the job with TEXT: `done`, `already` or `lost`."""


class OurWorker:
    """A worker of this release."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def claim(self, job_id: str) -> int | None:
        claim = self._ledger.claim(job_id, "ours@host:1")
        return claim.fence if isinstance(claim, Claim) else None

    def beat(self, model: str, *held: tuple[str, int]) -> list[str]:
        return [Hold(hold).value for hold in self._ledger.beat("ours@host:1", model, held)]

    def say(self, job_id: str, fence: int) -> bool:
        pieces = [
            Publication(
                job_id, fence, number, DeltaBody(text=text, offset=len("".join(TEXT[: number - 1])), num_tokens=1)
            )
            for number, text in enumerate(TEXT, 1)
        ]
        return all(self._ledger.publish(pieces))

    def give_back(self, job_id: str, fence: int) -> bool:
        return self._ledger.give_back(job_id, fence, RetryReason.GIVEN_BACK)

    def finish(self, job_id: str, fence: int) -> str:
        view = self._ledger.view(job_id)
        assert view is not None
        result = Result(
            job_id=job_id, task=TaskName.VQA, model=view.model, text="".join(TEXT), finish_reason=FinishReason.STOP,
            usage=Usage(prompt_tokens=3, completion_tokens=3), timings=Timings(), attempt=view.attempt,
        )  # fmt: skip
        return Finished(self._ledger.finish(job_id, fence, CompletedBody(result=result))).value


class EarlierWorker:
    """A worker of the last release."""

    def __init__(self, earlier: Earlier) -> None:
        self._earlier = earlier

    def claim(self, job_id: str) -> int | None:
        fence = self._earlier('getattr(ledger.claim(job_id, "theirs@host:1"), "fence", None)', job_id=job_id)
        assert fence is None or isinstance(fence, int)
        return fence

    def beat(self, model: str, *held: tuple[str, int]) -> list[str]:
        return list(
            self._earlier('[h.value for h in ledger.beat("theirs@host:1", model, held)]', model=model, held=held)
        )

    def say(self, job_id: str, fence: int) -> bool:
        code = """
            pieces = []
            for number, text in enumerate(texts, 1):
                offset = len("".join(texts[: number - 1]))
                body = event.DeltaBody(text=text, offset=offset, num_tokens=1)
                pieces.append(Publication(job_id, fence, number, body))
            answer = all(ledger.publish(pieces))
        """
        return bool(self._earlier(code, job_id=job_id, fence=fence, texts=TEXT))

    def give_back(self, job_id: str, fence: int) -> bool:
        code = "ledger.give_back(job_id, fence, event.RetryReason.GIVEN_BACK)"
        return bool(self._earlier(code, job_id=job_id, fence=fence))

    def finish(self, job_id: str, fence: int) -> str:
        code = """
            view = ledger.view(job_id)
            said = result.Result(
                job_id=job_id, task=job.TaskName.VQA, model=view.model, text=text,
                finish_reason=result.FinishReason.STOP,
                usage=result.Usage(prompt_tokens=3, completion_tokens=3), timings=result.Timings(),
                attempt=view.attempt,
            )
            answer = ledger.finish(job_id, fence, event.CompletedBody(result=said)).value
        """
        return str(self._earlier(code, job_id=job_id, fence=fence, text="".join(TEXT)))
