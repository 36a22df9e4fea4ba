"""A machine that several workers share: while others compute, each of them is slower.

Workers of one host take memory bandwidth and caches from each other, whichever cores they are bound to. How
much is measured (disagg.bench.profile, `interference`); this only adds it up as steps overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from disagg.sim.events import EventLoop


@dataclass(slots=True, eq=False)
class Job:
    """One step in flight. left: seconds of an undisturbed machine. version: changes with the pace."""

    slowed: float
    left: float
    done: Callable[[float], None]
    began: float
    since: float
    pace: float = 0.0
    version: int = 0


class Machine:
    """Where steps run that slow each other down."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        # A dict for its order: the same seed, the same bytes.
        self._jobs: dict[Job, None] = {}

    def run(self, seconds: float, slowed: float, done: Callable[[float], None]) -> Job:
        """Run a step that takes `seconds` alone; call `done` with the seconds that it took.

        slowed: how much longer it takes while any other one runs, 0.2 for a fifth.
        """
        now = self._loop.now
        job = Job(slowed, seconds, done, now, now)
        self._jobs[job] = None
        self._set_pace()
        return job

    def drop(self, job: Job) -> None:
        """End a step whose worker is lost; `done` is not called. Does nothing where it has ended."""
        if self._jobs.pop(job, job) is None:
            job.version += 1
            self._set_pace()

    def _set_pace(self) -> None:
        now, alone = self._loop.now, len(self._jobs) == 1
        for job in self._jobs:
            pace = 1.0 if alone else 1 / (1 + job.slowed)
            if pace == job.pace:
                continue
            job.left = max(0.0, job.left - (now - job.since) * job.pace)
            job.since, job.pace = now, pace
            job.version += 1
            self._loop.at(now + job.left / pace, self._end, (job, job.version))

    def _end(self, event: tuple[Job, int]) -> None:
        job, version = event
        if version == job.version:
            del self._jobs[job]
            self._set_pace()
            job.done(self._loop.now - job.began)
