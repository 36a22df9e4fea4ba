"""FlashInfer in the place of our prefill attention, by a stand-in with its interface that computes in torch.

The stand-in's arguments are those of flashinfer-python 0.7; where that is installed, a test compares them.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from model_support import Driver, make_model, random_tokens, runner_for, save
from torch import Tensor

from disagg.errors import ConfigError
from disagg.model.triton_decoder import TritonDecoder

if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

# One page table over page sizes, and a head dimension that FlashInfer has.
WIDER = {"hidden_size": 128, "num_hidden_layers": 2, "head_dim": 64}


class StandIn:
    """BatchPrefillWithPagedKVCacheWrapper as its documentation has it."""

    made: ClassVar[list[StandIn]] = []

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype is torch.uint8 and kv_layout == "HND"
        self.plans = 0
        self.made.append(self)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        q_data_type: Any = "float16",
    ) -> None:
        given = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert causal and sm_scale and all(tensor.dtype is torch.int32 for tensor in given)
        assert 1 <= int(paged_kv_last_page_len.min()) <= int(paged_kv_last_page_len.max()) <= page_size
        assert int(paged_kv_indptr[-1]) == len(paged_kv_indices)
        self._heads, self._window, self._scale = (num_qo_heads, num_kv_heads), window_left, sm_scale
        self._dtype, self._shape = q_data_type, (head_dim_qk, page_size)
        self._starts, self._page_starts = qo_indptr.tolist(), paged_kv_indptr.tolist()
        self._pages, self._last = paged_kv_indices, paged_kv_last_page_len.tolist()
        self.plans += 1

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
        assert out is not None and q.dtype is self._dtype and q.shape[1:] == (self._heads[0], self._shape[0])
        assert len(q) == self._starts[-1]
        for index, last in enumerate(self._last):
            rows = slice(self._starts[index], self._starts[index + 1])
            pages = self._pages[self._page_starts[index] : self._page_starts[index + 1]].long()
            out[rows] = self._attention(q[rows].float(), pages, last, paged_kv_cache).to(out.dtype)
        return out

    def _attention(self, q: Tensor, pages: Tensor, last: int, cache: tuple[Tensor, Tensor]) -> Tensor:
        length = (len(pages) - 1) * self._shape[1] + last
        group = self._heads[0] // self._heads[1]
        # [pages, Hkv, page_size, D] to [tokens, Hq, D].
        k, v = (
            part[pages].transpose(1, 2).flatten(0, 1)[:length].float().repeat_interleave(group, 1)
            for part in cache
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) * self._scale
        behind = torch.arange(length - len(q), length)[:, None] - torch.arange(length)
        hidden = behind < 0
        if self._window >= 0:
            hidden |= behind > self._window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(StandIn, "made", [])
    module = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=StandIn)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return StandIn


def folder_of(name: str, tmp_path: Path, **more: Any) -> Path:
    return save(make_model(name, **{**WIDER, **more}), tmp_path)


@pytest.mark.parametrize(("name", "num_windows"), [("llama_gqa_tied", 1), ("qwen2_window_tied", 2)])
def test_chunks_over_cached_context_give_our_kernels_logits(
    name: str, num_windows: int, flashinfer: type[StandIn], tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path)
    logits = []
    for kernels in ("triton", "flashinfer"):
        driver = Driver(runner_for(folder, kernels=kernels, dtype="bfloat16"))
        assert isinstance(driver.runner.model, TritonDecoder)
        a, b, c = (driver.add(random_tokens(length, seed=length)) for length in (15, 3, 6))
        driver.step((a, 8), (b, 3))
        rows = [driver.logits]
        b.token_ids[-1] = 7
        # A decode beside chunks, one of them on top of what is cached.
        driver.step((b, 1), (a, 7), (c, 6))
        logits.append(torch.cat([*rows, driver.logits]))
    # bfloat16 keeps three digits, and the kernels round at other places.
    difference = (logits[1] - logits[0]).norm(dim=-1) / logits[0].norm(dim=-1)
    assert difference.max() < 0.02
    assert len(flashinfer.made) == num_windows, "a wrapper for each window"
    assert all(wrapper.plans == 2 for wrapper in flashinfer.made), "one plan a step, whatever the layers"


def test_what_it_can_not_compute_is_refused(flashinfer: type[StandIn], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not in torch\.float32") as error:
        runner_for(folder_of("llama_gqa_tied", tmp_path / "a"), kernels="flashinfer", dtype="float32")
    assert error.value.param == "kernels"
    with pytest.raises(ConfigError, match="no head_dim 32"):
        folder = folder_of("llama_gqa_tied", tmp_path / "b", head_dim=32)
        runner_for(folder, kernels="flashinfer", dtype="bfloat16")


def test_without_it_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match="flashinfer can't be imported"):
        runner_for(folder_of("llama_gqa_tied", tmp_path), kernels="flashinfer", dtype="bfloat16")


def test_the_stand_in_has_the_librarys_arguments() -> None:
    library = pytest.importorskip("flashinfer")
    real = library.BatchPrefillWithPagedKVCacheWrapper
    for method in ("__init__", "plan", "run"):
        ours = set(inspect.signature(getattr(StandIn, method)).parameters)
        assert ours <= set(inspect.signature(getattr(real, method)).parameters), method
