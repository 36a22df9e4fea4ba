"""Torch: model families, paged KV cache, attention, sampler, weights, and the runner that joins them."""
