"""A checkpoint's weights, or one rank's shard of them, and the decoder that computes with them."""

from __future__ import annotations

import torch

from disagg.config import EngineConfig, Quantization
from disagg.model.config import ModelSpec
from disagg.model.decoders import choose_decoder
from disagg.model.device_loading import Fitted, fit
from disagg.model.kv_cache import KVCache
from disagg.model.parallel import RankGroup
from disagg.model.transformer import Transformer
from disagg.types import KVLayout


def load(
    spec: ModelSpec,
    engine_config: EngineConfig,
    cache_layout: KVLayout,
    group: RankGroup | None,
    device: torch.device,
    *,
    max_model_len: int | None,
    quantization: Quantization | None = None,
    kv_cache: KVCache | None = None,
) -> Fitted:
    """Load the shard of a rank of `group`, or the whole model where None.

    kv_cache: what to compute over, which holds a sequence of max_model_len tokens; where None, one that fits
    the device is made, and max_model_len is what was asked for. Raises ConfigError, see load_weights and fit.
    """
    with torch.inference_mode():
        model = Transformer(spec, dtype=getattr(torch, cache_layout.dtype), device=device, group=group)
        model.load()
        if kv_cache is None:
            return fit(
                model, engine_config, cache_layout, quantization=quantization, max_model_len=max_model_len
            )
        longest = spec.limit_model_len(max_model_len)
        decoder = choose_decoder(
            model, kv_cache, engine_config, max_model_len=longest, quantization=quantization
        )
    return Fitted(decoder, kv_cache, longest)
