"""Router: one decision per request, on what workers report and on what it sent them itself.

Pure: no clock, no I/O; `now` is an argument in seconds on any one clock, and the generator is given. The
gRPC server, a front end whose router is away, and the simulator all drive this same class.
"""

from __future__ import annotations

import random
from collections import Counter

from disagg.config import RouterConfig
from disagg.errors import InvalidRequestError
from disagg.routing.assumptions import Assumptions
from disagg.routing.charges import Charge
from disagg.routing.choice import Choice
from disagg.routing.core import CORE, Core
from disagg.routing.estimates import predict
from disagg.routing.policies import Policy, make_policy
from disagg.routing.prefix_index import PrefixIndex
from disagg.routing.types import Placement, PlacementRequest, Prediction, WorkerReport
from disagg.routing.view import ClusterView

# No request lives this long; a charge that does has lost its front end's word.
CHARGE_TTL_S = 3600.0
# Prediction errors kept until somebody asks for them.
MAX_ERRORS = 4096


class Router:
    """Placement, and the book-keeping that it rests on.

    view: the cluster as it is known. counters: placements by (policy, kind). All methods cost about the
    same whatever the number of requests in flight. predicting: whether `place` says what to expect.
    core: who does the hot work.
    """

    def __init__(
        self,
        config: RouterConfig,
        rng: random.Random,
        *,
        policy: Policy | None = None,
        predicting: bool = True,
        max_charges: int = 100_000,
        max_index_entries: int = 4_000_000,
        core: Core = CORE,
    ) -> None:
        self.config = config
        self.policy = policy or make_policy(config)
        self.view = ClusterView(max_charges=max_charges, core=core)
        self.index = PrefixIndex(max_index_entries, core)
        self.counters: Counter[tuple[str, str]] = Counter()
        self._assumptions = Assumptions(self.index)
        self._predicting = predicting
        self._errors: list[tuple[str, float]] = []
        self._rng = rng

    # -- requests ------------------------------------------------------------------------------------

    def place(self, request: PlacementRequest, now: float) -> Placement:
        """Decide where a request runs and charge it there; an earlier charge of the same id is replaced.

        Raises NoCapacityError where no worker takes requests, InvalidRequestError naming `prompt` where
        none that lives could take it.
        """
        choice = self._choose(request, self.policy)
        prediction = self._predict(request, choice) if self._predicting else None
        return self.commit(request, choice, prediction, now)

    def consider(self, request: PlacementRequest, policy: Policy | None = None) -> tuple[Choice, Prediction]:
        """Return where the request would run and what to expect of that, without charging it.

        policy: in place of the router's own. Raises as `place`.
        """
        choice = self._choose(request, policy or self.policy)
        return choice, self._predict(request, choice)

    def _choose(self, request: PlacementRequest, policy: Policy) -> Choice:
        if request.num_tokens < 1:
            raise InvalidRequestError("the prompt has no tokens", param="prompt")
        # A retry's earlier charge must not count against the workers that it is now weighed on.
        self.finished(request.request_id)
        return policy.choose(request, self.view, self.index, self._rng)

    def _predict(self, request: PlacementRequest, choice: Choice) -> Prediction:
        return predict(request, self.view, choice.prefill, choice.decode, choice.depths)

    def commit(
        self, request: PlacementRequest, choice: Choice, prediction: Prediction | None, now: float
    ) -> Placement:
        """Charge a request where `consider` would have it, at once: a choice does not outlive its view."""
        placement = choice.placement(request, self.view, self.policy.name, prediction)
        charge, ended = self.view.charge(
            request, choice.prefill, choice.decode, choice.depths, now, prediction
        )
        for other in ended:
            self._assumptions.ended(other)
        self._assumptions.placed(charge)
        self.counters[placement.policy, placement.kind.value] += 1
        return placement

    def prefilled(self, request_id: str, seconds: float | None = None) -> None:
        """The request's first token is out: its load moves to the decode worker. Unknown ids are ignored.

        seconds: from its placement until then, where that was measured.
        """
        charge = self.view.prefilled(request_id)
        if charge is None:
            return
        self._assumptions.prefilled(charge)
        prediction = charge.prediction
        if seconds is None or prediction is None or not prediction.fitted:
            return
        self._note_error("ttft", prediction.ttft, seconds)
        self.view.calibration.first_token(prediction, seconds)

    def finished(self, request_id: str, num_tokens: int = 0, seconds: float | None = None) -> None:
        """The request has ended, however. Unknown ids are ignored.

        num_tokens: of the whole answer, where it ended by itself, else 0. seconds: from the first of these to
        the last, where that was measured.
        """
        charge = self.view.finished(request_id)
        if charge is None:
            return
        self._assumptions.ended(charge)
        self.view.answered(num_tokens)
        prediction = charge.prediction
        if num_tokens < 2 or seconds is None or prediction is None or not prediction.fitted:
            return
        tpot = seconds / (num_tokens - 1)
        self._note_error("tpot", prediction.tpot, tpot)
        self.view.calibration.ended(prediction, tpot, local=charge.local)

    def _note_error(self, name: str, predicted: float, actual: float) -> None:
        if actual > 0 and len(self._errors) < MAX_ERRORS:
            self._errors.append((name, predicted / actual - 1))

    def take_errors(self) -> list[tuple[str, float]]:
        """Return ("ttft" or "tpot", predicted / actual - 1) of what came out since the last call."""
        errors, self._errors = self._errors, []
        return errors

    def frontend_left(self, frontend_id: str) -> None:
        """A front end is gone, and with it the charges of its requests."""
        self._ended(self.view.frontend_left(frontend_id))

    def _ended(self, charges: list[Charge]) -> None:
        for charge in charges:
            self._assumptions.ended(charge)

    # -- workers -------------------------------------------------------------------------------------

    def worker_report(self, report: WorkerReport, now: float) -> bool:
        """Take over a worker's state. True means that it must send a snapshot of its blocks.

        Another incarnation under a known id is another worker: everything of the old one is dropped.
        """
        worker_id = report.info.worker_id
        known = self.view.workers.get(worker_id)
        if known is not None and known.info.incarnation != report.info.incarnation:
            self._remove(worker_id)
        self.view.update(report, now)
        slot = self.view.slot(worker_id)
        assert slot is not None
        self._assumptions.reported(slot)
        return report.blocks is not None and not self.index.apply(slot, report.blocks)

    def worker_left(self, worker_id: str, incarnation: str) -> None:
        """A worker's stream ended. Ignored where another incarnation has taken its place."""
        known = self.view.workers.get(worker_id)
        if known is not None and known.info.incarnation == incarnation:
            self._remove(worker_id)

    def sweep(self, now: float) -> list[str]:
        """Forget workers silent for dead_after_s, and return them; drop charges that nobody ends any more."""
        silent = self.view.silent(now, self.config.dead_after_s)
        for worker_id in silent:
            self._remove(worker_id)
        self._ended(self.view.expire(now - CHARGE_TTL_S))
        return silent

    def _remove(self, worker_id: str) -> None:
        slot = self.view.remove(worker_id)
        if slot is not None:
            self.index.forget(slot)
            self._assumptions.worker_left(slot)
