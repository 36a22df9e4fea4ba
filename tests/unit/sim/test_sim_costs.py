from __future__ import annotations

import json
from pathlib import Path

import pytest
from sim_support import TABLE, needs_shared, shared

from disagg.errors import ConfigError
from disagg.sim.costs.base import Chunk, CostModel
from disagg.sim.costs.distserve import load_distserve
from disagg.sim.costs.profile import ProfileCost, load_profile
from disagg.sim.costs.roofline import RooflineCost
from disagg.sim.costs.table import load_table
from disagg.sim.hardware import HARDWARE, MODELS, kv_token_capacity


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(TABLE)
    return path


def prompt(*tokens: int) -> list[Chunk]:
    return [Chunk(count, 0) for count in tokens]


# -- table ---------------------------------------------------------------------------------------------


def test_table_interpolates_medians_over_tokens_in_the_batch(table: Path) -> None:
    cost = load_table(table, "m", "fast", 1)
    assert cost.step_s(prompt(100), 0, 0) == pytest.approx(0.011)
    assert cost.step_s(prompt(150), 0, 0) == pytest.approx(0.016)
    assert cost.step_s(prompt(60, 90), 0, 0) == pytest.approx(0.016)
    assert cost.step_s(prompt(300), 0, 0) == pytest.approx(0.041)


def test_table_goes_on_beyond_its_ends(table: Path) -> None:
    cost = load_table(table, "m", "fast", 1)
    assert cost.step_s(prompt(500), 0, 0) == pytest.approx(0.081)
    assert cost.step_s(prompt(50), 0, 0) == pytest.approx(0.006)
    assert cost.step_s([], 1, 12345) == pytest.approx(0.005 - 99 * 0.000005)


def test_table_mixed_batch_costs_a_tenth_more(table: Path) -> None:
    cost = load_table(table, "m", "fast", 1)
    assert cost.step_s(prompt(140), 10, 999) == pytest.approx(1.1 * 0.016)


def test_table_prices_a_step_over_the_limit_as_batches_in_turn(table: Path) -> None:
    cost = load_table(table, "m", "fast", 1, batch_tokens=150)
    assert cost.step_s(prompt(100, 50, 200), 0, 0) == pytest.approx(0.016 + 0.021)
    # The decodes find no room beside the prompt of 200, but beside that of 100.
    assert cost.step_s(prompt(200), 5, 0) == pytest.approx(0.021)
    assert cost.step_s(prompt(200, 100), 50, 0) == pytest.approx(0.021 + 1.1 * 0.016)


@pytest.mark.parametrize(
    ("model", "hardware", "degree", "text"),
    [
        ("x", "fast", 1, "m on fast (TP 1)"),
        ("m", "x", 1, "m on slow"),
        ("m", "fast", 2, "tensor_parallel_size 2"),
    ],
)
def test_table_names_what_it_has(table: Path, model: str, hardware: str, degree: int, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_table(table, model, hardware, degree)
    assert text in error.value.message


def test_table_names_the_column_and_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(TABLE.replace("prompt_time", "time"))
    with pytest.raises(ConfigError, match="no column prompt_time"):
        load_table(path, "m", "fast", 1)
    path.write_text(TABLE.replace("m,fast,200,1,8,21", "m,fast,200,1,8,soon"))
    with pytest.raises(ConfigError, match=r"t.csv:5: prompt_time must be a number, got 'soon'"):
        load_table(path, "m", "fast", 1)
    with pytest.raises(ConfigError, match="can't read"):
        load_table(tmp_path / "missing.csv", "m", "fast", 1)


# -- DistServe -----------------------------------------------------------------------------------------

COEFFICIENTS = {
    "org/m": {
        "2": {
            "decoding_large_small_bs_threshold": 4,
            "prefill": [10, 0.1, 0.001],
            "decoding_smallbs": [5, 0.01, 0.5],
            "decoding_largebs": [3, 0.02, 1.0],
        }
    }
}


@pytest.fixture
def coefficients(tmp_path: Path) -> Path:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(COEFFICIENTS))
    return path


