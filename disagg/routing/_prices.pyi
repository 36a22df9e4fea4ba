from disagg.routing.fields import AccountFields as AccountFields
from disagg.routing.fields import CostFields as CostFields

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
