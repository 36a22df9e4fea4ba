"""NativeDecoder: computes steps with the C++ kernels, from the weights of a Transformer."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
import torch
from torch import Tensor

from disagg.model.kv_cache import KVCache
from disagg.model.layers import Linear
from disagg.model.native import library
from disagg.model.native.packing import Kind, PackedWeight, join, pack
from disagg.model.step import StepInput
from disagg.model.transformer import DecoderLayer, Transformer


class NativeDecoder:
    """A decoder on the CPU in float32, with weights in float32, int8 or int4.

    Takes the weights out of `model`, which can't compute any more, so that they are held once.
    Raises KernelsUnavailableError where the kernels can't be built here, before it takes any.
    """

    own_threads = True

    def __init__(self, model: Transformer, *, num_threads: int, weights: Kind = "float32") -> None:
        self._library = library.load_library()
        self.spec = model.spec
        self.num_threads = num_threads
        self._rotary = model.rotary
        # Everything that the structures point to.
        self._tensors: list[Tensor] = []
        self._packed: list[PackedWeight] = []
        self._layers = (library.Layer * self.spec.num_layers)(
            *(self._layer(layer, weights) for layer in model.layers)
        )
        decoder = self._library.disagg_decoder_create(ctypes.byref(self._model(model, weights)), num_threads)
        if not decoder:
            raise MemoryError(f"no memory or no threads for a decoder of {num_threads} threads")
        self._decoder = ctypes.c_void_p(decoder)
        weakref.finalize(self, self._library.disagg_decoder_destroy, self._decoder)

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights, in bytes."""
        packed = sum(weight.num_bytes for weight in self._packed)
        return packed + sum(tensor.nbytes for tensor in self._tensors)

    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        """Return float32 logits [S, vocab_size] of step.sample_rows; writes all tokens' KV."""
        cos, sin = self._rotary(torch.from_numpy(step.positions))
        chunk_of = np.repeat(
            np.arange(step.num_chunks, dtype=np.int32), np.diff(step.query_start).astype(np.int64)
        )
        logits = torch.empty(len(step.sample_rows), self._lm_head.n)
        arguments = library.Step(
            num_tokens=len(step.token_ids),
            num_chunks=step.num_chunks,
            num_samples=len(step.sample_rows),
            token_ids=step.token_ids.ctypes.data,
            positions=step.positions.ctypes.data,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            chunk_of=chunk_of.ctypes.data,
            first_row=step.query_start.ctypes.data,
            table=step.block_tables.ctypes.data,
            table_start=step.table_start.ctypes.data,
            sample_rows=step.sample_rows.ctypes.data,
            logits=logits.data_ptr(),
        )
        where = library.Cache(cache.blocks.data_ptr(), cache.blocks.stride(0), cache.block_size)
        # ctypes lets go of the interpreter lock for the whole step.
        if self._library.disagg_decoder_forward(self._decoder, ctypes.byref(where), ctypes.byref(arguments)):
            raise MemoryError(f"no memory for a step of {len(step.token_ids)} tokens")
        return logits[:, : self.spec.vocab_size]

    def take_phase_seconds(self) -> dict[str, float]:
        """Return where the steps since the last call spent their time, as the first thread saw it."""
        seconds = (ctypes.c_double * len(library.PHASES))()
        self._library.disagg_decoder_seconds(self._decoder, seconds)
        return dict(zip(library.PHASES, seconds, strict=True))

    def _model(self, model: Transformer, weights: Kind) -> library.Model:
        spec = self.spec
        # An int4 output layer costs more accuracy than its bytes are worth.
        self._lm_head = self._keep(_packed(model.lm_head, "int8" if weights == "int4" else weights))
        tied = spec.tie_word_embeddings
        embedding = None if tied else self._pointer(model.embed_tokens)
        model.embed_tokens = torch.empty(0)
        return library.Model(
            num_layers=spec.num_layers,
            hidden=spec.hidden_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            intermediate=spec.intermediate_size,
            vocab=spec.vocab_size,
            eps=spec.rms_norm_eps,
            layers=self._layers,
            norm=self._pointer(model.norm.weight),
            embedding=embedding,
            lm_head=self._lm_head.struct(),
        )

    def _layer(self, layer: DecoderLayer, weights: Kind) -> library.Layer:
        gate_up = layer.gate_up_proj
        # Gate and up each start at a panel, so that one thread has both of an output.
        gate_up.weight = join(list(gate_up.weight.chunk(2)))
        if gate_up.bias is not None:
            gate_up.bias = join([part[:, None] for part in gate_up.bias.chunk(2)])[:, 0]
        return library.Layer(
            qkv=self._keep(_packed(layer.qkv_proj, weights)).struct(),
            o=self._keep(_packed(layer.o_proj, weights)).struct(),
            gate_up=self._keep(_packed(gate_up, weights)).struct(),
            down=self._keep(_packed(layer.down_proj, weights)).struct(),
            input_norm=self._pointer(layer.input_norm.weight),
            mlp_norm=self._pointer(layer.mlp_norm.weight),
            q_norm=None if layer.q_norm is None else self._pointer(layer.q_norm.weight),
            k_norm=None if layer.k_norm is None else self._pointer(layer.k_norm.weight),
            window=layer.window or 0,
        )

    def _keep(self, weight: PackedWeight) -> PackedWeight:
        self._packed.append(weight)
        return weight

    def _pointer(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._tensors.append(tensor)
        return tensor.data_ptr()


def _packed(linear: Linear, kind: Kind) -> PackedWeight:
    """Pack a layer's weight and let go of the plain one."""
    packed = pack(linear.weight, linear.bias, kind)
    linear.weight = torch.empty(0)
    return packed