def test_distserve_form(coefficients: Path) -> None:
    cost = load_distserve(coefficients, "m", 2)
    squares = 100**2 + 50**2
    assert cost.step_s(prompt(100, 50), 0, 0) == pytest.approx((10 + 0.1 * 150 + 0.001 * squares) / 1000)
    assert cost.step_s([], 3, 700) == pytest.approx((5 + 0.01 * 700 + 0.5 * 3) / 1000)
    assert cost.step_s([], 4, 700) == pytest.approx((3 + 0.02 * 700 + 1.0 * 4) / 1000)


def test_distserve_chunks_of_a_prompt_add_up_to_it(coefficients: Path) -> None:
    cost = load_distserve(coefficients, "org/m", 2)
    whole = cost.step_s([Chunk(100, 0)], 0, 0)
    parts = cost.step_s([Chunk(60, 0)], 0, 0) + cost.step_s([Chunk(40, 60)], 0, 0)
    assert parts - 0.010 == pytest.approx(whole)


def test_distserve_names_what_is_missing(coefficients: Path) -> None:
    with pytest.raises(ConfigError, match="no model n; it has org/m"):
        load_distserve(coefficients, "n", 2)
    with pytest.raises(ConfigError, match="no tensor_parallel_size 1 for org/m; it has 2"):
        load_distserve(coefficients, "m", 1)
    coefficients.write_text(json.dumps({"m": {"1": {**COEFFICIENTS["org/m"]["2"], "prefill": [1, 2]}}}))
    with pytest.raises(ConfigError, match="prefill must be a list of three numbers"):
        load_distserve(coefficients, "m", 1)
    coefficients.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_distserve(coefficients, "m", 1)


# -- roofline ------------------------------------------------------------------------------------------


def test_roofline_small_decode_reads_every_weight_once() -> None:
    model, gpu = MODELS["llama3-8b"], HARDWARE["h100-80gb"]
    cost = RooflineCost(model, gpu, flops_efficiency=1, bandwidth_efficiency=1, step_overhead_s=0)
    weights = (model.layer_params + model.head_params) * 2
    assert cost.step_s([], 1, 0) == pytest.approx(weights / gpu.bandwidth)


def test_roofline_long_prefill_is_bound_by_arithmetic() -> None:
    model, gpu = MODELS["llama3-8b"], HARDWARE["h100-80gb"]
    cost = RooflineCost(model, gpu, flops_efficiency=1, bandwidth_efficiency=1, step_overhead_s=0)
    pairs = 4096 * 4097 / 2
    flops = 2 * model.layer_params * 4096 + 4 * 32 * 32 * 128 * pairs
    head = model.head_params * 2 / gpu.bandwidth  # one row: memory bound
    assert cost.step_s(prompt(4096), 0, 0) == pytest.approx(flops / gpu.flops + head)


def test_roofline_chunked_attention_pays_for_the_context() -> None:
    cost = RooflineCost(MODELS["llama3-8b"], HARDWARE["h100-80gb"])
    assert cost.step_s([Chunk(512, 16_000)], 0, 0) > 1.2 * cost.step_s([Chunk(512, 0)], 0, 0)


def test_gqa_makes_context_cheaper() -> None:
    llama, opt = MODELS["llama3-70b"], MODELS["opt-66b"]
    assert llama.kv_bytes_per_token == 2 * 80 * 8 * 128 * 2
    assert opt.kv_bytes_per_token == 2 * 64 * 72 * 128 * 2
    slopes = [RooflineCost(model, HARDWARE["h100-80gb"], 4).decode_line(8)[1] for model in (llama, opt)]
    assert slopes[1] == pytest.approx(slopes[0] * opt.kv_bytes_per_token / llama.kv_bytes_per_token)


def test_tensor_parallelism_is_faster_and_never_free() -> None:
    one, four = (RooflineCost(MODELS["llama3-8b"], HARDWARE["h100-80gb"], degree) for degree in (1, 4))
    for step in ((prompt(4096), 0, 0), (prompt(), 64, 64_000)):
        ratio = one.step_s(*step) / four.step_s(*step)
        assert 1 < ratio < 4


