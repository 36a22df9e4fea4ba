from collections.abc import Sequence

from disagg.routing.fields import AccountFields as AccountFields
from disagg.routing.fields import Charge as Charge
from disagg.routing.fields import CostFields as CostFields
from disagg.routing.fit import Fit as Fit
from disagg.routing.predictors import Level as Level
from disagg.routing.predictors import Predictor as Predictor
from disagg.routing.types import PlacementRequest, Prediction
from disagg.types import WorkerLoad

VERSION: int
NUM_ROWS: int

def price(account: AccountFields, expected_tokens: float, now: float, /) -> CostFields: ...
def write_rows(
    accounts: list[AccountFields],
    slots: set[int],
    expected_tokens: float,
    now: float,
    table: object,
    size: int,
    /,
) -> None: ...
def best(
    size: int,
    table: object,
    block_sizes: object,
    not_prefill: object,
    not_decode: object,
    prices: object,
    slots: object,
    blocks: object,
    num_tokens: float,
    turn: int,
    gaps: float,
    first_random: float,
    second_random: float,
    /,
) -> tuple[int, int, int, int]: ...
def predict(
    prefill: AccountFields,
    decode: AccountFields,
    num_tokens: float,
    uncached: float,
    missing: float,
    turn: int,
    gaps: float,
    expected_tokens: float,
    /,
) -> tuple[float, float, float, float, float, float]: ...
def follow(
    level: float,
    spread: float,
    coefficients: tuple[float, float, float],
    x1: float,
    x2: float,
    seconds: float,
    /,
) -> tuple[float, float]: ...
def open_charge(
    accounts: Sequence[AccountFields],
    request: PlacementRequest,
    prefill: int,
    decode: int,
    prefill_depth: int,
    decode_depth: int,
    number: int,
    now: float,
    expected_tokens: float,
    prediction: Prediction | None,
    /,
) -> Charge: ...
def move_charge(accounts: Sequence[AccountFields], charge: Charge, /) -> None: ...
def close_charge(accounts: Sequence[AccountFields], charge: Charge, /) -> None: ...
def observe(account: AccountFields, load: WorkerLoad, upto: int, /) -> None: ...
def set_prices(costs: CostFields, predictor: Predictor, /) -> None: ...
