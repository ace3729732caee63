"""The ledger for threads: each method is one atomic step on Redis, decided by Redis' clock.

Safe to share between threads. redis-py's errors come out unchanged (redis.RedisError); every method may be called
again after one, with the same arguments and without a double effect.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar, cast

import redis

from api_stub.contract import names
from api_stub.contract.event import FinalBody, RetryReason
from api_stub.contract.job import Job, TaskName
from api_stub.contract.serving import Serving, read_all_serving
from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobSelection, JobView
from api_stub.contract.wish import Wish, read_wish
from api_stub.ledger import calls, operations, pools, views
from api_stub.ledger.calls import Call
from api_stub.ledger.lua import Transition, script
from api_stub.ledger.rows import (
    Bell,
    Cancelled,
    CancelledJobs,
    Claim,
    Deleted,
    Finished,
    Hold,
    Publication,
    QueueChange,
    Refusal,
    Submission,
)
from api_stub.ledger.settings import LedgerConfig
from api_stub.ledger.views import JobPage, Replay

T = TypeVar("T")

#: One per thread that calls at the same moment; redis-py refuses beyond its own default of 100.
MAX_CONNECTIONS: Final = 4096
#: Batches that one `reap` works through before it lets go of the thread.
MAX_BATCHES: Final = 50


class Ledger:
    """The truth about every job.

    The client must decode replies and should have socket timeouts; `connect` sees to both.
    """

    def __init__(self, client: redis.Redis, config: LedgerConfig) -> None:
        if not client.connection_pool.connection_kwargs.get("decode_responses"):
            raise ValueError("the ledger needs a client with decode_responses=True")
        self.client = client
        self.config = config
        self._scripts = {step: client.register_script(script(step, config)) for step in Transition}

    @classmethod
    def connect(cls, url: str, config: LedgerConfig, *, timeout_s: float = 5.0) -> Ledger:
        """Make a ledger with its own connections, opened on first use.

        A silent Redis costs about `timeout_s` per call, then redis.TimeoutError.
        """
        client = pools.client(url, timeout_s=timeout_s, max_connections=MAX_CONNECTIONS)
        return cls(client, config)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def submit(self, job_id: str, job: Job) -> Submission:
        """Write a new job and its doorbell, or hold it until it is its tenant's turn.

        The same id and body again is the same job.

        Raises JobConflict for another body, LedgerFull above `max_queued`.
        """
        return self._run(calls.submit(job_id, job))

    def adopt(
        self, job_id: str, *, task: TaskName, model: str, job: Job | None, priority: int, links: str = ""
    ) -> Submission:
        """Write the job of a plain Celery message at its delivery; claim it next. The deadline counts from here.

        `job` is None when the body is invalid: the claim then has an empty body and the worker fails it. `links` is
        kept for `LinkedJobs`. Raises JobConflict when the id belongs to another body.
        """
        return self._run(calls.adopt(job_id, task=task, model=model, job=job, priority=priority, links=links))

    def claim(
        self,
        job_id: str,
        worker: str,
        token: str | None = None,
        checkpoint: str = "",
        adapters: Mapping[str, str] | None = None,
    ) -> Claim | Refusal:
        """Take a queued job for one lease: a new attempt with a new fence. Expired jobs end here instead.

        To repeat the call after a redis error pass a `token`, unique per delivery of a doorbell: without one, a claim
        whose reply was lost looks like another worker's and costs the job a lease. `checkpoint`: digest of the weights
        that will answer; `adapters`: of the adapters, by name.
        """
        return self._run(calls.claim(job_id, worker, token or uuid.uuid4().hex, checkpoint, adapters))

    def beat(self, worker: str, model: str, held: Sequence[tuple[str, int]], serves: str = "") -> tuple[Hold, ...]:
        """Extend the leases of all held (job id, fence) pairs and keep the worker listed; one answer per pair."""
        return self._run(calls.beat(worker, model, held, serves))

    def loading(self, model: str) -> None:
        """Make the name of a model known that a worker is about to load."""
        self._run(calls.loading(model))

    def known(self, asked: str = "") -> frozenset[str]:
        """Read the names of the models that workers serve or load, or did in the last day.

        A worker of 0.1.0 makes its model known when jobs come for it, or when the name is `asked` for.
        """
        return self._run(calls.known(asked))

    def leave(self, worker: str, model: str) -> None:
        """Stop being listed as a worker of `model`."""
        self._run(calls.leave(worker, model))

    def publish(self, publications: Sequence[Publication]) -> tuple[bool, ...]:
        """Write events to stream and channel, in order, in one round trip; False: not this fence's job any more."""
        return self._run(calls.publish(publications)) if publications else ()

    def finish(self, job_id: str, fence: int, body: FinalBody) -> Finished:
        """End a held job, once: row, Celery result (and its channel) and final event in one step."""
        return self._run(calls.finish(job_id, fence, body))

    def give_back(
        self, job_id: str, fence: int, reason: RetryReason, delay_s: float = 0.0, is_charged: bool = False
    ) -> bool:
        """Queue a held job again; a reaper rings for it after `delay_s`. No loss is charged; a retry is, if asked for.

        A job that was asked to stop becomes final (cancelled) instead. False: not this fence's job any more.
        """
        return self._run(calls.give_back(job_id, fence, reason, delay_s, is_charged))

    def keep(self, job_id: str, fence: int, step: int) -> bool:
        """Note that a held job has a checkpoint from which training goes on at `step`.

        Workers that were lost before count no more, and the loss of this one will not: `max_attempts` is the limit of
        losses without a new checkpoint. Of the stream's training progress the newest events are left. False: not this
        fence's job any more.
        """
        return self._run(calls.keep(job_id, fence, step))

    def cancel(self, job_id: str) -> Cancelled:
        """End a queued job at once; flag a running one and tell its worker on the cancel channel."""
        return self._run(calls.cancel(job_id))

    def retry(self, job_id: str) -> str | None:
        """Queue a new job with the body of a finished one and return its id; asked twice, the same new job.

        The ledger rings for it. None: no such job. Raises CannotRetry (not finished, or never a valid job), LedgerFull.
        """
        return self._run(calls.retry(job_id, str(uuid.uuid4())))

    def dead(self, limit: int = 100) -> tuple[JobView, ...]:
        """Read the jobs that were given up because their workers kept dying, newest first."""
        return self._run(views.dead(limit))

    def drop(self, job_id: str) -> bool:
        """Take a job off the dead list; False: it is not on it. The job itself stays."""
        return self._run(calls.drop(job_id))

    def ring_again(self, job_ids: Sequence[str]) -> int:
        """Ring at once for those of the jobs that still wait: whoever took their doorbells will not answer them.

        Returns for how many. Without this call a sweep finds them after a grace. Repeated, it rings twice, in vain.
        """
        return self._run(calls.ring_again(job_ids)) if job_ids else 0

    def pause(self, model: str) -> QueueChange:
        """Let nobody claim a model's jobs until `resume`. Submits are taken, running jobs end, deadlines count."""
        return self._run(operations.pause(model))

    def resume(self, model: str) -> QueueChange:
        """Let a model's jobs be claimed again, in their order."""
        return self._run(operations.resume(model))

    def purge(self, model: str) -> int:
        """End all queued jobs of a model as cancelled, in many short steps; return how many.

        Jobs that are submitted meanwhile stay, and jobs that run.
        """
        step = self._run(operations.purge(model, None))
        num_ended = step.num_ended
        while step.cursor is not None:
            step = self._run(operations.purge(model, step))
            num_ended += step.num_ended
        return num_ended

    def cancel_jobs(self, tenant: str, wanted: JobSelection) -> CancelledJobs:
        """Cancel those of a tenant's jobs that are wanted, in many short steps, newest first.

        Looks at the jobs that `list_jobs` knows; jobs that are submitted meanwhile stay.
        """
        step = self._run(operations.cancel_jobs(tenant, wanted, None))
        done = step.done
        while step.cursor is not None:
            step = self._run(operations.cancel_jobs(tenant, wanted, step))
            done += step.done
        return done

    def wish(self, model: str) -> Wish:
        """Read what operators want a model's workers to serve."""
        return read_wish(cast("str | None", self.client.get(names.wanted_key(model))))

    def change_wish(self, model: str, change: Callable[[Wish], Wish]) -> Wish:
        """Change what is wanted; `change` is called again when somebody else was faster. Raises what it raises."""
        while True:
            former = cast("str | None", self.client.get(names.wanted_key(model))) or ""
            wanted = change(read_wish(former))
            if self._run(operations.wish(model, former, wanted.to_json())):
                return wanted

    def is_changing(self, model: str) -> bool:
        """Tell whether a worker of a model changes what it serves at the moment, or begins anew to do so."""
        return bool(self.client.exists(names.turn_of_change_key(model)))

    def serving(self, model: str) -> dict[str, Serving]:
        """Return what each worker of a model serves, by the worker's name; those of 0.1.0 do not tell."""
        told = cast("dict[str, str]", self.client.hgetall(names.serves_key(model)))
        return read_all_serving(told)

    def delete(self, job_id: str) -> Deleted:
        """Remove row, events and result of a final job, and the delivery of its end to a webhook."""
        return self._run(operations.delete(job_id))

    def reap(self, pause_s: float = 0.0) -> tuple[Bell, ...]:
        """Take jobs from lost workers, end those out of time or attempts, ring again for those whose doorbell was lost.

        Returns the doorbells that were rung. Does nothing when a sweep that passed a pause is younger than `pause_s`.
        """
        bells: list[Bell] = []
        for number in range(MAX_BATCHES):
            sweep = self._run(calls.reap(0.0 if number else pause_s))
            bells.extend(sweep.bells)
            if sweep.is_complete:
                break
        return tuple(bells)

    def view(self, job_id: str) -> JobView | None:
        """Read a job; None when it is unknown."""
        return self._run(views.view(job_id))

    def list_jobs(
        self,
        tenant: str = "",
        status: JobStatus | None = None,
        model: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> JobPage:
        """Read a tenant's jobs, newest first; `cursor` is the `next_cursor` of the page before.

        Raises ValueError for a cursor that no page gave.
        """
        return self._run(views.list_jobs(tenant, status, model, cursor, limit))

    def replay(self, job_id: str, after: int | None = 0, limit: int | None = None) -> Replay:
        """Read a job's events after seq `after` and its ending in one step; None: only the ending.

        `limit`: about how many events at most.
        """
        return self._run(views.replay(job_id, after, limit))

    def _run(self, call: Call[T]) -> T:
        return call.parse(self._scripts[call.transition](args=call.args))
