"""Flags for a workload that commands share, as types of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from disagg.workload import ArrivalKind, TraceFormat

MADE_UP = "Made-up workload"
FROM_TRACE = "Workload from a trace"

ArrivalsFlag = Annotated[ArrivalKind | None, typer.Option(help="Default: poisson.", rich_help_panel=MADE_UP)]
BurstinessFlag = Annotated[
    float | None,
    typer.Option(
        help="Of bursts: shape of gamma distributed gaps, below 1 clumps, 1 Poisson, inf even. Default 0.5.",
        rich_help_panel=MADE_UP,
    ),
]
AmplitudeFlag = Annotated[
    float | None,
    typer.Option(help="Of diurnal: 0 to 1 of the mean rate. Default 0.5.", rich_help_panel=MADE_UP),
]
PeriodFlag = Annotated[
    float | None, typer.Option(help="Of diurnal: seconds. Default 86400.", rich_help_panel=MADE_UP)
]
PrefixLenFlag = Annotated[
    int | None, typer.Option(help="Tokens of shared prefix before each prompt.", rich_help_panel=MADE_UP)
]
PrefixGroupsFlag = Annotated[
    int | None,
    typer.Option(help="How many different shared prefixes. Default 1.", rich_help_panel=MADE_UP),
]
DurationFlag = Annotated[
    float | None,
    typer.Option(
        help="Seconds of arrivals: of the trace, or of a made-up workload instead of --num-requests.",
        rich_help_panel=FROM_TRACE,
    ),
]
TraceFlag = Annotated[Path | None, typer.Option(help="Replay this file.", rich_help_panel=FROM_TRACE)]
TraceFormatFlag = Annotated[TraceFormat | None, typer.Option(rich_help_panel=FROM_TRACE)]
TraceStartFlag = Annotated[
    float | None, typer.Option(help="Begin so many seconds into the trace.", rich_help_panel=FROM_TRACE)
]
RateScaleFlag = Annotated[
    float | None, typer.Option(help="Replay so many times as fast.", rich_help_panel=FROM_TRACE)
]
MaxInputLenFlag = Annotated[int | None, typer.Option(help="Cut longer prompts to this.")]
MaxOutputLenFlag = Annotated[int | None, typer.Option(help="Cut longer answers to this.")]
