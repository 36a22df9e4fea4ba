"""Which decoder computes: native kernels on a CPU, Triton kernels on a GPU, torch wherever neither fits."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from disagg.config import EngineConfig, Kernels, Quantization
from disagg.errors import ConfigError
from disagg.model.config import ModelSpec
from disagg.model.decode_graphs import Capture
from disagg.model.kv_cache import KVCache
from disagg.model.native.decoder import NativeDecoder
from disagg.model.native.library import KernelsUnavailableError
from disagg.model.step import StepInput
from disagg.model.transformer import Transformer

log = logging.getLogger(__name__)


class Decoder(Protocol):
    """A model's weights and the code that computes with them.

    own_threads: computes with threads of its own rather than torch's.
    """

    spec: ModelSpec
    own_threads: bool

    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        """Return float32 logits [S, vocab_size] of step.sample_rows; writes all tokens' KV."""
        ...


@runtime_checkable
class BackgroundDecoder(Decoder, Protocol):
    """A Decoder whose `forward` returns while the device computes.

    drawn: int64 [n] on the device; a token id of -1 - row in a step means drawn[row], so that a step can go
    on from tokens that the host does not know yet.
    """

    drawn: Tensor

    def capture(self, cache: KVCache, max_model_len: int, capture: Capture | None = None) -> None:
        """Capture graphs of decode steps over `cache`, with `capture`, or CUDA's where None."""
        ...


def choose_decoder(
    model: Transformer,
    cache: KVCache,
    config: EngineConfig,
    *,
    max_model_len: int,
    quantization: Quantization | None = None,
) -> Decoder:
    """Return the fastest decoder for the model's device and dtype, or the one that config.kernels names.

    Takes over the weights of `model`. Raises ConfigError where the one that is named, or that a quantization
    needs, can't compute here.
    """
    kernels = config.kernels
    wanted = _best(model) if kernels == "auto" else kernels
    reason = "asked for" if kernels == "torch" else "on a CPU, ranks have nothing faster"
    if wanted == "native":
        try:
            return _native(model, quantization)
        except KernelsUnavailableError as error:
            reason = str(error)
    elif quantization is not None:
        reason = f"{wanted} kernels compute with full weights"
    elif wanted in ("triton", "flashinfer"):
        try:
            return _triton(model, cache, config, max_model_len, flashinfer=wanted == "flashinfer")
        except KernelsUnavailableError as error:
            reason = str(error)
    if quantization is not None:
        raise ConfigError(f"quantization needs the native CPU kernels: {reason}", param="quantization")
    if kernels not in ("auto", "torch"):
        raise ConfigError(f"kernels: {kernels} is not possible here: {reason}", param="kernels")
    log.log(logging.INFO if wanted == "torch" else logging.WARNING, "computing with torch: %s", reason)
    model.pack()
    return model


def _best(model: Transformer) -> Kernels:
    if not _on_cpu(model):
        return "triton"
    # One call computes a whole step there, with no place for other ranks' sums.
    return "native" if model.group is None else "torch"


def _native(model: Transformer, quantization: Quantization | None) -> Decoder:
    weight = model.embed_tokens
    if not _on_cpu(model):
        raise KernelsUnavailableError(f"they compute on CPUs, not on {weight.device.type}")
    if weight.dtype != torch.float32:
        raise KernelsUnavailableError(f"they compute in float32, not in {weight.dtype}")
    decoder = NativeDecoder(model, num_threads=torch.get_num_threads(), weights=quantization or "float32")
    log.info("computing with native CPU kernels, %d threads", decoder.num_threads)
    return decoder


def _triton(
    model: Transformer, cache: KVCache, config: EngineConfig, max_model_len: int, *, flashinfer: bool
) -> Decoder:
    if importlib.util.find_spec("triton") is None:
        raise KernelsUnavailableError("triton is not installed (the gpu extra has it)")
    if _on_cpu(model) and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelsUnavailableError("on a CPU they only run under TRITON_INTERPRET=1, for tests")
    # Only here: importing the kernels imports triton.
    from disagg.model.triton_decoder import TritonDecoder

    decoder = TritonDecoder(
        model,
        block_size=cache.block_size,
        max_model_len=max_model_len,
        max_num_seqs=min(config.max_num_seqs, config.max_num_batched_tokens),
        flashinfer=flashinfer,
    )
    prefill = ", FlashInfer's attention for prompts" if flashinfer else ""
    log.info("computing with Triton kernels%s on %s", prefill, model.embed_tokens.device)
    return decoder


def _on_cpu(model: Transformer) -> bool:
    return model.embed_tokens.device.type == "cpu"
