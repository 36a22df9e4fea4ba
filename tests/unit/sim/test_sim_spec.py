from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sim_support import GPU, SHAPE, TABLE

from disagg.errors import ConfigError
from disagg.sim.costs.roofline import RooflineCost
from disagg.sim.costs.table import TableCost
from disagg.sim.hardware import HARDWARE, MODELS, kv_token_capacity
from disagg.sim.spec import load_spec, parse_spec

POOLS = {"p": {"role": "mixed", "replicas": 1, "hardware": "h100-80gb"}}


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        ({"model": "llama9"}, "model", "no preset 'llama9'"),
        ({"pools": {}}, "pools", "at least 1"),
        ({"pools": {"p": {**POOLS["p"], "role": "boss"}}}, "pools.p.role", "prefill"),
        ({"pools": {"p": {**POOLS["p"], "replicas": -1}}}, "pools.p.replicas", "greater"),
        ({"pools": {"p": {**POOLS["p"], "gpus": 3}}}, "pools.p.gpus", "not permitted"),
        ({"pools": {"p": {**POOLS["p"], "hardware": "h99"}}}, "pools.p.hardware", "known are"),
        ({"pools": {"p": {**POOLS["p"], "replicas": 0}}}, "pools", "no pool has a worker"),
        ({"links": {"bandwidth_gb_s": 0}}, "links.bandwidth_gb_s", "greater than 0"),
        ({"links": {"handoff": "magic"}}, "links.handoff", "serial"),
        ({"cost": {"kind": "table"}}, "cost", "file: table needs one"),
        ({"router": {"policy": "best"}}, "router.policy", "prefix_aware"),
        ({"engine": {"block_size": 0}}, "engine.block_size", "greater"),
        ({"objectives": {"ttft_ms": -1}}, "objectives.ttft_ms", "greater"),
        ({"nonsense": 1}, "nonsense", "not permitted"),
    ],
)
def test_errors_name_the_key(change: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_spec({"model": "llama3-8b", "pools": POOLS, **change})
    assert error.value.param == field
    assert text in error.value.message


def test_pool_stands_over_the_cluster(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(TABLE)
    spec = parse_spec(
        {
            "model": SHAPE,
            "hardware": {"gpu": GPU},
            "engine": {"max_num_seqs": 8, "max_num_batched_tokens": 100},
            "links": {"bandwidth_gb_s": 10},
            "pools": {
                "a": {"role": "prefill", "replicas": 1, "hardware": "gpu"},
                "b": {
                    "role": "decode",
                    "replicas": 1,
                    "hardware": "gpu",
                    "max_num_seqs": 99,
                    "bandwidth_gb_s": 20,
                    "cost": {"kind": "table", "file": str(table), "name": "slow"},
                },
            },
        }
    )
    a, b = spec.pools["a"], spec.pools["b"]
    assert (spec.engine_of(a).max_num_seqs, spec.engine_of(b).max_num_seqs) == (8, 99)
    assert spec.engine_of(b).max_num_batched_tokens == 100
    assert (spec.bandwidth_of(a), spec.bandwidth_of(b)) == (10e9, 20e9)
    assert isinstance(spec.cost_of(a), RooflineCost) and isinstance(spec.cost_of(b), TableCost)
    assert spec.cost_of(b).decode_line(100)[0] == pytest.approx(0.009)


def test_blocks_are_what_the_weights_leave() -> None:
    pools = {"p": {**POOLS["p"], "tensor_parallel_size": 4}}
    spec = parse_spec({"model": "llama3-70b", "pools": pools})
    tokens = kv_token_capacity(MODELS["llama3-70b"], HARDWARE["h100-80gb"], 4, 0.9)
    assert spec.blocks_of("p") == tokens // 16
    with pytest.raises(ConfigError) as error:
        parse_spec({"model": "llama3-70b", "pools": POOLS}).blocks_of("p")
    assert error.value.param == "pools.p.tensor_parallel_size"


def test_cost_files_are_relative_to_the_cluster_file(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TABLE)
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "model: bloom-176b\ncost: {kind: table, file: t.csv}\n"
        "pools: {p: {role: mixed, replicas: 1, hardware: h100-80gb}}\n"
    )
    assert load_spec(path).cost.file == tmp_path / "t.csv"
    with pytest.raises(ConfigError, match="can't read"):
        load_spec(tmp_path / "none.yaml")
