"""Any order of arrivals, admissions and ends keeps the batch whole and the queue fair."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from api_stub.contract.sampling import SamplingParams
from worker.engine.request import GenerationRequest, Request, RequestState
from worker.engine.scheduler import Scheduler, SchedulerLimits
from worker.models.inputs import ModelInputs

LIMITS = SchedulerLimits(max_num_seqs=4, max_prefill_tokens=20)


class SchedulerMachine(RuleBasedStateMachine):
    """A scheduler beside `rows`, which moves like the rows of a KV back end."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(LIMITS)
        self.queue: list[Request] = []
        self.rows: dict[int, Request] = {}
        self.num_made = 0

    @rule(num_tokens=st.integers(1, 30))
    def arrive(self, num_tokens: int) -> None:
        inputs = ModelInputs({"input_ids": torch.zeros(1, num_tokens, dtype=torch.long)})
        sampling = SamplingParams(max_new_tokens=1, seed=0)
        request = Request(GenerationRequest(str(self.num_made), inputs, sampling), submitted_at=0.0)
        self.num_made += 1
        self.scheduler.add(request)
        self.queue.append(request)

    @rule(is_prefilled=st.lists(st.booleans(), min_size=4, max_size=4))
    def admit(self, is_prefilled: list[bool]) -> None:
        num_before = self.scheduler.num_running
        admitted = self.scheduler.admit()
        assert admitted == self.queue[: len(admitted)]
        assert num_before + len(admitted) <= LIMITS.max_num_seqs
        sizes = [request.inputs.num_prompt_tokens for request in admitted]
        assert len(admitted) <= 1 or sum(sizes) <= LIMITS.max_prefill_tokens
        assert admitted or not self.queue or num_before == LIMITS.max_num_seqs
        del self.queue[: len(admitted)]
        for request, is_good in zip(admitted, is_prefilled, strict=False):
            if is_good:
                self.rows[self.scheduler.num_running] = request
                self.scheduler.start(request)
            else:
                self.scheduler.end(request, self.release)

    @precondition(lambda self: self.queue or self.rows)
    @rule(choice=st.randoms(use_true_random=False))
    def end(self, choice: object) -> None:
        request = choice.choice([*self.queue, *self.rows.values()])  # type: ignore[attr-defined]
        assert self.scheduler.find(request.request_id) is request
        self.scheduler.end(request, self.release)
        if request in self.queue:
            self.queue.remove(request)
        assert request.state is RequestState.ENDED
        assert self.scheduler.find(request.request_id) is None

    def release(self, request: Request, last: Request) -> None:
        self.rows[request.row] = self.rows[last.row]
        del self.rows[last.row]

    @invariant()
    def rows_have_no_gaps_and_agree(self) -> None:
        assert dict(enumerate(self.scheduler.running)) == self.rows
        assert all(request.row == row for row, request in self.rows.items())
        assert all(request.state is RequestState.RUNNING for request in self.rows.values())

    @invariant()
    def counts_agree(self) -> None:
        assert self.scheduler.num_waiting == len(self.queue)
        assert self.scheduler.everything() == [*self.scheduler.running, *self.queue]
        assert self.scheduler.is_idle == (not self.queue and not self.rows)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
