"""The compiled core of the router, where it is there, and what stands in for it where it is not.

The C sources are built when the package is installed where there is a C compiler. Without them,
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
_VERSION = 5
# Columns of ClusterView's table and classes of length, see disagg.routing.view and disagg.routing.costs.
NUM_COLUMNS, NUM_TURNS = 13, 11


@dataclass(frozen=True, slots=True)
class Core:
    """Who does the router's hot work.

    name: "compiled" or "python". make_table, make_chains: a new table of blocks, a new tree of chains.
    All others: see `_prices.pyi`; None where Python does it.
    """

    name: str
    make_table: Callable[[], BlockTable]
    make_chains: Callable[[], ChainTree]
    price: Callable[..., Any] | None = None
    make_board: Callable[..., _prices.Board] | None = None
    predict: Callable[..., Prediction] | None = None
    follow: Callable[..., tuple[float, float]] | None = None
    make_fit: type[Fit] | None = None
    make_predictor: type[Predictor] | None = None
    open_charge: Callable[..., Charge] | None = None
    move_charge: Callable[..., None] | None = None
    close_charge: Callable[..., None] | None = None
    observe: Callable[..., None] | None = None
    set_prices: Callable[..., None] | None = None


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
        make_board=_prices.Board,
        predict=_prices.predict,
        follow=_prices.follow,
        make_fit=_prices.Fit,
        make_predictor=_prices.Predictor,
        open_charge=_prices.open_charge,
        move_charge=_prices.move_charge,
        close_charge=_prices.close_charge,
        observe=_prices.observe,
        set_prices=_prices.set_prices,
    )


COMPILED = _compiled()
CORE = COMPILED or PYTHON

if TYPE_CHECKING or COMPILED is None:
    from disagg.routing.fields import AccountFields, Charge, CostFields
else:
    from disagg.routing._prices import AccountFields, Charge, CostFields

if TYPE_CHECKING:
    from disagg.routing import _prices
    from disagg.routing.fit import Fit
    from disagg.routing.predictors import Predictor
    from disagg.routing.types import Prediction

__all__ = ["COMPILED", "CORE", "PYTHON", "AccountFields", "Charge", "Core", "CostFields"]
