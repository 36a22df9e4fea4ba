"""Splitwise-sim's published figures, from its own table where DISAGG_SHARED says that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sim_support import needs_shared, requests, shared
from splitwise_compat import GIB, JoinShortestQueue, machines, splitwise_spec

from disagg.sim.records import Records
from disagg.sim.simulation import Simulation
from disagg.workload import Workload, read_azure

EXAMPLE = requests((1, 4096, 32), (3, 2048, 8), (4, 2048, 16))
COLOCATED = {"mixed": machines("mixed", 1)}
SPLIT = {"prefill": machines("prefill", 1), "decode": machines("decode", 1, "a100-80gb")}


def simulate(table: Path, pools: dict[str, Any], load: Workload, *, fast: bool = True) -> Records:
    return Simulation(splitwise_spec(table, pools), load, fast=fast, policy=JoinShortestQueue()).run()


@needs_shared
@pytest.mark.parametrize("fast", [True, False])
def test_three_requests_colocated(fast: bool) -> None:
    records = simulate(shared("splitwise-sim", "perf_model.csv"), COLOCATED, EXAMPLE, fast=fast)
    assert [f"{ttft:.5f}" for ttft in records.ttft()] == ["0.64960", "0.25196", "0.25196"]
    assert [f"{e2e:.5f}" for e2e in records.e2e()] == ["1.74474", "0.49925", "0.78187"]


@needs_shared
@pytest.mark.parametrize("fast", [True, False])
def test_three_requests_handed_from_h100_to_a100(fast: bool) -> None:
    records = simulate(shared("splitwise-sim", "perf_model.csv"), SPLIT, EXAMPLE, fast=fast)
    assert [f"{e2e:.5f}" for e2e in records.e2e()] == ["2.19923", "0.62287", "1.00302"]
    assert [f"{seconds:.6f}" for seconds in records.transfer] == ["0.076563", "0.038281", "0.038281"]


def test_three_requests_with_a_table_of_our_own(tmp_path: Path) -> None:
    """The same model, checked by hand where the published table is not at hand."""
    table = tmp_path / "table.csv"
    table.write_text(
        "model,hardware,prompt_size,batch_size,prompt_time,token_time,tensor_parallel\n"
        "bloom-176b,h100-80gb,1000,1,100,30,8\nbloom-176b,h100-80gb,3000,1,400,32,8\n"
        "bloom-176b,a100-80gb,1000,1,200,50,8\nbloom-176b,a100-80gb,3000,1,700,54,8\n"
    )
    prompt_s, token_s, slow_token_s = (0.25, 0.1 + 0.15 * 1.1), 0.030 - 0.999e-3, 0.050 - 1.998e-3
    load = requests((0, 2000, 5), (10, 2100, 2))
    records = simulate(table, COLOCATED, load)
    assert list(records.ttft()) == pytest.approx(prompt_s)
    assert list(records.e2e()) == pytest.approx([prompt_s[0] + 4 * token_s, prompt_s[1] + token_s])
    records = simulate(table, SPLIT, load)
    moved = [tokens * 2 * 70 * 14336 * 2 / (200 * GIB) for tokens in (2000, 2100)]
    assert list(records.transfer) == pytest.approx(moved)
    assert list(records.e2e()) == pytest.approx(
        [prompt_s[0] + moved[0] + 4 * slow_token_s, prompt_s[1] + moved[1] + slow_token_s]
    )


@needs_shared
@pytest.mark.parametrize(
    ("pools", "ttft_ms", "tbt_ms"),
    [
        pytest.param({"mixed": machines("mixed", 40)}, (134, 388, 679), (35.1, 35.5, 38.3), id="colocated"),
        pytest.param(
            {"prefill": machines("prefill", 25), "decode": machines("decode", 15)},
            (132, 385, 658),
            (35.3, 35.8, 37.0),
            id="25 prefill + 15 decode",
        ),
    ],
)
def test_azure_conversation_on_40_machines(
    pools: dict[str, Any], ttft_ms: tuple[float, ...], tbt_ms: tuple[float, ...]
) -> None:
    """Within 3 % at P50, P90 and P99. TBT is splitwise-sim's: decode time over all output tokens."""
    load = read_azure(shared("azure", "AzureLLMInferenceTrace_conv.csv"))
    records = simulate(shared("splitwise-sim", "perf_model.csv"), pools, load)
    tbt = (records.e2e() - records.ttft()) / np.array(records.output_tokens)
    assert list(np.percentile(records.ttft(), (50, 90, 99)) * 1000) == pytest.approx(ttft_ms, rel=0.03)
    assert list(np.percentile(tbt, (50, 90, 99)) * 1000) == pytest.approx(tbt_ms, rel=0.03)
