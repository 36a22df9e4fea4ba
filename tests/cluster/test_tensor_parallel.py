"""Workers of several ranks: tokens as of one, whatever the degrees of the two sides of a hand-off."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from disagg.config import BUNDLED_MODEL
from disagg.errors import RankLostError
from disagg.service.tokenizer import Tokenizer
from tests.cluster.harness import Cluster, ask, running_cluster

# Around block boundaries (16) and beyond several chunks (64).
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 129, 300)


def of_degrees(prefill: int, decode: int, transport: str = "auto") -> dict[str, Any]:
    return {
        "prefill": {"tensor_parallel_size": prefill},
        "decode": {"tensor_parallel_size": decode},
        "transfer": {"lease_s": 2.0, "kv_transport": transport},
    }


async def answers(cluster: Cluster) -> list[list[int]]:
    """Ask everything twice, so that the second time decode finds prefixes; margins are clear."""
    counting = Tokenizer(BUNDLED_MODEL).encode(" ".join(map(str, range(1, 200))))
    tokens = []
    for _ in range(2):
        for length in LENGTHS:
            tokens.append((await ask(cluster, counting[:length], max_tokens=12)).token_ids)
    await cluster.wait_idle()
    return tokens


@pytest.fixture(scope="module")
def of_one_rank() -> list[list[int]]:
    async def run() -> list[list[int]]:
        async with running_cluster() as cluster:
            return await answers(cluster)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("prefill", "decode", "transport"),
    [
        (1, 2, "shm"),
        (2, 1, "grpc"),
        pytest.param(1, 2, "grpc", marks=pytest.mark.slow),
        pytest.param(2, 1, "shm", marks=pytest.mark.slow),
        pytest.param(2, 4, "shm", marks=pytest.mark.slow),
        pytest.param(2, 4, "grpc", marks=pytest.mark.slow),
        # More ranks than the model has key heads: two hold each.
        pytest.param(4, 2, "shm", marks=pytest.mark.slow),
        pytest.param(4, 2, "grpc", marks=pytest.mark.slow),
    ],
)
async def test_tokens_do_not_depend_on_the_degrees(
    prefill: int, decode: int, transport: str, of_one_rank: list[list[int]]
) -> None:
    async with running_cluster(of_degrees(prefill, decode, transport)) as cluster:
        assert await answers(cluster) == of_one_rank


async def test_a_worker_that_loses_a_rank_ends() -> None:
    async with running_cluster(of_degrees(1, 2)) as cluster:
        process = cluster.workers["decode-0"]
        ranks = process._runner.ranks
        assert ranks is not None
        os.kill(ranks.pids[0], signal.SIGKILL)
        with pytest.raises(RankLostError, match="rank 1 died"):
            await asyncio.wait_for(process.wait(), 20)
