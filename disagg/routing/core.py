"""The compiled core of the router, where it is there, and what stands in for it where it is not.

`_blocks.c` and `_prices.c` are built when the package is installed where there is a C compiler. Without them,
or with DISAGG_ROUTER_CORE=python in the environment, Python does the same: slower, with the same results.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from disagg.routing.block_table import SHARDS, BlockTable, PythonBlockTable
from disagg.routing.chains import ChainTree, PythonChainTree

# Of the C sources; a build of other ones is not used.
_VERSION = 3
# Columns of ClusterView's table and classes of length, see disagg.routing.view and disagg.routing.costs.
NUM_COLUMNS, NUM_TURNS = 13, 11


@dataclass(frozen=True, slots=True)
class Core:
    """Who does the router's hot work.

    name: "compiled" or "python". make_table, make_chains: a new table of blocks, a new tree of chains.
    price, write_rows, best, predict, follow: see `_prices.pyi`; None where Python does it.
    """

    name: str
    make_table: Callable[[], BlockTable]
    make_chains: Callable[[], ChainTree]
    price: Callable[..., Any] | None = None
    write_rows: Callable[..., None] | None = None
    best: Callable[..., tuple[int, int, int, int]] | None = None
    predict: Callable[..., tuple[float, float, float, float, float, float]] | None = None
    follow: Callable[..., tuple[float, float]] | None = None


PYTHON = Core("python", PythonBlockTable, PythonChainTree)


def _compiled() -> Core | None:
    if os.environ.get("DISAGG_ROUTER_CORE") == "python":
        return None
    try:
        from disagg.routing import _blocks, _prices
    except ImportError:
        return None
    if (_blocks.VERSION, _prices.VERSION, _blocks.SHARDS) != (_VERSION, _VERSION, SHARDS):
        return None
    if _prices.NUM_ROWS != NUM_COLUMNS + NUM_TURNS:
        return None
    return Core(
        "compiled",
        _blocks.BlockTable,
        _blocks.ChainTree,
        price=_prices.price,
        write_rows=_prices.write_rows,
        best=_prices.best,
        predict=_prices.predict,
        follow=_prices.follow,
    )


COMPILED = _compiled()
CORE = COMPILED or PYTHON

if TYPE_CHECKING or COMPILED is None:
    from disagg.routing.fields import AccountFields, CostFields
else:
    from disagg.routing._prices import AccountFields, CostFields

__all__ = ["COMPILED", "CORE", "PYTHON", "AccountFields", "Core", "CostFields"]
