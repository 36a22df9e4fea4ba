"""Steps that take next to no time."""

from __future__ import annotations

from collections.abc import Sequence

from disagg.sim.costs.base import Chunk

# Above 0, so that time still goes forward from step to step.
_STEP_S = 1e-9


class FreeCost:
    """See CostModel."""

    def step_s(self, chunks: Sequence[Chunk], num_decodes: int, decode_context: int) -> float:
        return _STEP_S

    def decode_line(self, num_decodes: int) -> tuple[float, float]:
        return _STEP_S, 0.0
