"""DeviceRunner: a ModelRunner that computes in the background, one step after another on one stream.

    submit(n+1):  StepInput ─► forward ─► sampler ─► copy of the tokens to the host begins ─► returns
    result(n):    waits for the copy of step n, the only wait of a step

A sequence that was in step n goes on in step n + 1 before its token is known: the token's row in `drawn` is
put in its place, and the device reads it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from disagg.engine.runner import PLACEHOLDER, Batch, PendingStep, ScheduledSequence
from disagg.engine.sequence import Sequence as EngineSequence
from disagg.errors import DeviceLostError, RunnerLostError
from disagg.model.decode_graphs import Capture
from disagg.model.decoders import BackgroundDecoder
from disagg.model.device_sampler import DeviceSampler, PendingTokens
from disagg.model.host_memory import Moment
from disagg.model.kv_cache import KVCache
from disagg.model.ranks import RankProcesses
from disagg.model.runner import ModelRunner
from disagg.model.step import StepInput, step_input
from disagg.types import SampledToken


class _DeviceStep:
    """A step on its way. samples: for each item whether a token is drawn. pending: what is drawn, or the end
    of a step that draws nothing: its blocks may be handed over once it is collected. watched: see
    DeviceRunner.
    """

    def __init__(
        self,
        samples: list[bool],
        pending: PendingTokens | Moment,
        watched: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._samples = samples
        self._pending = pending
        self._watched = watched

    def result(self) -> list[SampledToken | None]:
        with self._watched():
            if isinstance(self._pending, Moment):
                self._pending.wait()
                return [None] * len(self._samples)
            drawn = iter(self._pending.result())
        return [next(drawn) if samples else None for samples in self._samples]


def check_device(device: torch.device) -> None:
    """Raise what a GPU raises that refuses every call: the error of what faulted stays with its process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class DeviceRunner(ModelRunner):
    """Implements disagg.engine.runner.AsyncRunner.

    capture: makes a graph of a decode step; where None, CUDA's, and none on a CPU.
    """

    def __init__(
        self,
        decoder: BackgroundDecoder,
        kv_cache: KVCache,
        max_model_len: int,
        *,
        capture: Capture | None = None,
        ranks: RankProcesses | None = None,
    ) -> None:
        super().__init__(decoder, kv_cache, max_model_len, ranks)
        self._drawn_rows: dict[EngineSequence, int] = {}
        self._device_sampler = DeviceSampler(self.spec.vocab_size, self.eos_token_ids, decoder.drawn)
        if capture is not None or self._device.type == "cuda":
            with self._computing():
                self._device_sampler.compile()
                decoder.capture(kv_cache, max_model_len, capture)

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        """Compute the batch, write its KV, and draw a token for each item that samples."""
        return self.submit(batch).result() if batch.items else []

    def submit(self, batch: Batch) -> PendingStep:
        """Start a batch of at least one item; the host goes on while the device computes.

        Raises RunnerLostError, here or from the step's `result`, where nothing can be computed any more.
        """
        samples = [item.samples for item in batch.items]
        sampling = [item.seq for item in batch.items if item.samples]
        step = step_input(batch.items)
        self._point_to_drawn(step, batch.items)
        with self._watched(), self._computing():
            logits = self.model.forward(step, self.kv_cache)
            pending = (
                self._device_sampler.start(logits, sampling, self._latest(sampling))
                if sampling
                else Moment(self._device)
            )
        self._drawn_rows = {seq: row for row, seq in enumerate(sampling)}
        return _DeviceStep(samples, pending, self._watched)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Tell a step that failed from a device, or another rank, that is lost for all that follow."""
        try:
            yield
        except RunnerLostError:
            raise
        except Exception as error:
            try:
                check_device(self._device)
            except RuntimeError:
                raise DeviceLostError(f"{self._device} is lost: {error}") from error
            raise
        if self.ranks is not None:
            # A collective that was given up leaves numbers that look like a result.
            self.ranks.check()

    def _point_to_drawn(self, step: StepInput, items: Sequence[ScheduledSequence]) -> None:
        """Replace placeholders by the rows in which the step before leaves the tokens."""
        for item, end in zip(items, step.query_start[1:].tolist(), strict=True):
            if step.token_ids[end - 1] == PLACEHOLDER:
                step.token_ids[end - 1] = -1 - self._drawn_rows[item.seq]

    def _latest(self, sampling: Sequence[EngineSequence]) -> list[int | None]:
        return [self._drawn_rows[seq] if seq.token_ids[-1] == PLACEHOLDER else None for seq in sampling]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Launch on this model's device, whichever thread calls."""
        if self._device.type != "cuda":
            with torch.inference_mode():
                yield
            return
        with torch.inference_mode(), torch.cuda.device(self._device):
            yield
