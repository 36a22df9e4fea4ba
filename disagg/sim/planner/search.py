"""DistServe's placement search, on the live Router and Scheduler.

Zhong et al., "DistServe" (OSDI '24): algorithm 1, for clusters whose nodes are joined by fast links, finds
each phase's best worker by itself and replicates both; algorithm 2, for slow links between nodes, keeps a
request's two phases within a node, tries pairs of workers that fit into one, and replicates the node. Both
take goodput from simulation. Three things are added. What is found phase by phase is simulated as a whole,
with transfers and with both objectives at once, before it is recommended. Kinds of GPU may be mixed within a
budget (Patel et al., "Splitwise", ISCA '24: most throughput at equal cost, power or number of machines). And
colocated workers compete: where they win, that is the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from disagg.errors import ConfigError
from disagg.sim.planner.goodput import Bisection, Criterion, Load, is_good
from disagg.sim.planner.space import Plan, PoolPlan, Space, WorkerShape
from disagg.sim.spec import LinkSpec, SimSpec
from disagg.types import Role

Affinity = Literal["high", "low"]
Notify = Callable[[str], None]

# A phase alone: the other one takes no time, nor does the way between them.
_FREE_LINKS = LinkSpec(bandwidth_gb_s=1e9, sharing="private")
_FREE_POOL = {"cost": {"kind": "free"}, "num_kv_blocks": 65_536}
# Workers that may be added to a plan whose whole is slower than its parts.
_MAX_ADDED = 8
_MAX_RATIOS = 16
# By which a whole may exceed the estimate from its parts, since its workers share their queues.
_MAX_GAIN = 1.5


@dataclass(frozen=True)
class Ratio:
    """One point of the sweep over prefill : decode: workers of each, and requests/s."""

    prefill: int
    decode: int
    estimate: float
    goodput: float


@dataclass(frozen=True)
class Result:
    """What a search found. plans: best first. ratios: of the best disaggregated plan, with as many GPUs."""

    plans: list[Plan]
    ratios: list[Ratio]
    num_simulations: int


class Search:
    """One search. notify: called with what is about to be simulated."""

    def __init__(
        self,
        space: Space,
        load: Load,
        criterion: Criterion,
        *,
        bisection: Bisection | None = None,
        seed: int = 0,
        notify: Notify | None = None,
    ) -> None:
        if criterion.ttft_s is None or criterion.tpot_s is None:
            raise ConfigError(
                "objectives: a plan needs both ttft_ms and tpot_ms, since each sizes one pool",
                param="objectives",
            )
        self.space = space
        self.num_simulations = 0
        self._load = load
        self._criterion = criterion
        self._bisection = bisection or Bisection()
        self._seed = seed
        self._notify = notify or (lambda _text: None)
        self._phases: dict[tuple[Role, WorkerShape], float] = {}
        self._wholes: dict[tuple[PoolPlan, ...], float] = {}

    # -- simulations ---------------------------------------------------------------------------------

    def _good(self, spec: SimSpec, criterion: Criterion, rate: float, load: Load) -> bool:
        self.num_simulations += 1
        return is_good(spec, load, criterion, rate, self._seed)

    def phase_goodput(self, role: Role, shape: WorkerShape) -> float:
        """Return the requests/s of one worker in one phase, by that phase's objective alone."""
        known = self._phases.get((role, shape))
        if known is not None:
            return known
        self._notify(f"{role.value} alone: {shape}")
        criterion, load = self._criterion, self._load
        if role is Role.PREFILL:
            spec = self.space.spec((PoolPlan(Role.MIXED, shape, 1),))
            criterion, load = replace(criterion, tpot_s=None), load.of_one_token()
        else:
            pools = (PoolPlan(Role.PREFILL, shape, 1), PoolPlan(Role.DECODE, shape, 1))
            spec = self.space.spec(pools, prefill=_FREE_POOL)
            spec = spec.model_copy(update={"links": _FREE_LINKS})
            criterion = replace(criterion, ttft_s=None)
        # Policies that weigh predictions might prefill on the decode worker.
        spec = spec.model_copy(update={"router": spec.router.model_copy(update={"policy": "least_loaded"})})
        rate = self._bisection.largest(lambda rate: self._good(spec, criterion, rate, load), shape.gpus)
        self._phases[role, shape] = rate
        return rate

    def whole_goodput(self, pools: tuple[PoolPlan, ...], guess: float | None) -> float:
        """Return the requests/s of a cluster, transfers included, by both objectives."""
        known = self._wholes.get(pools)
        if known is not None:
            return known
        self._notify(" + ".join(f"{pool.role.value} {pool}" for pool in pools))
        spec, gpus = self.space.spec(pools), sum(pool.gpus for pool in pools)
        rate = self._bisection.largest(
            lambda rate: self._good(spec, self._criterion, rate, self._load), gpus, guess or None
        )
        self._wholes[pools] = rate
        return rate

    def _simulated(self, plan: Plan) -> Plan:
        guess = None if plan.estimate is None else plan.estimate / plan.nodes
        return replace(plan, goodput=self.whole_goodput(plan.pools, guess) * plan.nodes)

    # -- candidates ----------------------------------------------------------------------------------

    def _best_shapes(self, role: Role) -> Iterator[tuple[WorkerShape, float]]:
        """Yield for each kind of GPU the shape with the most goodput per GPU, fewer GPUs first."""
        for hardware in self.space.limits.gpus:
            found = [
                (rate / shape.gpus, -shape.gpus, rate, shape)
                for shape in self.space.shapes
                if shape.hardware == hardware and (rate := self.phase_goodput(role, shape)) > 0
            ]
            if found:
                _, _, rate, shape = max(found, key=lambda item: item[:2])
                yield shape, rate

    def high_affinity(self, demand: float | None) -> Iterator[Plan]:
        """Algorithm 1: each phase's best worker, replicated to the demand or as far as the limits go."""
        decodes = list(self._best_shapes(Role.DECODE))
        for prefill, prefill_rate in self._best_shapes(Role.PREFILL):
            for decode, decode_rate in decodes:
                plan = self._sized(prefill, prefill_rate, decode, decode_rate, demand)
                if plan is not None:
                    yield plan

    def _sized(
        self,
        prefill: WorkerShape,
        prefill_rate: float,
        decode: WorkerShape,
        decode_rate: float,
        demand: float | None,
    ) -> Plan | None:
        def plan(num_prefill: int, num_decode: int) -> Plan:
            return pair_plan(prefill, num_prefill, prefill_rate, decode, num_decode, decode_rate)

        if demand is not None:
            wanted = plan(math.ceil(demand / prefill_rate), math.ceil(demand / decode_rate))
            return wanted if self.space.allows(wanted) else None
        gpus = self.space.limits.gpus
        candidates = (
            plan(num_prefill, num_decode)
            for num_prefill in range(1, gpus[prefill.hardware] // prefill.gpus + 1)
            for num_decode in range(1, gpus[decode.hardware] // decode.gpus + 1)
        )
        allowed = [candidate for candidate in candidates if self.space.allows(candidate)]
        return max(allowed, key=lambda item: (item.estimate or 0.0, -item.gpus), default=None)

    def low_affinity(self, demand: float | None, *, pairs_only: bool = False) -> Iterator[Plan]:
        """Algorithm 2: what fits into one node, simulated as a whole, replicated over nodes.

        pairs_only: one prefill and one decode worker a node, as DistServe has it. Arrangements whose
        estimate is far below what was found are not simulated.
        """
        arrangements = sorted(
            self._arrangements(pairs_only), key=lambda plan: (plan.estimate or 0.0) / plan.gpus, reverse=True
        )
        best = 0.0
        for arrangement in arrangements:
            if not pairs_only and _MAX_GAIN * (arrangement.estimate or 0.0) / arrangement.gpus <= best:
                continue
            one = self._simulated(arrangement)
            best = max(best, (one.goodput or 0.0) / one.gpus)
            if one.goodput:
                yield from self._over_nodes(one, demand)

    def _arrangements(self, pairs_only: bool) -> Iterator[Plan]:
        room = self.space.limits.gpus_per_node
        for prefill in self.space.shapes:
            for decode in self.space.shapes:
                if decode.hardware != prefill.hardware:
                    continue
                for num_prefill in range(1, room // prefill.gpus + 1):
                    left = room - num_prefill * prefill.gpus
                    for num_decode in range(1, left // decode.gpus + 1):
                        if pairs_only and num_prefill * num_decode > 1:
                            break
                        rates = (
                            self.phase_goodput(Role.PREFILL, prefill),
                            self.phase_goodput(Role.DECODE, decode),
                        )
                        plan = pair_plan(prefill, num_prefill, rates[0], decode, num_decode, rates[1])
                        if plan.estimate and self.space.allows(plan):
                            yield plan

    def _over_nodes(self, one: Plan, demand: float | None) -> Iterator[Plan]:
        """Yield a node's plan replicated to the demand, or as often as the limits allow."""
        assert one.goodput
        limits = self.space.limits
        # GPUs that an arrangement leaves idle on a node can't be lent to another node.
        nodes, rest = divmod(limits.gpus[one.pools[0].shape.hardware], limits.gpus_per_node)
        most = nodes * (limits.gpus_per_node // one.gpus) + rest // one.gpus
        for copies in range(most, 0, -1) if demand is None else [math.ceil(demand / one.goodput)]:
            plan = replace(
                one, nodes=copies, goodput=one.goodput * copies, estimate=(one.estimate or 0.0) * copies
            )
            if copies <= most and self.space.allows(plan):
                yield plan
                return

    def colocated(self, demand: float | None) -> Iterator[Plan]:
        """Yield for each kind of GPU the best colocated workers, as many as demanded or allowed."""
        for hardware in self.space.limits.gpus:
            shapes = [shape for shape in self.space.shapes if shape.hardware == hardware]
            rates = {shape: self.whole_goodput((PoolPlan(Role.MIXED, shape, 1),), None) for shape in shapes}
            shape = max(shapes, key=lambda one: (rates[one] / one.gpus, -one.gpus), default=None)
            if shape is None or not rates[shape]:
                continue
            most = self.space.limits.gpus[hardware] // shape.gpus
            for replicas in range(most, 0, -1) if demand is None else [math.ceil(demand / rates[shape])]:
                plan = Plan((PoolPlan(Role.MIXED, shape, replicas),))
                if self.space.allows(plan):
                    yield replace(plan, goodput=self.whole_goodput(plan.pools, rates[shape] * replicas))
                    break

    # -- the search ----------------------------------------------------------------------------------

    def run(self, affinity: Affinity, demand: float | None = None, finalists: int = 4) -> Result:
        """Search. demand: requests/s to be served as cheaply as possible; None: as many as the limits allow.

        finalists: plans that are simulated as a whole. Raises ConfigError where no plan is good at all.
        """
        if affinity == "low":
            plans = list(self.low_affinity(demand))
        else:
            plans = self._finals(self.high_affinity(demand), demand, finalists)
        plans += self.colocated(demand)
        plans = [plan for plan in plans if plan.goodput]
        if not plans:
            raise ConfigError(
                "objectives: no plan within the limits meets them, at any load"
                if demand is None
                else f"demand: nothing within the limits serves {demand:g} requests/s",
                param="objectives" if demand is None else "demand",
            )
        plans = self._ranked(plans, demand)
        return Result(plans, self._ratios(plans), self.num_simulations)

    def _finals(self, plans: Iterable[Plan], demand: float | None, finalists: int) -> list[Plan]:
        if demand is None:
            best = sorted(plans, key=lambda plan: (-(plan.estimate or 0.0), plan.gpus))[:finalists]
            return [self._simulated(plan) for plan in best]
        best = sorted(plans, key=lambda plan: (self.space.price(plan)[0], plan.gpus))[:finalists]
        return [self._enough(plan, demand) for plan in best]

    def _enough(self, plan: Plan, demand: float) -> Plan:
        """Return the plan with as many workers more as the whole needs to serve what its parts would."""
        for _ in range(_MAX_ADDED):
            self._notify(f"{plan} at {demand:g}/s")
            if self._good(self.space.spec(plan.pools), self._criterion, demand, self._load):
                break
            larger = self._with_one_more(plan)
            if not self.space.allows(larger):
                break
            plan = larger
        return self._simulated(plan)

    def _with_one_more(self, plan: Plan) -> Plan:
        """Return the plan with a worker more in the phase that has less room."""
        prefill, decode = plan.pools
        rates = [self.phase_goodput(pool.role, pool.shape) for pool in plan.pools]
        if prefill.replicas * rates[0] <= decode.replicas * rates[1]:
            counts = prefill.replicas + 1, decode.replicas
        else:
            counts = prefill.replicas, decode.replicas + 1
        return pair_plan(prefill.shape, counts[0], rates[0], decode.shape, counts[1], rates[1])

    def _ranked(self, plans: list[Plan], demand: float | None) -> list[Plan]:
        def key(plan: Plan) -> tuple[float, ...]:
            usd, _ = self.space.price(plan)
            goodput = plan.goodput or 0.0
            if demand is not None and goodput >= demand * (1 - self._bisection.share):
                return (0.0, usd, plan.gpus, -goodput)
            return (1.0, -goodput, usd, plan.gpus)

        return sorted(dict.fromkeys(plans), key=key)

    def _ratios(self, plans: list[Plan]) -> list[Ratio]:
        """Sweep the best disaggregated plan (of one node's copy) over prefill : decode, with as many GPUs."""
        best = next((plan for plan in plans if not plan.colocated), None)
        if best is None:
            return []
        prefill, decode = (pool.shape for pool in best.pools)
        rates = self.phase_goodput(Role.PREFILL, prefill), self.phase_goodput(Role.DECODE, decode)
        budget = sum(pool.gpus for pool in best.pools)
        points = []
        for num_prefill in range(1, (budget - decode.gpus) // prefill.gpus + 1):
            num_decode = (budget - num_prefill * prefill.gpus) // decode.gpus
            plan = pair_plan(prefill, num_prefill, rates[0], decode, num_decode, rates[1])
            points.append(plan)
        step = max(1, -(-len(points) // _MAX_RATIOS))
        kept = [plan for number, plan in enumerate(points) if number % step == 0 or plan.pools == best.pools]
        return [self._ratio(plan) for plan in kept]

    def _ratio(self, plan: Plan) -> Ratio:
        goodput = self._simulated(plan).goodput or 0.0
        return Ratio(plan.replicas(Role.PREFILL), plan.replicas(Role.DECODE), plan.estimate or 0.0, goodput)


def pair_plan(
    prefill: WorkerShape,
    num_prefill: int,
    prefill_rate: float,
    decode: WorkerShape,
    num_decode: int,
    decode_rate: float,
) -> Plan:
    """Return a disaggregated plan; rates: requests/s of one worker in its phase."""
    pools = (
        PoolPlan(Role.PREFILL, prefill, num_prefill),
        PoolPlan(Role.DECODE, decode, num_decode),
    )
    return Plan(pools, estimate=min(num_prefill * prefill_rate, num_decode * decode_rate))
