"""What a simulated worker tells of its speed, as live ones do: a few samples of its steps and pulls."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from disagg.config import EngineConfig
from disagg.routing.types import StepSample, TransferSample
from disagg.sim.costs.base import Chunk, CostModel

# Of each kind, between two reports; older ones give way (as in disagg.service.step_samples).
MAX_SAMPLES = 12
_PROFILE_BATCHES = (1, 4, 16)


class StepSamples:
    """A run of decode steps gives one sample, of its first step: the others would say the same."""

    def __init__(self) -> None:
        # Long runs of decodes must not push out the few steps with prompts.
        self._prompts: deque[StepSample] = deque(maxlen=MAX_SAMPLES)
        self._decodes: deque[StepSample] = deque(maxlen=MAX_SAMPLES)
        self._transfers: deque[TransferSample] = deque(maxlen=MAX_SAMPLES)

    def step(self, seconds: float, chunks: Sequence[Chunk], num_decodes: int, context: int) -> None:
        num_tokens = attended = 0
        for count, computed in chunks:
            num_tokens += count
            attended += count * computed + count * count // 2
        sample = StepSample(seconds, num_tokens, attended, num_decodes, context if num_decodes else 0)
        (self._prompts if num_tokens else self._decodes).append(sample)

    def pull(self, seconds: float, num_tokens: int, num_others: int) -> None:
        if num_tokens > 0:
            self._transfers.append(TransferSample(seconds, num_tokens, num_others))

    def profile(self, cost: CostModel, config: EngineConfig) -> None:
        """Note what a worker measures of itself when it starts (as in disagg.service.step_samples)."""
        budget = config.max_num_batched_tokens
        for size in sorted({size for size in (16, budget // 4, budget // 2, budget) if size > 1}):
            chunks = (Chunk(size, 0),)
            self.step(cost.step_s(chunks, 0, 0), chunks, 0, 0)
        for batch in _PROFILE_BATCHES:
            if batch <= config.max_num_seqs:
                self.step(cost.step_s((), batch, 16 * batch), (), batch, 16 * batch)

    def take(self) -> tuple[list[StepSample], list[TransferSample]]:
        """Return what came since the last call."""
        steps, transfers = [*self._prompts, *self._decodes], list(self._transfers)
        self._prompts.clear()
        self._decodes.clear()
        self._transfers.clear()
        return steps, transfers
