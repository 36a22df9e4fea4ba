"""Workers whose cache no peer can read, as on a GPU: KV passes through host memory on both sides.

The cache is on the CPU here, but everything around it is what a worker on a GPU has.
"""

from __future__ import annotations

import pytest

from disagg.cluster import worker_process
from disagg.config import BUNDLED_MODEL
from disagg.engine.overlap import OverlappedEngine
from disagg.service.tokenizer import Tokenizer
from disagg.transfer.staged import StagedPublisher
from tests.cluster.harness import Cluster, ask, running_cluster

PROMPT = " ".join(str(number) for number in range(1, 80))


@pytest.fixture
def staging(monkeypatch):
    monkeypatch.setattr(worker_process, "stages", lambda device: True)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return Tokenizer(BUNDLED_MODEL).encode(PROMPT)


async def undisturbed(prompts: list[list[int]]) -> list[list[int]]:
    async with running_cluster(prefill=0, decode=0, mixed=1) as colocated:
        return [(await ask(colocated, prompt)).token_ids for prompt in prompts]


def pulled(cluster: Cluster, transport: str) -> float:
    """Return how many pulls the decode worker made by a transport."""
    exposition = cluster.workers["decode-0"].worker._metrics.exposition()
    text = exposition.decode() if isinstance(exposition, bytes) else exposition
    lines = [line for line in text.splitlines() if line.startswith("disagg_kv_transfer_bytes_total{")]
    return sum(float(line.split()[-1]) for line in lines if f'transport="{transport}"' in line)


def all_rows_are_back(cluster: Cluster) -> bool:
    """Whether no worker has a row of its staging memory out."""
    for process in cluster.workers.values():
        for end in (process._staged, process._puller):
            if end is not None and end._rows.num_free != end._rows.capacity:
                return False
    return True


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_tokens_are_those_of_an_undisturbed_request(staging, prompt, transport):
    prompts = [prompt[:count] for count in (1, 16, 17, 64, 100, len(prompt))]
    async with running_cluster({"transfer": {"kv_transport": transport}}) as cluster:
        assert isinstance(cluster.workers["prefill-0"]._staged, StagedPublisher)
        answers = [(await ask(cluster, text)).token_ids for text in prompts]
        again = (await ask(cluster, prompt[:64])).token_ids
        assert pulled(cluster, transport) > 0
        await cluster.wait_idle()
        assert all_rows_are_back(cluster)
    expected = await undisturbed(prompts)
    assert answers == expected and again == expected[3]


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (2, 1),
        pytest.param(1, 2, marks=pytest.mark.slow),
        # More ranks than the model has key heads: two hold each.
        pytest.param(2, 4, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
async def test_ranks_with_memory_of_their_own_hand_over_too(staging, prompt, prefill, decode):
    prompts = [prompt[:count] for count in (1, 17, 64, len(prompt))]
    settings = {
        "prefill": {"tensor_parallel_size": prefill},
        "decode": {"tensor_parallel_size": decode},
    }
    async with running_cluster(settings) as cluster:
        answers = [(await ask(cluster, text)).token_ids for text in prompts]
        assert pulled(cluster, "shm") > 0
        await cluster.wait_idle()
        assert all_rows_are_back(cluster)
    assert answers == await undisturbed(prompts)


async def test_what_does_not_fit_into_staging_memory_is_computed_again(staging, prompt):
    """Room for two blocks on each side: a short prompt passes, a long one does not."""
    block_bytes = 0
    async with running_cluster(prefill=0, decode=0, mixed=1) as cluster:
        block_bytes = cluster.workers["mixed-0"]._segment.block_bytes
    prompts = [prompt[:30], prompt[:100], prompt[40:70]]
    async with running_cluster({"transfer": {"staging_memory": 4 * block_bytes}}) as cluster:
        answers = [(await ask(cluster, text)).token_ids for text in prompts]
        assert pulled(cluster, "shm") == 4 * block_bytes
        await cluster.wait_idle()
        assert all_rows_are_back(cluster)
    assert answers == await undisturbed(prompts)


async def test_an_overlapped_engine_serves_in_a_worker(staging, prompt, monkeypatch):
    """Triton's kernels, in the interpreter: the worker steps ahead of what it knows."""
    monkeypatch.setattr(worker_process, "profile", lambda engine, config: None)
    settings = {
        "engine": {"kernels": "triton", "num_kv_blocks": 16, "max_num_batched_tokens": 8, "max_num_seqs": 2}
    }
    async with running_cluster(settings) as cluster:
        process = cluster.workers["decode-0"]
        assert isinstance(process.worker._engine, OverlappedEngine)
        answer = (await ask(cluster, prompt[:17], max_tokens=3)).token_ids
        assert pulled(cluster, "shm") > 0
        await cluster.wait_idle()
        assert all_rows_are_back(cluster)
    async with running_cluster(prefill=0, decode=0, mixed=1) as colocated:
        assert answer == (await ask(colocated, prompt[:17], max_tokens=3)).token_ids
