"""Pipeline parallelism: the stages that the engines of one worker share.

A worker of n stages is n engines with a share of the KV blocks each, which take turns on the stages: vLLM's
virtual engines. A step passes the stages in order, an n-th of its seconds in each, and a stage holds one step
at a time. So a single request is no faster than without the pipeline, and n batches are on their way at once.
"""

from __future__ import annotations


class Pipeline:
    """When each stage of one worker is free next, on virtual time."""

    def __init__(self, num_stages: int) -> None:
        self._free_at = [0.0] * num_stages

    @property
    def open_at(self) -> float:
        """When the first stage takes the next step."""
        return self._free_at[0]

    def enter(self, now: float, seconds: float) -> float:
        """Let a step in that takes `seconds` in all; return when it leaves the last stage."""
        part = seconds / len(self._free_at)
        for stage, free_at in enumerate(self._free_at):
            now = self._free_at[stage] = max(now, free_at) + part
        return now
