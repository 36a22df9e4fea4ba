"""Random histories over two engines that hand requests to each other.

Whatever happens, what an engine generates is the pure function of the tokens that the reference computes, no
block is lost or shared by mistake, and every accepted request ends exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from engine_fakes import VOCAB, CheckedEngine, FakeRunner, make_engine, reference
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from disagg.engine.engine import DEADLINE_EXCEEDED
from disagg.engine.scheduler import Reservation
from disagg.engine.sequence import SequenceStatus
from disagg.errors import InvalidRequestError, OverloadedError
from disagg.types import FinishReason, Request, SamplingParams, StepOutput

MAX_LEN = 48
MAX_WAITING = 6
# Prompts start with one of these, so that prefixes are shared, across block boundaries too.
PREFIXES = ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [1, 2, 3, 4, 5, 6, 7, 8, 3], [1, 2, 3, 4], [])


@dataclass(frozen=True, slots=True)
class Draft:
    """A request to be; `stops`: EOS and one more token end it, so that it tends to be short."""

    prefix: list[int]
    suffix: list[int]
    max_tokens: int | None
    min_tokens: int
    stops: bool
    salt: str
    priority: int
    hold: bool
    patience: int | None
    num_prior: int


# How much of what is asked for a pull brings.
SHARES = st.sampled_from([1.0, 1.0, 1.0, 0.7, 0.3, 0.0])
DRAFTS = st.builds(
    Draft,
    prefix=st.sampled_from(PREFIXES),
    suffix=st.lists(st.integers(1, VOCAB - 1), max_size=14),
    max_tokens=st.one_of(st.integers(1, 20), st.integers(12, 24), st.none()),
    min_tokens=st.integers(0, 3),
    stops=st.sampled_from([False, False, True]),
    salt=st.sampled_from(["", "", "", "tenant"]),
    priority=st.integers(-1, 1),
    hold=st.sampled_from([False, False, True]),
    patience=st.one_of(st.none(), st.none(), st.integers(0, 60)),
    num_prior=st.sampled_from([0, 0, 1, 4]),
)


@dataclass(slots=True)
class Story:
    """What one engine was asked, and what came of it."""

    request: Request
    hold: bool
    expected: list[int]
    reason: FinishReason
    tokens: list[int] = field(default_factory=list)
    held: bool = False
    outcome: str | None = None


class Node:
    """One engine, its runner, and everything that is known of it from outside."""

    def __init__(self, num_blocks: int, budget: int, max_num_seqs: int) -> None:
        engine, self.runner = make_engine(
            num_blocks=num_blocks,
            budget=budget,
            max_num_seqs=max_num_seqs,
            max_model_len=MAX_LEN,
            max_waiting=MAX_WAITING,
        )
        assert isinstance(engine, CheckedEngine)
        self.engine = engine
        self.budget = budget
        self.max_num_seqs = max_num_seqs
        self.live: dict[str, Story] = {}
        self.ended: list[Story] = []
        self.pulls: dict[str, Reservation] = {}
        self.listener: set[bytes] = set()

    def add(self, request: Request, *, now: float, hold: bool, remote_kv: int = 0) -> bool:
        try:
            self.engine.add(request, now=now, hold=hold, remote_kv=remote_kv)
        except InvalidRequestError as error:
            limit = self.engine.max_model_len
            full = len(request.token_ids) - request.num_prompt_tokens >= (request.params.max_tokens or limit)
            assert request.request_id in self.live or len(request.token_ids) >= limit or full, error
            return False
        except OverloadedError:
            # What is preempted waits beyond the limit.
            assert len(self.engine._scheduler.waiting) >= MAX_WAITING
            return False
        expected, reason = reference(request, max_model_len=self.engine.max_model_len)
        self.live[request.request_id] = Story(request, hold, expected, reason)
        return True

    def step(self, now: float) -> None:
        scheduler, runner = self.engine._scheduler, self.runner
        decodes = {seq: seq.num_preemptions for seq in scheduler.running if seq.num_uncomputed_tokens == 1}
        had_work, num_steps = self.engine.has_work(), len(runner.shapes)
        outputs = self.engine.step(now)
        ran = runner.shapes[num_steps:]
        if had_work:
            progressed = bool(ran or outputs) or scheduler.receiving or scheduler.num_preemptions
            assert progressed, "has_work promised what schedule did not do"
        for shape in ran:
            assert sum(count for _, count in shape) <= self.budget
            assert len(shape) <= self.max_num_seqs
            assert len({name for name, _ in shape}) == len(shape)
            in_step = {name for name, _ in shape}
            for seq, preemptions in decodes.items():
                late = seq.request.deadline is not None and seq.request.deadline <= now
                assert seq.request_id in in_step or seq.num_preemptions > preemptions or late
            counts = [count for _, count in shape]
            assert all(count == 1 for count in counts[: len(in_step & {s.request_id for s in decodes})])
        assert len(scheduler.running) + len(scheduler.receiving) <= self.max_num_seqs
        self.absorb(outputs, now)
        self.collect_reservations()

    def collect_reservations(self) -> None:
        for reservation in self.engine.take_reservations():
            name, first = reservation.request_id, reservation.num_cached_tokens // self.runner.block_size
            if not reservation.block_ids[first:]:
                continue  # all of it was cached: the request runs, or has ended already
            assert self.status(name) is SequenceStatus.RECEIVING
            assert name not in self.pulls
            self.pulls[name] = reservation

    def absorb(self, outputs: SequenceOf[StepOutput], now: float) -> None:
        for output in outputs:
            story = self.live[output.request_id]
            assert not story.held
            if output.token_ids and not story.tokens:
                assert output.queued_s is not None and output.queued_s >= 0
                assert output.prefill_s is not None and output.prefill_s >= 0
                assert output.num_cached_tokens <= story.request.num_prompt_tokens
            else:
                assert output.queued_s is None
            story.tokens += output.token_ids
            assert story.tokens == story.expected[: len(story.tokens)]
            story.held = output.held
            if output.finish_reason is FinishReason.ERROR:
                assert output.error in (DEADLINE_EXCEEDED, "OSError: device lost")
                deadline = story.request.deadline
                assert output.error != DEADLINE_EXCEEDED or (deadline is not None and deadline <= now)
                self.end(output.request_id, "error")
            elif output.finish_reason is not None:
                assert (story.tokens, output.finish_reason) == (story.expected, story.reason)
                self.end(output.request_id, "finished")
            elif output.held:
                assert story.hold
                assert len(story.tokens) == 1

    def end(self, request_id: str, outcome: str) -> None:
        story = self.live.pop(request_id)
        assert story.outcome is None
        story.outcome = outcome
        self.ended.append(story)

    def status(self, request_id: str) -> SequenceStatus:
        return self.engine._sequences[request_id].status

    def held(self) -> list[str]:
        return [name for name, story in self.live.items() if story.held]

    def check(self) -> None:
        self.engine.check_integrity()
        events = self.engine.block_events()
        assert set(events.removed) <= self.listener
        self.listener = (self.listener - set(events.removed)) | set(events.stored)
        assert self.listener == set(self.engine.cached_hashes())
        load = self.engine.load()
        assert load.num_running + load.num_waiting + load.num_held == len(self.live)
        sequences = self.engine._sequences.values()
        unfinished = [seq for seq in sequences if seq.status is not SequenceStatus.HELD]
        assert load.waiting_tokens == sum(
            seq.num_tokens - max(seq.num_computed_tokens, seq.remote_kv) for seq in unfinished
        )


class ClusterMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.num_requests = 0

    @initialize(
        blocks=st.tuples(st.integers(5, 16), st.integers(5, 16)),
        budget=st.sampled_from([1, 3, 6, 9, 16, 24]),
        max_num_seqs=st.sampled_from([1, 3, 4, 6]),
    )
    def start(self, blocks: tuple[int, int], budget: int, max_num_seqs: int) -> None:
        self.nodes = [Node(num_blocks, budget, max_num_seqs) for num_blocks in blocks]

    # -- requests ----------------------------------------------------------------------------------

    @rule(node=st.integers(0, 1), drafts=st.lists(DRAFTS, min_size=1, max_size=3))
    def add(self, node: int, drafts: list[Draft]) -> None:
        for draft in drafts:
            self.nodes[node].add(self.request(draft), now=self.now, hold=draft.hold)

    @rule(source=st.integers(0, 1), draft=DRAFTS, num_steps=st.integers(1, 3), share=SHARES)
    def prefill_and_hand_off(self, source: int, draft: Draft, num_steps: int, share: float) -> None:
        request = self.request(draft)
        if not self.nodes[source].add(request, now=self.now, hold=True):
            return
        self.step(source, 4)
        story = self.nodes[source].live.get(request.request_id)
        if story is not None and story.held:
            self.move(source, request.request_id, hold=False)
            self.step(1 - source, num_steps)
            if request.request_id in self.nodes[1 - source].pulls:
                self.end_pull(1 - source, request.request_id, share)

    def request(self, draft: Draft) -> Request:
        prompt = [*draft.prefix, *draft.suffix] or [1]
        params = SamplingParams(
            temperature=0.0,
            max_tokens=draft.max_tokens,
            min_tokens=draft.min_tokens
            if draft.max_tokens is None
            else min(draft.min_tokens, draft.max_tokens),
            ignore_eos=not draft.stops,
            stop_token_ids=(5,) if draft.stops else (),
        )
        deadline = None if draft.patience is None else self.now + draft.patience
        name = f"r{self.num_requests}"
        self.num_requests += 1
        request = Request(name, prompt, len(prompt), params, draft.priority, deadline, draft.salt)
        expected, _ = reference(request, max_model_len=MAX_LEN)
        # What another worker produced before it was lost; at least one token is still to come.
        prior = expected[: min(draft.num_prior, len(expected) - 1)]
        return replace(request, token_ids=prompt + prior)

    @precondition(lambda self: any(node.held() for node in self.nodes))
    @rule(data=st.data(), hold=st.booleans())
    def hand_off(self, data: st.DataObject, hold: bool) -> None:
        index, name = self.draw_request(data, [node.held() for node in self.nodes])
        self.move(index, name, hold=hold)

    def move(self, index: int, name: str, *, hold: bool) -> None:
        """Give the other engine a held request, as the orchestrator would."""
        source, target = self.nodes[index], self.nodes[1 - index]
        story = source.live[name]
        moved = replace(story.request, token_ids=[*story.request.token_ids, *story.tokens])
        remote_kv = source.engine.num_computed_tokens(name)
        assert len(source.engine.held_blocks(name)) == -(-remote_kv // source.runner.block_size)
        target.add(moved, now=self.now, hold=hold, remote_kv=remote_kv)

    def draw_request(self, data: st.DataObject, names: list[list[str]]) -> tuple[int, str]:
        pairs = [(index, name) for index, group in enumerate(names) for name in group]
        return data.draw(st.sampled_from(pairs))

    @precondition(lambda self: any(node.pulls for node in self.nodes))
    @rule(data=st.data(), share=SHARES)
    def deliver(self, data: st.DataObject, share: float) -> None:
        index, name = self.draw_request(data, [list(node.pulls) for node in self.nodes])
        self.end_pull(index, name, share)

    def end_pull(self, index: int, name: str, share: float) -> None:
        """Deliver KV: whole, in part, or, with the source gone, not at all."""
        target, source = self.nodes[index], self.nodes[1 - index]
        reservation = target.pulls.pop(name)
        local = reservation.num_cached_tokens
        last = local
        self.scribble(target.runner, reservation)
        story = source.live.get(name)
        same = story is not None and story.held and self.is_continued_by(story, target.live[name])
        if same:
            total = source.engine.num_computed_tokens(name)
            last = local + round((total - local) * share)
            theirs = source.engine.held_blocks(name)
            target.runner.copy_from(source.runner, theirs, reservation.block_ids, local, last)
        target.engine.activate(name, last, self.now)

    @staticmethod
    def is_continued_by(story: Story, other: Story) -> bool:
        return [*story.request.token_ids, *story.tokens] == list(other.request.token_ids)

    def scribble(self, runner: FakeRunner, reservation: Reservation) -> None:
        first = reservation.num_cached_tokens // runner.block_size
        runner.scribble(reservation.block_ids[first:])

    @precondition(lambda self: any(node.pulls for node in self.nodes))
    @rule(data=st.data())
    def pull_goes_on(self, data: st.DataObject) -> None:
        """A peer writes into reserved blocks at any time; nobody else may depend on them."""
        index, name = self.draw_request(data, [list(node.pulls) for node in self.nodes])
        self.scribble(self.nodes[index].runner, self.nodes[index].pulls[name])

    # -- ends --------------------------------------------------------------------------------------

    @precondition(lambda self: any(node.held() for node in self.nodes))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index, name = self.draw_request(data, [node.held() for node in self.nodes])
        assert self.nodes[index].engine.release(name)
        self.nodes[index].end(name, "released")

    @precondition(lambda self: any(node.live for node in self.nodes))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        index, name = self.draw_request(data, [list(node.live) for node in self.nodes])
        self.abort_one(self.nodes[index], name)

    @staticmethod
    def abort_one(node: Node, name: str) -> None:
        node.pulls.pop(name, None)
        assert node.engine.abort(name)
        assert not node.engine.abort(name)
        node.end(name, "aborted")

    # -- time --------------------------------------------------------------------------------------

    @rule(node=st.integers(0, 1), num_steps=st.integers(1, 12))
    def step(self, node: int, num_steps: int) -> None:
        for _ in range(num_steps):
            self.now += 1
            self.nodes[node].step(self.now)
            self.nodes[node].check()

    @rule(node=st.integers(0, 1), data=st.data())
    def abort_during_a_step(self, node: int, data: st.DataObject) -> None:
        target = self.nodes[node]
        batch = target.engine.schedule(self.now)
        sampled = target.runner.execute(batch)
        names = sorted(target.live)
        if names:
            self.abort_one(target, data.draw(st.sampled_from(names)))
        target.absorb(target.engine.update(batch, sampled, self.now), self.now)
        target.collect_reservations()

    @rule(node=st.integers(0, 1), mishap=st.sampled_from(["reset", "reset", "reset", "device"]))
    def mishap(self, node: int, mishap: str) -> None:
        if mishap == "reset":
            self.nodes[node].engine.reset_cache()
            return
        self.nodes[node].runner.fail_next = True
        self.now += 1
        self.nodes[node].step(self.now)
        self.nodes[node].runner.fail_next = False

    @invariant()
    def nothing_is_lost_or_shared(self) -> None:
        for node in getattr(self, "nodes", []):
            node.check()

    def teardown(self) -> None:
        """Let every pull fail and every lease end: then everything must come to its end, and soon."""
        for node in getattr(self, "nodes", []):
            for _ in range(400):
                for name in list(node.pulls):
                    self.scribble(node.runner, node.pulls[name])
                    node.engine.activate(name, node.pulls.pop(name).num_cached_tokens, self.now)
                for name in node.held():
                    assert node.engine.release(name)
                    node.end(name, "released")
                if not node.live:
                    break
                assert node.engine.has_work(), "requests wait, and nothing would ever wake them"
                self.now += 1
                node.step(self.now)
                node.check()
            assert not node.live, "a request did not end"
            load = node.engine.load()
            assert (load.kv_blocks_used, load.num_running, load.num_waiting, load.num_held) == (0, 0, 0, 0)
            assert all(story.outcome for story in node.ended)


TestClusterMachine = ClusterMachine.TestCase
TestClusterMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
