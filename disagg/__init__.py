"""disagg: LLM serving with prefill and decode in separate pools of Ray actors.

    from disagg import LLM, SamplingParams

runs a model in this process, without Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg.offline.llm import LLM
    from disagg.offline.outputs import CompletionOutput, RequestOutput
    from disagg.types import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "disagg.offline.llm",
    "CompletionOutput": "disagg.offline.outputs",
    "RequestOutput": "disagg.offline.outputs",
    "SamplingParams": "disagg.types",
}


def __getattr__(name: str) -> object:
    # On demand: importing the package must not load torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
