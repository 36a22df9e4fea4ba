"""Blocks that lie beyond 2**31 elements: offsets in 32 bits would wrap into other memory.

Nothing but the pages that are touched is ever resident.
"""

from __future__ import annotations

import pytest
import torch
from kernels_support import DEVICE, assert_close

from disagg.model.kernels import reference
from disagg.model.kernels.block_copy import gather_blocks, scatter_blocks
from disagg.model.kernels.decode_attention import decode_attention
from disagg.model.kernels.kv_store import store_kv
from disagg.model.kernels.prefill_attention import prefill_attention

BLOCK_STRIDE = 1 << 30
HEAD_DIM, BLOCK_SIZE = 64, 16


@pytest.fixture(scope="module")
def kv() -> torch.Tensor:
    """One layer of a cache of three blocks of 1 Gi elements each, fp8: the third starts at 2**31."""
    rows = 2 * BLOCK_SIZE * HEAD_DIM
    storage = torch.empty(2 * BLOCK_STRIDE + rows, dtype=torch.uint8, device=DEVICE)
    strides = (BLOCK_STRIDE, rows // 2, rows // 2, HEAD_DIM, 1)
    view = storage.as_strided((3, 2, 1, BLOCK_SIZE, HEAD_DIM), strides)
    view.zero_()
    return view.view(torch.float8_e4m3fn)


def test_store_then_attend(kv: torch.Tensor) -> None:
    num_tokens = 20
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(num_tokens, 1, HEAD_DIM, generator=generator).to(DEVICE) for _ in range(3))
    tables = torch.tensor([[2, 1]], dtype=torch.int32, device=DEVICE)
    slots = torch.arange(num_tokens, device=DEVICE)
    slots = torch.where(slots < BLOCK_SIZE, 2 * BLOCK_SIZE + slots, slots)
    store_kv(k, v, kv, slots)
    stored = reference.quantize(k[:BLOCK_SIZE, 0], 1.0)
    assert torch.equal(kv[2, 0, 0].float(), stored.float())
    lens = torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, num_tokens], dtype=torch.int32, device=DEVICE)
    expected = reference.prefill_attention(q, kv, tables, starts, lens, scale=0.125)
    out = prefill_attention(q, kv, tables, starts, lens, scale=0.125, max_query_len=num_tokens)
    assert_close(out, expected)
    assert_close(decode_attention(q[-1:], kv, tables, lens, scale=0.125, max_context=64), expected[-1:])


def test_copy() -> None:
    block_bytes = 1 << 15
    last = (1 << 31) // block_bytes + 1
    blocks = torch.empty(last + 1, block_bytes, dtype=torch.uint8, device=DEVICE)
    new = torch.randint(0, 256, (1, block_bytes), dtype=torch.uint8).to(DEVICE)
    ids = torch.tensor([last], dtype=torch.int32, device=DEVICE)
    # As bytes, since the offset is counted in words: one byte off in length makes words bytes.
    odd = blocks.view(-1)[: (last + 1) * (block_bytes - 1)].view(last + 1, block_bytes - 1)
    for target, data in ((blocks, new), (odd, new[:, 1:].contiguous())):
        scatter_blocks(data, target, ids)
        assert torch.equal(target[last], data[0])
        staging = torch.zeros_like(data)
        gather_blocks(target, ids, staging)
        assert torch.equal(staging, data)
