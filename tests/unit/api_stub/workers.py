"""A worker without a model: it plays claim, publish and finish through the real ledger, as fast as a test asks."""

from __future__ import annotations

from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import CompletedBody, DeltaBody, FailedBody, ProgressBody, RetryReason, RunningBody, Stage
from api_stub.contract.result import FinishReason, Result, Timings, Usage
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim, Finished, Publication


class ScriptedWorker:
    """Holds one job at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._claim: Claim | None = None
        self._number = 0
        self.text = ""

    @property
    def claim(self) -> Claim:
        assert self._claim is not None
        return self._claim

    def take(self, job_id: str) -> None:
        """Claim a queued job."""
        claim = self.ledger.claim(job_id, "scripted@test:1")
        assert isinstance(claim, Claim), claim
        self.hold(claim)

    def hold(self, claim: Claim) -> None:
        """Go on with a job that was claimed elsewhere."""
        self._claim, self._number, self.text = claim, 0, ""

    def progress(self, stage: Stage = Stage.FETCHING) -> None:
        """Report a stage."""
        self._publish(ProgressBody(stage=stage, done=0, total=1))

    def say(self, *pieces: str) -> None:
        """Publish text, one delta per piece."""
        for piece in pieces:
            self._publish(DeltaBody(text=piece, offset=len(self.text), num_tokens=1))
            self.text += piece

    def finish(self) -> Result:
        """Complete the job with what was said."""
        claim = self.claim
        assert claim.task is not None
        result = Result(
            job_id=claim.job_id,
            task=claim.task,
            model=claim.model,
            text=self.text,
            finish_reason=FinishReason.STOP,
            usage=Usage(prompt_tokens=3, completion_tokens=self._number),
            timings=Timings(total_s=1.0),
            attempt=claim.attempt,
        )
        assert self.ledger.finish(claim.job_id, claim.fence, CompletedBody(result=result)) is Finished.DONE
        return result

    def fail(self, code: ErrorCode = ErrorCode.MEDIA_NOT_FOUND, message: str = "no such object: s3://media/a") -> None:
        """Fail the job."""
        body = FailedBody(error=ErrorInfo.of(code, message), partial_text=self.text)
        assert self.ledger.finish(self.claim.job_id, self.claim.fence, body) is Finished.DONE

    def give_back(self) -> None:
        """End the attempt; the job is queued again."""
        assert self.ledger.give_back(self.claim.job_id, self.claim.fence, RetryReason.GIVEN_BACK)

    def answer(self, job_id: str, *pieces: str) -> Result:
        """Do a whole job."""
        self.take(job_id)
        self.say(*pieces)
        return self.finish()

    def _publish(self, body: RunningBody) -> None:
        self._number += 1
        publication = Publication(self.claim.job_id, self.claim.fence, self._number, body)
        assert self.ledger.publish([publication]) == (True,)
