"""Workloads: which request arrives when, with how many tokens and which shared prefixes.

Pure Python and numpy, so that the load generator (`disagg.bench`) and the simulator replay the very
same requests. Random draws take a seeded `numpy.random.Generator` as an argument.
"""

from disagg.workload.options import ArrivalKind, WorkloadDefaults, WorkloadOptions, build_workload
from disagg.workload.synthetic import (
    AllAtOnce,
    Arrivals,
    ConstantRate,
    Diurnal,
    FixedLength,
    GammaBursts,
    Lengths,
    LogNormalLength,
    Poisson,
    SharedPrefix,
    UniformLength,
    parse_lengths,
    synthesize,
)
from disagg.workload.traces import TraceError, TraceFormat, read_azure, read_mooncake, read_trace
from disagg.workload.types import Segment, TimedRequest, Workload, WorkloadError

__all__ = [
    "AllAtOnce",
    "ArrivalKind",
    "Arrivals",
    "ConstantRate",
    "Diurnal",
    "FixedLength",
    "GammaBursts",
    "Lengths",
    "LogNormalLength",
    "Poisson",
    "Segment",
    "SharedPrefix",
    "TimedRequest",
    "TraceError",
    "TraceFormat",
    "UniformLength",
    "Workload",
    "WorkloadDefaults",
    "WorkloadError",
    "WorkloadOptions",
    "build_workload",
    "parse_lengths",
    "read_azure",
    "read_mooncake",
    "read_trace",
    "synthesize",
]
