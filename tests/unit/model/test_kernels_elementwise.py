"""KV store, residual and norm, RoPE and SwiGLU against plain torch, over odd shapes."""

from __future__ import annotations

import pytest
import torch
from kernels_support import DEVICE, FP8, PagedBatch, assert_close

from disagg.model.kernels import reference
from disagg.model.kernels.kv_store import store_kv
from disagg.model.kernels.rms_norm import add_rms_norm
from disagg.model.kernels.rope import apply_rope_
from disagg.model.kernels.swiglu import swiglu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, so that equal NaNs compare equal."""
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize(("head_dim", "num_kv_heads"), [(64, 1), (80, 3), (96, 2), (128, 5), (256, 2)])
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("dtype", [*DTYPES, FP8])
def test_store_kv(head_dim: int, num_kv_heads: int, block_size: int, dtype: torch.dtype) -> None:
    batch = PagedBatch(
        [3 * block_size], num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype
    )
    model_dtype = torch.bfloat16 if dtype is FP8 else dtype
    num_tokens = 7
    qkv = randn(num_tokens, 2 + 2 * num_kv_heads, head_dim, dtype=model_dtype)
    k, v = qkv[:, 2 : 2 + num_kv_heads], qkv[:, 2 + num_kv_heads :]
    slots = torch.randperm(batch.blocks.shape[0] * block_size, generator=batch.generator)[:num_tokens]
    slots[[1, 4]] = -1
    expected = batch.blocks.clone()
    # Scales that are not powers of two, and small enough that some values saturate.
    scales = {"k_scale": 0.003, "v_scale": 0.3} if dtype is FP8 else {}
    reference.store_kv(k, v, expected[:, 1], slots, **scales)
    store_kv(k, v, batch.kv, slots.to(DEVICE), **scales)
    assert not torch.equal(bits(expected[:, 1]), bits(expected[:, 0]))
    assert torch.equal(bits(batch.blocks), bits(expected)), "bits unlike torch's, or in another slot"


def test_store_kv_rounds_to_fp8_as_torch_does() -> None:
    """All halves between neighbouring values, subnormals, zeros of both signs, and far too large ones."""
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    every = every[every.isfinite()].sort().values
    ties = (every[1:] + every[:-1]) / 2
    values = torch.cat([every, ties, ties * 1.0001, ties * 0.9999, torch.tensor([1e-9, 449.0, 464.0, -1e30])])
    values = torch.nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 1, 64).to(DEVICE)
    kv = torch.zeros(4, 2, 1, 16, 64, device=DEVICE).to(FP8)
    expected = kv.clone()
    slots = torch.arange(len(values), device=DEVICE)
    store_kv(values, -values, kv, slots)
    reference.store_kv(values, -values, expected, slots)
    # By value: a zero's sign may differ.
    assert torch.equal(kv.float(), expected.float())


@pytest.mark.parametrize("size", [1, 64, 80, 1000, 2048, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_rms_norm(size: int, dtype: torch.dtype, with_residual: bool) -> None:
    # Rows are further apart than their length, as in a slice.
    x = randn(5, size + 16, dtype=dtype, seed=1)[:, :size]
    residual = randn(5, size + 32, dtype=dtype, seed=2)[:, :size] * 3 if with_residual else None
    weight = randn(size, dtype=dtype, seed=3)
    expected, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    out = add_rms_norm(x, residual, weight, 1e-5)
    assert_close(out, expected)
    if residual is not None:
        assert_close(residual, total)


def test_add_rms_norm_may_write_over_its_input_and_keeps_tiny_rows_finite() -> None:
    x = torch.zeros(3, 100, device=DEVICE)
    x[1] = 1e-20
    x[2] = randn(100)
    expected, _ = reference.add_rms_norm(x, None, torch.ones(100, device=DEVICE), 1e-6)
    assert add_rms_norm(x, None, torch.ones(100, device=DEVICE), 1e-6, out=x) is x
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (80, 32)]
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (7, 1), (16, 3), (40, 5)])
def test_apply_rope(head_dim: int, rotary_dim: int, num_heads: int, num_kv_heads: int) -> None:
    dtype = torch.bfloat16 if num_heads == 7 else torch.float32
    positions = torch.tensor([0, 5, 5, 37, 1, 63], device=DEVICE)
    angles = torch.arange(64)[:, None] / 10 ** torch.linspace(0, 2, rotary_dim // 2)
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    qkv = randn(len(positions), num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    before = qkv.clone()
    split = num_heads + num_kv_heads
    apply_rope_(qkv[:, :num_heads], qkv[:, num_heads:split], cos, sin, positions)
    assert_close(qkv[:, :split], reference.apply_rope(before[:, :split], cos, sin, positions))
    assert torch.equal(qkv[:, split:], before[:, split:]), "values were touched"
    assert torch.equal(qkv[:, :, rotary_dim:], before[:, :, rotary_dim:]), "unrotated dimensions were touched"


@pytest.mark.parametrize("size", [1, 8, 100, 1024, 2500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(size: int, dtype: torch.dtype) -> None:
    x = randn(3, 2 * size + 8, dtype=dtype)[:, : 2 * size] * 4
    assert_close(swiglu(x), reference.swiglu(x))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy; inf is right
def test_swiglu_of_large_gates_stays_finite() -> None:
    x = torch.tensor([[-1e4, 1e4, -90.0, 90.0, 2.0, 3.0, 4.0, 5.0]], device=DEVICE)
    torch.testing.assert_close(swiglu(x), reference.swiglu(x))


def test_empty_batches() -> None:
    assert swiglu(randn(0, 8)).shape == (0, 4)
    assert add_rms_norm(randn(0, 8), None, randn(8), 1e-6).shape == (0, 8)
    table, none = randn(4, 4), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    apply_rope_(randn(0, 2, 8), randn(0, 1, 8), table, table, none)
    store_kv(randn(0, 1, 16), randn(0, 1, 16), torch.zeros(1, 2, 1, 16, 16, device=DEVICE), none)
