"""Random histories of hand-offs on virtual time, over the real leases, service and puller."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from disagg.errors import KVLostError
from disagg.types import KVHandle
from tests.unit.transfer.virtual_hand_off import (
    LEASE_S,
    NUM_BLOCKS,
    Computing,
    Owner,
    Puller,
    Stamps,
    Wire,
    write,
)
from tests.virtual_loop import VirtualLoop

ADDRESS = "prefill:1"
# Of what happened over all histories; a test reads and clears it.
COUNTS: Counter[str] = Counter()


@dataclass
class Running:
    """A pull that runs: its rows belong to it until it has ended."""

    handle: KVHandle
    first_block: int
    rows: list[int]
    puller: Puller
    task: asyncio.Task[Any]
    seen: bool = False


class HandOffs(RuleBasedStateMachine):
    """One prefill worker, whose address stays when it is replaced, and two decode workers."""

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        COUNTS["histories"] += 1
        self.rng = random.Random(seed)
        self.loop = VirtualLoop()
        self.wire, self.stamps = Wire(self.rng), Stamps()
        self.known: dict[str, tuple[str, str]] = {}
        self.owners: list[Owner] = []
        self.requests: list[tuple[Owner, Computing]] = []
        self.pulls: list[Running] = []
        self.free_rows: dict[int, dict[int, bytes]] = {}
        self.loop.run_until_complete(self._set_up())

    async def _set_up(self) -> None:
        await self._start_owner()
        self.pullers = [self._puller(name) for name in ("d0", "d1")]

    def _puller(self, name: str) -> Puller:
        puller = Puller(name, self.wire, self.known)
        self.free_rows[id(puller)] = {}
        for row in range(NUM_BLOCKS):
            self._give_back(puller, row)
        puller.free.clear()
        puller.free.extend(range(NUM_BLOCKS))
        return puller

    def _give_back(self, puller: Puller, row: int) -> None:
        """Somebody else has this row from now on, and writes into it."""
        stamp = self.stamps.next()
        write(puller.segment.blocks, row, stamp)
        self.free_rows[id(puller)][row] = stamp

    async def _start_owner(self) -> None:
        self.owner = Owner("p", str(len(self.owners)), self.stamps, self.loop.time)
        self.owners.append(self.owner)
        self.wire.at[ADDRESS] = self.owner
        self.known["p"] = (ADDRESS, self.owner.incarnation)

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        for end, count in Counter(
            e for o in self.owners for ends in o.table.ends.values() for e in ends
        ).items():
            COUNTS[f"leases {end}"] += count
        COUNTS.update({f"messages {name}": count for name, count in self.wire.told.items()})
        self.loop.run_until_complete(self._tear_down())
        self.loop.close()

    async def _tear_down(self) -> None:
        for pull in self.pulls:
            pull.task.cancel()
        await asyncio.gather(*(pull.task for pull in self.pulls), return_exceptions=True)
        for puller in self.pullers:
            await puller.client.close()
            puller.segment.close()
        for owner in self.owners:
            if owner.service._timer is not None:
                owner.service._timer.cancel()
            owner.segment.close()

    def _pick(self) -> tuple[Owner, Computing]:
        """Return a request, mostly one of those that live."""
        live = [
            each
            for each in self.requests
            if each[0] is self.owner and each[1] in self.owner.requests.values()
        ]
        return self.rng.choice(live if live and self.rng.random() < 0.9 else self.requests[-4:])

    # -- the owner -----------------------------------------------------------------------------------

    @rule(blocks=st.integers(1, 6), whole=st.booleans())
    def publish(self, blocks: int, whole: bool) -> None:
        name = f"r{self.rng.randrange(4)}"
        if name in self.owner.requests or len(self.owner.free) < blocks:
            return
        request = self._on_loop(self.owner.begin, name, self.rng.randbytes(16), blocks)
        self.requests.append((self.owner, request))
        if whole:
            self._on_loop(self.owner.compute, request, blocks)

    def _on_loop(self, function: Any, *args: Any) -> Any:
        async def call() -> Any:
            return function(*args)

        return self.loop.run_until_complete(call())

    @precondition(lambda self: self.requests)
    @rule(count=st.integers(1, 3))
    def compute(self, count: int) -> None:
        owner, request = self._pick()
        self._on_loop(owner.compute, request, count)
        self.loop.run_for(self.rng.choice([0.0, 0.01, 0.1, 1.0]))

    @precondition(lambda self: self.requests)
    @rule()
    def preempt(self) -> None:
        owner, request = self._pick()
        COUNTS["preemptions"] += not request.complete
        self._on_loop(owner.preempt, request)

    @precondition(lambda self: self.requests)
    @rule()
    def drop(self) -> None:
        owner, request = self._pick()
        if owner.requests.get(request.handle.request_id) is request and self.rng.random() < 0.3:
            self._on_loop(owner.service.drop, request.handle.request_id)

    @rule(noticed=st.booleans())
    def restart_owner(self, noticed: bool) -> None:
        """It dies; another incarnation has its address at once, which the cluster may hear of later."""
        if self.rng.random() < 0.9:
            return  # or nothing would ever be pulled
        COUNTS["restarts"] += 1
        told = self.known["p"]
        self.loop.run_until_complete(self._start_owner())
        if not noticed:
            heard = self.known["p"]
            self.known["p"] = told
            self.loop.call_later(0.05, self.known.__setitem__, "p", heard)

    # -- pullers -------------------------------------------------------------------------------------

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 1), part=st.booleans())
    def pull(self, which: int, part: bool) -> None:
        """Pull all, or what is after a prefix that is here; maybe what another pulls too."""
        puller, (_, request) = self.pullers[which], self._pick()
        first = self.rng.randrange(request.num_blocks) if part else 0
        count = request.num_blocks - first
        if count > len(puller.free):
            return
        rows = [puller.free.pop(0) for _ in range(count)]
        for row in rows:
            del self.free_rows[id(puller)][row]
        COUNTS["pulls"] += 1

        async def begin() -> asyncio.Task[Any]:
            return asyncio.ensure_future(puller.client.pull(request.handle, first, rows))

        task = self.loop.run_until_complete(begin())
        self.loop.run_for(self.rng.choice([0.0, 0.01, 0.1, 0.5]))
        self.pulls.append(Running(request.handle, first, rows, puller, task))

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 1), leave=st.booleans())
    def keep(self, which: int, leave: bool) -> None:
        client, handle = self.pullers[which].client, self._pick()[1].handle
        self._on_loop(client.leave if leave else client.keep_alive, handle)

    @precondition(lambda self: any(not pull.seen for pull in self.pulls))
    @rule()
    def cancel(self) -> None:
        pull = self.rng.choice([pull for pull in self.pulls if not pull.seen])
        COUNTS["cancellations"] += not pull.task.done()
        pull.task.cancel()
        self.loop.run_for(0)

    @rule(which=st.integers(0, 1))
    def restart_puller(self, which: int) -> None:
        """All that it did ends without a word, its heartbeats among it."""
        if self.rng.random() < 0.15:
            self._restart_puller(which)

    def _restart_puller(self, which: int) -> None:
        dead = self.pullers[which]
        COUNTS["restarts"] += 1

        async def die() -> None:
            mine = [pull for pull in self.pulls if pull.puller is dead]
            for pull in mine:
                pull.task.cancel()
            await asyncio.gather(*(pull.task for pull in mine), return_exceptions=True)
            self._see(mine)
            await dead.client.close()
            self.pullers[which] = self._puller(f"d{which}")

        self.loop.run_until_complete(die())
        dead.segment.close()

    # -- the wire and the clock ------------------------------------------------------------------------

    @rule(loss=st.sampled_from([0.0, 0.0, 0.1, 0.5]), renewals_lost=st.booleans())
    def weather(self, loss: float, renewals_lost: bool) -> None:
        self.wire.loss, self.wire.renewals_lost = loss, renewals_lost
        self.loop.run_for(self.rng.choice([0.0, 0.1]))

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.01, 0.1, 1.0, LEASE_S / 2, LEASE_S]))
    def wait(self, seconds: float) -> None:
        self.loop.run_for(seconds)

    @rule()
    def silence(self) -> None:
        """Everybody who renews falls silent: within one lease all that was complete is given back."""
        if self.rng.random() < 0.85:
            return
        for which in (0, 1):
            self._restart_puller(which)
        # Messages that are on their way arrive; then nothing is heard.
        self.loop.run_for(4.2)
        self.loop.run_for(LEASE_S + 0.001)
        owner = self.owner
        assert all(not request.complete for request in owner.requests.values())
        for request in list(owner.requests.values()):
            self._on_loop(owner.service.drop, request.handle.request_id)
        assert len(owner.free) == NUM_BLOCKS and not owner.requests
        COUNTS["silences"] += 1

    # -- what always holds -----------------------------------------------------------------------------

    def _see(self, pulls: list[Running]) -> None:
        for pull in pulls:
            if not pull.task.done() or pull.seen:
                continue
            pull.seen = True
            self._judge(pull)
            for row in pull.rows:
                self._give_back(pull.puller, row)
            pull.puller.free.extend(pull.rows)

    def _judge(self, pull: Running) -> None:
        """A pull ends with the right bytes or with a typed error."""
        if pull.task.cancelled():
            COUNTS["pulls cancelled"] += 1
            return
        error = pull.task.exception()
        if error is not None:
            assert isinstance(error, KVLostError), error
            COUNTS[f"pulls {type(error).__name__}"] += 1
            return
        COUNTS["pulls right"] += 1
        owner = next(owner for owner in self.owners if owner.incarnation == pull.handle.incarnation)
        expected = owner.final[pull.handle.key][pull.first_block :]
        assert [pull.puller.segment.blocks[row].tobytes() for row in pull.rows] == expected
        assert owner.table.ends[pull.handle.key] == ["RELEASED"]

    @invariant()
    def everything_has_one_owner_and_nothing_wrong_is_used(self) -> None:
        if not hasattr(self, "pullers"):
            return
        COUNTS["steps"] += 1
        self._see(self.pulls)
        self.owner.check()
        for puller in self.pullers:
            running = [
                row for pull in self.pulls if pull.puller is puller and not pull.seen for row in pull.rows
            ]
            assert sorted([*running, *puller.free]) == list(range(NUM_BLOCKS))
            # Nobody writes into rows of a pull that has ended.
            for row, stamp in self.free_rows[id(puller)].items():
                assert puller.segment.blocks[row].tobytes() == stamp
        self.pulls = [pull for pull in self.pulls if not pull.seen]


def histories(count: int, steps: int) -> Counter[str]:
    COUNTS.clear()
    chosen = settings(
        max_examples=count,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(HandOffs, settings=chosen)  # type: ignore[no-untyped-call]
    print(dict(sorted(COUNTS.items())))
    return Counter(COUNTS)


def test_some_histories() -> None:
    counts = histories(250, 40)
    assert counts["histories"] >= 250
    for name in ("leases RELEASED", "leases EXPIRED", "pulls right", "pulls KVLostError", "pulls cancelled"):
        assert counts[name] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_histories() -> None:
    counts = histories(int(os.environ.get("DISAGG_HISTORIES", "4000")), 60)
    for name in ("RELEASED", "EXPIRED", "DROPPED"):
        assert counts[f"leases {name}"] > 1000
    for name in ("right", "KVLostError", "KVWithdrawnError", "cancelled"):
        assert counts[f"pulls {name}"] > 100
