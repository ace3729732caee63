"""Any order of arrivals, steps and ends keeps the queue fair, the budget kept and every block accounted for."""

from __future__ import annotations

from random import Random

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from api_stub.contract.sampling import SamplingParams
from worker.engine.config import SchedulerLimits
from worker.engine.kv_cache.blocks import NULL_BLOCK, BlockPool, BlockTables
from worker.engine.request import GenerationRequest, Request, RequestState
from worker.engine.scheduler import Scheduler
from worker.models.inputs import ModelInputs

LIMITS = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=9)
BLOCK_SIZE = 4
NUM_BLOCKS = 12
MAX_TOKENS = (NUM_BLOCKS - 1) * BLOCK_SIZE


class Space:
    """Real block tables without tensors or model: what a paged runner does with them."""

    def __init__(self) -> None:
        self.pool = BlockPool(NUM_BLOCKS)
        self.tables = BlockTables(self.pool, BLOCK_SIZE, LIMITS.max_num_seqs, MAX_TOKENS)

    def can_allocate(self, num_tokens: int, num_running: int) -> bool:
        return self.tables.num_blocks(num_tokens) + num_running <= self.tables.num_free_blocks

    def allocate(self, request: Request, *, is_chunkable: bool) -> None:
        num_tokens = request.inputs.num_prompt_tokens + len(request.output_ids)
        opened = self.tables.allocate(num_tokens, self.keys(request)[: (num_tokens - 1) // BLOCK_SIZE])
        assert opened is not None
        request.row, request.num_cached_tokens = opened
        request.num_prompt_cached = request.inputs.num_prompt_tokens
        request.is_chunkable = is_chunkable

    def keys(self, request: Request) -> list[bytes]:
        """Prompts of the same first token are alike as far as both go."""
        first = int(request.prompt_ids[0])
        return [bytes([first, number]) for number in range(request.inputs.num_prompt_tokens // BLOCK_SIZE)]

    def append(self, request: Request) -> bool:
        return self.tables.append(request.row, request.num_tokens)

    def free(self, request: Request) -> None:
        if request.row >= 0:
            self.tables.free(request.row)
            request.row = -1


class SchedulerMachine(RuleBasedStateMachine):
    """A scheduler driven as the core drives it, beside the order of arrivals."""

    @initialize(can_chunk=st.booleans())
    def begin(self, can_chunk: bool) -> None:
        self.can_chunk = can_chunk
        self.space = Space()
        self.scheduler = Scheduler(LIMITS, self.space)
        self.alive: list[Request] = []
        self.num_made = 0

    @rule(num_tokens=st.integers(1, 24), kind=st.integers(0, 2))
    def arrive(self, num_tokens: int, kind: int) -> None:
        inputs = ModelInputs({"input_ids": torch.full((1, num_tokens), kind)})
        sampling = SamplingParams(max_new_tokens=MAX_TOKENS - num_tokens, seed=0)
        request = Request(GenerationRequest(str(self.num_made), inputs, sampling), submitted_at=0.0)
        self.num_made += 1
        self.scheduler.add(request)
        self.alive.append(request)

    @rule(fails=st.sampled_from([False, False, False, True]))
    def step(self, fails: bool) -> None:
        while (request := self.scheduler.next_to_start()) is not None:
            assert request is next(each for each in self.alive if each.state is RequestState.WAITING)
            if fails:
                self.end(request)
                continue
            self.space.allocate(request, is_chunkable=self.can_chunk)
            self.scheduler.start(request)
        oldest = self.alive[0] if self.alive else None
        chunks = self.scheduler.schedule()
        self.check_budget([chunk.num_tokens for chunk in chunks])
        assert bool(chunks) == bool(self.alive)
        # Whoever is oldest moves in every step, so everybody ends one day.
        assert oldest is None or oldest in [chunk.request for chunk in chunks]
        for chunk in chunks:
            chunk.request.num_cached_tokens += chunk.num_tokens
            assert chunk.request.num_unread >= 0
            self.space.tables.register_hash(
                chunk.request.row, self.space.keys(chunk.request), chunk.request.num_cached_tokens
            )
            if chunk.request.num_unread == 0:
                chunk.request.output_ids.append(1)
                if len(chunk.request.output_ids) == chunk.request.max_new_tokens:
                    self.end(chunk.request)

    def check_budget(self, sizes: list[int]) -> None:
        num_prompts = sum(size > 1 for size in sizes)
        assert sum(sizes) <= LIMITS.max_num_batched_tokens or (not self.can_chunk and num_prompts == 1)

    @precondition(lambda self: self.alive)
    @rule(chance=st.randoms(use_true_random=False))
    def cancel(self, chance: Random) -> None:
        self.end(chance.choice(self.alive))

    @precondition(lambda self: len(self.scheduler.running) > 1)
    @rule(chance=st.randoms(use_true_random=False))
    def run_out_of_memory(self, chance: Random) -> None:
        stream = chance.choice(self.scheduler.running[1:])
        older = self.scheduler.running[: self.scheduler.running.index(stream)]
        self.scheduler.send_back(stream)
        assert self.scheduler.running == older
        assert self.scheduler.next_to_start() is None, "nobody starts before one of the others has ended"

    def end(self, request: Request) -> None:
        assert self.scheduler.find(request.request_id) is request
        self.scheduler.end(request)
        self.alive.remove(request)
        assert request.state is RequestState.ENDED
        assert self.scheduler.find(request.request_id) is None

    @invariant()
    def every_streaming_request_was_served_in_order(self) -> None:
        running = self.scheduler.running
        assert len(running) <= LIMITS.max_num_seqs
        assert all(request.state is RequestState.RUNNING for request in running)
        # The running are the oldest: nobody overtakes.
        assert self.alive[: len(running)] == running
        assert self.scheduler.everything() == self.alive
        assert (self.scheduler.num_waiting, self.scheduler.num_running) == (
            len(self.alive) - len(running),
            len(running),
        )
        assert self.scheduler.is_idle == (not self.alive)

    @invariant()
    def a_request_that_waits_holds_nothing(self) -> None:
        waiting = [request for request in self.alive if request.state is RequestState.WAITING]
        assert all((request.row, request.num_cached_tokens) == (-1, 0) for request in waiting)

    @invariant()
    def every_block_is_free_or_owned_and_shared_by_equal_prefixes_only(self) -> None:
        tables = self.space.tables
        running = self.scheduler.running
        assert len({request.row for request in running}) == len(running)
        owners: dict[int, set[tuple[int, int]]] = {}
        for request in running:
            held = [block for block in tables.table[request.row].tolist() if block != NULL_BLOCK]
            assert len(set(held)) == len(held)
            assert len(held) * BLOCK_SIZE >= max(request.num_cached_tokens, request.num_prompt_cached)
            for place, block in enumerate(held):
                owners.setdefault(block, set()).add((int(request.prompt_ids[0]), place))
        assert all(len(prefixes) == 1 for prefixes in owners.values())
        assert len(owners) + self.space.pool.num_free == NUM_BLOCKS - 1


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
