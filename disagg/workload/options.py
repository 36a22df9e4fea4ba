"""From what somebody asked for on a command line to a workload: one meaning of the flags everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from disagg.workload.synthetic import (
    AllAtOnce,
    Arrivals,
    ConstantRate,
    Diurnal,
    GammaBursts,
    Poisson,
    SharedPrefix,
    parse_lengths,
    synthesize,
)
from disagg.workload.traces import TraceError, TraceFormat, read_trace
from disagg.workload.types import Workload, WorkloadError


class ArrivalKind(StrEnum):
    """How requests of a made-up workload are spread over time."""

    POISSON = "poisson"
    CONSTANT = "constant"
    BURSTS = "bursts"
    DIURNAL = "diurnal"


@dataclass(frozen=True)
class WorkloadDefaults:
    """What a made-up workload is like where nothing else is asked for."""

    num_requests: int
    rate_per_s: float
    """Infinite: all at once."""
    input_len: str
    output_len: str


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """Flags by their names; None: not given.

    Raises WorkloadError that names the flag where one is out of range or would have no effect.
    """

    num_requests: int | None = None
    request_rate: float | None = None
    """Requests per second; infinite: all at once."""
    arrivals: ArrivalKind | None = None
    burstiness: float | None = None
    """Shape of gamma distributed gaps: 1 Poisson, below 1 bursts, infinite even."""
    amplitude: float | None = None
    """Of a day's wave, as a share of the mean rate."""
    period: float | None = None
    """Of a day's wave, in seconds."""
    input_len: str | None = None
    output_len: str | None = None
    prefix_len: int | None = None
    prefix_groups: int | None = None
    trace: Path | None = None
    trace_format: TraceFormat | None = None
    trace_start: float | None = None
    """Seconds into the trace."""
    duration: float | None = None
    """Seconds of arrivals; of a trace before `rate_scale`."""
    rate_scale: float | None = None
    max_input_len: int | None = None
    max_output_len: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_requests", "prefix_len", "prefix_groups", "max_input_len", "max_output_len"):
            at_least(name, getattr(self, name), 1)
        for name in ("request_rate", "burstiness", "period", "duration", "rate_scale"):
            above_zero(name, getattr(self, name))
        at_least("trace_start", self.trace_start, 0)
        self._refuse_useless()

    def _refuse_useless(self) -> None:
        """A flag that would have no effect is an error, not a surprise in the figures."""
        wrong, why = (_ONLY_SYNTHETIC, "has no effect with --trace") if self.trace else (_ONLY_TRACE, _NEEDS)
        for name in wrong:
            if getattr(self, name) is not None:
                raise WorkloadError(flag(name), why)
        if self.trace is not None and self.trace_format is None:
            raise WorkloadError("--trace-format", f"needed with --trace: one of {', '.join(TraceFormat)}")
        if self.prefix_groups is not None and self.prefix_len is None:
            raise WorkloadError("--prefix-groups", "needs --prefix-len")
        if self.burstiness is not None and self.arrivals not in (None, ArrivalKind.BURSTS):
            raise WorkloadError("--burstiness", f"has no effect with --arrivals {self.arrivals}")
        for name in ("amplitude", "period"):
            if getattr(self, name) is not None and self.arrivals is not ArrivalKind.DIURNAL:
                raise WorkloadError(flag(name), "needs --arrivals diurnal")
        if self.trace is None and self.duration is not None and self.num_requests is not None:
            raise WorkloadError("--duration", "give it or --num-requests, not both")


_NEEDS = "needs --trace"
_ONLY_TRACE = ("trace_format", "trace_start", "rate_scale")
_ONLY_SYNTHETIC = (
    *("request_rate", "arrivals", "burstiness", "amplitude", "period"),
    *("input_len", "output_len", "prefix_len", "prefix_groups"),
)
# Flags behind the fields that a workload complains of.
_FLAGS = {
    "rate_per_s": "request_rate",
    "period_s": "period",
    "count": "num_requests",
    "limit": "num_requests",
    "groups": "prefix_groups",
    "tokens": "prefix_len",
    "start_s": "trace_start",
    "duration_s": "duration",
    "factor": "rate_scale",
    "max_prompt_tokens": "max_input_len",
    "max_output_tokens": "max_output_len",
}


def build_workload(options: WorkloadOptions, defaults: WorkloadDefaults, seed: int) -> Workload:
    """Return the workload that is asked for; the same seed makes the same one.

    Raises WorkloadError naming the flag, or TraceError naming the trace's line.
    """
    try:
        if options.trace is not None and options.trace_format is not None:
            workload = _from_trace(options, options.trace, options.trace_format)
        else:
            workload = _synthetic(options, defaults, seed)
        return workload.cap_lengths(options.max_input_len, options.max_output_len)
    except TraceError:  # names its file and line
        raise
    except WorkloadError as error:
        if error.field.startswith("--"):
            raise
        raise WorkloadError(flag(_FLAGS.get(error.field, error.field)), error.problem) from None


def _from_trace(options: WorkloadOptions, path: Path, trace_format: TraceFormat) -> Workload:
    start = options.trace_start or 0.0
    workload = read_trace(path, trace_format, start, options.duration, options.num_requests)
    return workload.scale_rate(options.rate_scale or 1.0)


def _synthetic(options: WorkloadOptions, defaults: WorkloadDefaults, seed: int) -> Workload:
    rate = options.request_rate or defaults.rate_per_s
    count = options.num_requests or defaults.num_requests
    if options.duration is not None:
        if math.isinf(rate):
            raise WorkloadError("--duration", "needs a finite --request-rate")
        count = max(1, round(options.duration * rate))
    prefix = None
    if options.prefix_len is not None:
        prefix = SharedPrefix(options.prefix_groups or 1, options.prefix_len)
    return synthesize(
        count,
        _arrivals(options, rate),
        parse_lengths(options.input_len or defaults.input_len, "--input-len"),
        parse_lengths(options.output_len or defaults.output_len, "--output-len"),
        np.random.default_rng(seed),
        prefix,
    )


def _arrivals(options: WorkloadOptions, rate: float) -> Arrivals:
    if math.isinf(rate):
        for name in ("arrivals", "burstiness"):
            if getattr(options, name) is not None:
                raise WorkloadError(flag(name), "needs a finite --request-rate")
        return AllAtOnce()
    if options.arrivals is ArrivalKind.DIURNAL:
        amplitude = 0.5 if options.amplitude is None else options.amplitude
        return Diurnal(rate, amplitude, options.period or 86_400.0)
    if options.arrivals is ArrivalKind.CONSTANT or options.burstiness == math.inf:
        return ConstantRate(rate)
    if options.arrivals is ArrivalKind.BURSTS or options.burstiness not in (None, 1):
        return GammaBursts(rate, options.burstiness or 0.5)
    return Poisson(rate)


def flag(name: str) -> str:
    """Return how an option is written on the command line."""
    return "--" + name.replace("_", "-")


def at_least(name: str, value: float | None, least: int) -> None:
    """Raise WorkloadError naming the flag unless the value is not given or at least `least`."""
    if value is not None and not value >= least:
        raise WorkloadError(flag(name), f"must be at least {least}, got {value}")


def above_zero(name: str, value: float | None) -> None:
    """Raise WorkloadError naming the flag unless the value is not given or above zero."""
    if value is not None and not value > 0:
        raise WorkloadError(flag(name), f"must be above 0, got {value}")
