from disagg.transfer.segment import Blocks

VERSION: int

def stream_rows(
    source: Blocks, source_rows: list[int], target: Blocks, target_rows: list[int], /
) -> None: ...
