"""Room for blocks on their way between devices: lent in order, and always given back."""

from __future__ import annotations

import asyncio

import pytest

from disagg.errors import KVLostError
from disagg.transfer.staging_rows import StagingRows, halves, staging_blocks


def test_rows_are_neighbours_and_come_back():
    rows = StagingRows(range(4, 10))
    assert rows.take(3) == [4, 5, 6]
    assert rows.take(2) == [7, 8]
    assert rows.take(2) is None and rows.num_free == 1
    rows.give_back([5, 4, 6])
    assert rows.take(4) == [4, 5, 6, 9]
    assert rows.take(0) == []


def test_halves_share_no_row():
    published, pulled = halves(7)
    assert published.take(3) == [0, 1, 2] and pulled.take(4) == [3, 4, 5, 6]


@pytest.mark.parametrize("memory, blocks, expected", [(1000, 50, 10), (1000, 3, 6), (10, 50, 2)])
def test_staging_holds_no_more_than_both_ways_of_a_cache(memory, blocks, expected):
    assert staging_blocks(memory, 100, blocks) == expected


async def test_who_asked_first_is_served_first():
    rows = StagingRows(range(4))
    held = await rows.wait_for(4)
    large = asyncio.create_task(rows.wait_for(3))
    small = asyncio.create_task(rows.wait_for(1))
    await asyncio.sleep(0)
    rows.give_back(held[:2])
    await asyncio.sleep(0)
    # Enough for the small one, which would then always overtake the large one.
    assert not large.done() and not small.done() and rows.take(1) is None
    rows.give_back(held[2:])
    assert (await large, await small) == ([0, 1, 2], [3])


async def test_who_gives_up_waiting_lets_the_next_one_pass():
    rows = StagingRows(range(4))
    held = await rows.wait_for(2)
    large = asyncio.create_task(rows.wait_for(4))
    small = asyncio.create_task(rows.wait_for(2))
    await asyncio.sleep(0)
    large.cancel()
    assert await small == [2, 3]
    rows.give_back([*held, 2, 3])
    assert rows.num_free == 4


async def test_rows_that_came_as_their_taker_left_are_not_lost():
    rows = StagingRows(range(2))
    held = await rows.wait_for(2)
    waiting = asyncio.create_task(rows.wait_for(1))
    await asyncio.sleep(0)
    rows.give_back(held)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert rows.num_free == 2


async def test_more_than_there_is_is_refused_at_once():
    with pytest.raises(KVLostError, match="don't fit"):
        await StagingRows(range(3)).wait_for(4)
