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
def predict(
    make: type[Prediction],
    accounts: Sequence[AccountFields],
    stale: set[int],
    prefill: int,
    decode: int,
    prefill_depth: int,
    decode_depth: int,
    num_tokens: int,
    max_new_tokens: int,
    priority: int,
    expected_tokens: float,
    now: float,
    lines: tuple[Fit, Fit, Fit],
    /,
) -> Prediction: ...
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

class Board:
    def __init__(
        self, accounts: list[AccountFields], size: int, table: object, block_sizes: object, prices: object, /
    ) -> None: ...
    def write(self, stale: set[int], expected_tokens: float, now: float, /) -> None: ...
    def best(
        self,
        stale: set[int],
        expected_tokens: float,
        now: float,
        num_tokens: float,
        gaps: float,
        first_random: float,
        second_random: float,
        turn: int,
        slo_ttft_s: float | None,
        slo_tpot_s: float | None,
        not_prefill: object,
        not_decode: object,
        slots: object,
        blocks: object,
        /,
    ) -> tuple[int, int, int, int, int]: ...