def test_capacity_is_what_the_weights_leave() -> None:
    model, gpu = MODELS["llama3-8b"], HARDWARE["h100-80gb"]
    tokens = kv_token_capacity(model, gpu, 1, 0.9)
    assert tokens == int((0.9 * gpu.memory - model.total_bytes) // model.kv_bytes_per_token)
    assert 15e9 < model.total_bytes < 17e9
    assert kv_token_capacity(MODELS["llama3-70b"], gpu, 1, 0.9) < 0


# -- profile -------------------------------------------------------------------------------------------


def test_profile_form(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(
        '{"prefill": {"a": 0.01, "b": 1e-4, "c": 1e-7}, "decode": {"a": 0.005, "b": 1e-3, "c": 1e-6}}'
    )
    cost = load_profile(path)
    assert cost.step_s([Chunk(100, 50)], 0, 0) == pytest.approx(0.01 + 0.01 + 1e-7 * 100 * 100)
    assert cost.step_s([], 3, 1000) == pytest.approx(0.005 + 0.003 + 0.001)
    mixed = cost.step_s([Chunk(100, 50)], 3, 1000)
    assert mixed == pytest.approx(0.01 + 0.01 + 0.001 + 0.003 + 0.001)


def test_profile_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"prefill": {"a": 0.01, "b": 1e-4}}')
    with pytest.raises(ConfigError, match=r"no key prefill\.c"):
        load_profile(path)
    path.write_text('{"prefill": {"a": -1, "b": 1, "c": 0}, "decode": {"a": 1, "b": 0, "c": 0}}')
    with pytest.raises(ConfigError, match="prefill: a, b and c must not be negative"):
        load_profile(path)
    path.write_text('{"prefill": {"a": true, "b": 1, "c": 0}, "decode": {"a": 1, "b": 0, "c": 0}}')
    with pytest.raises(ConfigError, match=r"prefill\.a must be a number, got True"):
        load_profile(path)


# -- all of them ---------------------------------------------------------------------------------------


def test_decodes_cost_a_line_in_their_context(table: Path, coefficients: Path) -> None:
    models: list[CostModel] = [
        load_table(table, "m", "slow", 1),
        load_distserve(coefficients, "m", 2),
        RooflineCost(MODELS["llama3-8b"], HARDWARE["l4-24gb"]),
        ProfileCost((0.01, 1e-4, 1e-7), (0.005, 1e-3, 1e-6)),
    ]
    for cost in models:
        for num_decodes in (1, 3, 4, 100):
            fixed, slope = cost.decode_line(num_decodes)
            for context in (0, 17, 50_000):
                assert cost.step_s([], num_decodes, context) == pytest.approx(fixed + slope * context)


@needs_shared
def test_published_files_are_read() -> None:
    file = shared("splitwise-sim", "perf_model.csv")
    for hardware in ("a100-80gb", "h100-80gb", "h100-80gb-pcap"):
        assert load_table(file, "bloom-176b", hardware, 8).step_s(prompt(1024), 0, 0) > 0.05
    cost = load_distserve(shared("distserve", "profiler-a100-80g.distserve.json"), "opt-13b", 1)
    milliseconds = 18.10254647486372 + 0.1019122572698738 * 512 + 7.122264314252114e-06 * 512**2
    assert cost.step_s(prompt(512), 0, 0) == pytest.approx(milliseconds / 1000)


def test_roofline_without_decode_context() -> None:
    model, hardware = MODELS["llama3-8b"], HARDWARE["h100-80gb"]
    flat, real = RooflineCost(model, hardware, decode_context=False), RooflineCost(model, hardware)
    assert flat.step_s((), 8, 100_000) == flat.step_s((), 8, 8) < real.step_s((), 8, 8)
    assert real.step_s((), 8, 100_000) > 1.3 * flat.step_s((), 8, 100_000)
