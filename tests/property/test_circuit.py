"""Whatever jobs meet in whatever order, the circuit breaker of a worker keeps to its rules."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.errors import Component
from worker.jobs.circuit import FIRST_PAUSE_S, MAX_FAULTS, MAX_PAUSE_S, Circuit, CircuitState

COMPONENTS = st.sampled_from([Component.STORAGE, Component.ENGINE])
JOBS = st.integers(0, 2 * MAX_FAULTS).map("job-{}".format)


class Breaker(RuleBasedStateMachine):
    """Compares a circuit with the rules: who is faulty since when, and until when to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.works = True
        self.told: dict[Component, bool] = {}
        self.proved: list[Component] = []
        self.circuit = Circuit(self._proves, self._tell, lambda: self.now)
        self.faulty: dict[Component, set[str]] = {component: set() for component in Component}
        self.sick_of: Component | None = None
        self.pause_s = FIRST_PAUSE_S
        self.try_at = 0.0
        self.trying = ""

    def _proves(self, component: Component) -> bool:
        assert not self.circuit.may_consume, "nothing is claimed while the worker is suspect"
        assert not self.circuit.begin("another")
        assert self.circuit.fault(component, "another", "no"), "its fault costs no job"
        self.proved.append(component)
        if not self.works:
            raise OSError
        return True

    def _tell(self, component: Component, is_sick: bool) -> None:
        self.told[component] = is_sick

    @rule(seconds=st.floats(0.1, MAX_PAUSE_S))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(works=st.booleans())
    def mend_or_break(self, works: bool) -> None:
        self.works = works

    @rule(component=COMPONENTS, job_id=JOBS, is_proven=st.booleans())
    def fault(self, component: Component, job_id: str, is_proven: bool) -> None:
        num_proofs = len(self.proved)
        is_blamed = self.circuit.fault(component, job_id, "no", is_proven=is_proven)
        if self.sick_of is not None:
            may_recover = self.trying and self.sick_of is component and not is_proven
            assert len(self.proved) - num_proofs == bool(may_recover)
            assert is_blamed == (not may_recover or not self.works)
            if not is_blamed:
                self.faulty[component].clear()
                self.sick_of, self.trying = None, ""
            elif self.trying:
                self.pause_s = min(MAX_PAUSE_S, 2 * self.pause_s)
                self.sick_of, self.trying, self.try_at = component, "", self.now + self.pause_s
            return
        self.faulty[component].add(job_id)
        is_suspect = is_proven or len(self.faulty[component]) == MAX_FAULTS
        assert len(self.proved) - num_proofs == (is_suspect and not is_proven)
        assert is_blamed == (is_suspect and (is_proven or not self.works))
        if is_blamed:
            self.sick_of, self.pause_s, self.try_at = component, FIRST_PAUSE_S, self.now + FIRST_PAUSE_S
        elif is_suspect:
            self.faulty[component].clear()

    @rule(component=COMPONENTS, count=st.integers(2, MAX_FAULTS))
    def faults_in_a_row(self, component: Component, count: int) -> None:
        for number in range(count):
            self.fault(component, f"job-{number}", False)

    @rule(component=COMPONENTS)
    def success(self, component: Component) -> None:
        self.circuit.success(component)
        self.faulty[component].clear()
        if self.sick_of is component:
            self.sick_of, self.trying = None, ""

    @rule(job_id=JOBS)
    def begin(self, job_id: str) -> None:
        may_try = self.sick_of is not None and not self.trying and self.now >= self.try_at
        assert self.circuit.begin(job_id) == (self.sick_of is None or may_try)
        if may_try:
            self.trying = job_id

    @precondition(lambda self: self.trying)
    @rule()
    def end_without_evidence(self) -> None:
        self.circuit.end("no job that tries")
        assert self.circuit.state is CircuitState.TRYING
        self.circuit.end(self.trying)
        self.trying, self.try_at = "", self.now

    @invariant()
    def it_says_what_is(self) -> None:
        assert self.circuit.reason == (f"{self.sick_of}: no" if self.sick_of else "")
        assert [component for component, is_sick in self.told.items() if is_sick] == (
            [self.sick_of] if self.sick_of else []
        )
        is_due = not self.trying and self.now >= self.try_at
        assert self.circuit.may_consume == (self.sick_of is None or is_due)


TestBreaker = Breaker.TestCase
TestBreaker.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_five_different_jobs_in_a_row_make_a_worker_sick_that_can_prove_nothing() -> None:
    circuit = Circuit(lambda component: False)
    blamed = [circuit.fault(Component.DISK, str(number), "it is full") for number in range(MAX_FAULTS)]
    assert blamed == [False] * (MAX_FAULTS - 1) + [True]
    assert circuit.reason == "disk: it is full"
    assert not circuit.may_consume


def test_a_job_that_fails_by_itself_keeps_no_worker_sick_that_works_again() -> None:
    now, works = 0.0, False
    circuit = Circuit(lambda component: works, clock=lambda: now)
    for number in range(MAX_FAULTS):
        circuit.fault(Component.STORAGE, str(number), "it is away")
    now, works = MAX_PAUSE_S, True
    assert circuit.begin("bad")
    assert not circuit.fault(Component.STORAGE, "bad", "it answers 500 for this object"), "the job pays"
    circuit.end("bad")
    assert (circuit.may_consume, circuit.reason) == (True, "")


def test_one_job_that_fails_again_and_again_is_no_reason_to_suspect_the_worker() -> None:
    circuit = Circuit(lambda component: False)
    assert [circuit.fault(Component.ENGINE, "same", "no") for _ in range(20)] == [False] * 20
    assert circuit.may_consume


def test_a_success_while_the_worker_is_suspect_clears_it() -> None:
    circuit = Circuit(lambda component: bool(circuit.success(component)))
    assert [circuit.fault(Component.ENGINE, str(number), "no") for number in range(20)] == [False] * 20
    assert circuit.state is CircuitState.CLOSED
