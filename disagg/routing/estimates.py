"""What a placement would come to: time to the first token, stall at the hand-off, time between tokens."""

from __future__ import annotations

from disagg.routing.costs import WorkerCosts, ahead_of, turn_of
from disagg.routing.types import PlacementRequest, Prediction
from disagg.routing.view import ClusterView


def predict(
    request: PlacementRequest, view: ClusterView, prefill: int, decode: int, depths: tuple[int, int]
) -> Prediction:
    """Return what to expect of a request on the workers in these slots, charged on none of them yet.

    depths: leading blocks that each has cached. `_prices.c` does the same.
    """
    if view.core.predict is not None:
        return view.core.predict(
            Prediction,
            view.accounts,
            view.stale,
            prefill,
            decode,
            *depths,
            request.num_tokens,
            request.max_new_tokens,
            request.priority,
            view.expected_tokens,
            view.now,
            view.calibration.lines,
        )
    on_prefill, on_decode = view.costs(prefill), view.costs(decode)
    num_tokens = request.num_tokens
    uncached = max(1, num_tokens - depths[0] * view.size_of_block(prefill))
    missing = num_tokens - depths[1] * view.size_of_block(decode)
    turn = turn_of(uncached, request.priority)
    gaps = max(1.0, min(request.max_new_tokens, view.expected_tokens) - 1)
    fitted = on_prefill.prefill_fitted and on_decode.decode_fitted
    attended = uncached * (num_tokens - uncached / 2)
    shorter = view.queued_before(prefill, turn)
    ahead = ahead_of(uncached, shorter, on_prefill.queued)
    ttft = on_prefill.first_token_s(ahead, uncached, attended)
    wait = max(0.0, ttft - on_prefill.service_s(uncached, attended))
    stall = on_decode.place_s
    if prefill != decode:
        stall += on_decode.pull_s(missing, max(on_prefill.links, on_decode.links))
    own_s = on_decode.own_s(num_tokens, gaps)
    # Of prompts that are queued where it decodes, by the time it does.
    left = max(0.0, on_decode.queued - ahead) if prefill == decode else on_decode.left_after(ttft)
    later_s = max(on_decode.idle_step_s, on_decode.step_s - ended_by(ttft, on_decode, view))
    raw = Prediction(
        ttft=ttft,
        wait_s=wait,
        stall=stall,
        tpot=on_decode.joined_s + own_s + on_decode.beside_s(left, gaps) + stall / gaps,
        later_tpot=later_s + own_s + stall / gaps,
        idle_tpot=on_decode.idle_step_s + own_s + (stall - on_decode.place_s) / gaps,
        fitted=fitted,
    )
    return view.calibration.apply(raw, local=prefill == decode)


def ended_by(seconds: float, costs: WorkerCosts, view: ClusterView) -> float:
    """Return by how much a worker's steps will be shorter after so long, as running sequences end.

    Whatever the router has placed there counts already, so nobody comes but by later decisions. Rejecting by
    the load of this moment would make it oscillate: it lags behind what prefill is about to send (Mooncake,
    FAST '25, section 6).
    """
    life_s = view.expected_tokens * costs.step_s
    share = min(1.0, seconds / life_s) if life_s > 0 else 0.0
    return costs.sequence_s * costs.sequences * share
