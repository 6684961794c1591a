"""The scheduler alone: every arrival is computed to its end, whatever comes, goes and runs out, and nothing leaks."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import BlockPool
from engine.messages import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduled, Scheduler
from engine.sequence import Sequence, State


def sequence(name: str, prompt: list[int], max_tokens: int) -> Sequence:
    request = Request(id=name, prompt_ids=prompt, params=SamplingParams(max_tokens=max_tokens))
    return Sequence(request, 0, max_tokens, frozenset())


def scheduler(blocks: int = 8, block_size: int = 4, seqs: int = 4, budget: int = 16) -> Scheduler:
    return Scheduler(BlockPool(blocks, block_size), seqs, budget, blocks * block_size)


def compute(target: Scheduler, step: list[Scheduled], token: int = 1) -> None:
    """Stand in for the engine: the step's rows are computed, and whoever is at its end gets a token or is finished."""
    for item in step:
        target.computed(item)
    for item in step:
        if item.seq.num_computed == len(item.seq.token_ids):
            item.seq.append(token)
            if item.seq.num_output == item.seq.max_tokens:
                target.finish(item.seq)


def counts(step: list[Scheduled]) -> dict[str, int]:
    return {item.seq.request_id: item.count for item in step}


def test_a_long_prompt_is_chunked_beside_decodes():
    s = scheduler(blocks=16, budget=6)
    s.add(sequence("a", [1], 9))
    compute(s, s.schedule())
    s.add(sequence("b", [2] * 14, 9))
    steps = []
    for _ in range(4):
        steps.append(s.schedule())
        compute(s, steps[-1])
    assert [counts(step) for step in steps] == [{"a": 1, "b": 5}, {"a": 1, "b": 5}, {"a": 1, "b": 4}, {"a": 1, "b": 1}]


def test_a_whole_prefix_hit_leaves_the_last_block_to_compute():
    s = scheduler()
    s.add(sequence("a", list(range(8)), 1))
    compute(s, s.schedule())
    s.add(sequence("b", list(range(8)), 1))  # both of its blocks are known, and the prompt ends with the second
    (item,) = s.schedule()
    assert (item.seq.num_computed, item.count, item.seq.num_cached) == (4, 4, 4)
    compute(s, [item])
    s.check()


def test_preemption_takes_the_latest_and_returns_it_first():
    s = scheduler(blocks=4, block_size=2)
    for name in "abc":
        s.add(sequence(name, [ord(name)] * 2, 5))
    s.add(sequence("d", [9], 1))
    compute(s, s.schedule())  # a, b, c and d have a block each, and all but d, now over, want another
    assert counts(s.schedule()) == {"a": 1, "b": 1}  # a takes d's, b takes c's
    assert [seq.request_id for seq in s.waiting] == ["c"]
    assert s.num_preemptions == 1
    s.check()


def test_what_a_preempted_sequence_gave_up_is_not_for_those_behind_it():
    s = scheduler(blocks=3, block_size=2)
    for name in "abc":
        s.add(sequence(name, [ord(name)] * 2, 5))
    compute(s, s.schedule())
    s.add(sequence("d", [9], 1))
    assert counts(s.schedule()) == {"a": 1}  # takes c's; b finds none and gives up its own, which d must not have
    assert [seq.request_id for seq in s.waiting] == ["b", "c", "d"]
    s.check()


def test_a_preempted_sequence_finds_its_own_prefix_again():
    s = scheduler(blocks=3, block_size=2)
    s.add(sequence("a", [1, 2], 2))
    s.add(sequence("b", [3, 4, 5], 3))
    compute(s, s.schedule())
    compute(s, s.schedule())  # a needs a second block: b's; then a is over
    assert s.num_preemptions == 1
    (item,) = s.schedule()
    assert (item.seq.request_id, item.seq.num_computed, item.count) == ("b", 2, 2)
    assert item.seq.num_cached == 0  # when it first came
    compute(s, [item])
    while s.has_work:
        compute(s, s.schedule())
    s.check()


def test_a_waiting_sequence_can_be_aborted():
    s = scheduler(blocks=2)
    first, second = sequence("a", [1] * 8, 1), sequence("b", [2] * 8, 1)
    s.add(first)
    s.add(second)
    assert counts(s.schedule()) == {"a": 8}
    s.finish(second)
    assert second.state is State.FINISHED
    s.finish(first)
    s.check()
    assert s.pool.num_free == 2


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, steps and aborts on tiny pools. Tokens are of an alphabet of two, so that prefixes recur."""

    @initialize(
        blocks=st.integers(1, 8), block_size=st.integers(1, 4), seqs=st.integers(1, 5), budget=st.integers(1, 9)
    )
    def start(self, blocks: int, block_size: int, seqs: int, budget: int) -> None:
        self.s = scheduler(blocks, block_size, seqs, budget)
        self.max_len = blocks * block_size
        self.arrived: list[Sequence] = []
        self.aborted: set[Sequence] = set()

    @precondition(lambda self: self.max_len > 1)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=self.max_len - 1))
        max_tokens = data.draw(st.integers(1, self.max_len - len(prompt)))
        self.arrived.append(sequence(str(len(self.arrived)), prompt, max_tokens))
        self.s.add(self.arrived[-1])

    @precondition(lambda self: any(seq.state is not State.FINISHED for seq in self.arrived))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from([seq for seq in self.arrived if seq.state is not State.FINISHED]))
        self.s.finish(seq)
        self.aborted.add(seq)

    @rule(token=st.integers(0, 1))
    def step(self, token: int) -> None:
        oldest = self.s.running[0] if self.s.running else None
        step = self.s.schedule()
        assert bool(step) == self.s.has_work
        assert len({item.seq for item in step}) == len(step) <= self.s.max_num_seqs
        assert sum(item.count for item in step) <= self.s.max_batched_tokens
        for item in step:
            assert item.seq.state is State.RUNNING
            assert 0 < item.count <= len(item.seq.token_ids) - item.seq.num_computed
            assert len(item.seq.blocks) * self.s.pool.block_size >= item.seq.num_computed + item.count
        if oldest is not None:
            assert step[0].seq is oldest  # never preempted, never passed over
        compute(self.s, step, token)

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "s"):
            self.s.check()
            in_order = [int(seq.request_id) for seq in [*self.s.running, *self.s.waiting]]
            assert in_order == sorted(in_order)

    def teardown(self) -> None:
        if not hasattr(self, "s"):
            return
        bound = sum(len(seq.token_ids) + seq.max_tokens for seq in self.arrived) * (len(self.arrived) + 1)
        for _ in range(bound + 1):
            if not self.s.has_work:
                break
            self.step(0)
            self.whole()
        assert not self.s.has_work
        assert self.s.pool.num_free == self.s.pool.num_blocks
        for seq in self.arrived:
            assert seq.state is State.FINISHED
            assert seq in self.aborted or seq.num_output == seq.max_tokens


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
