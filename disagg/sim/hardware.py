"""What GPUs can do and what models weigh: the presets that cluster files name, and the formulas on them."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU with its share of the machine around it.

    flops: dense 16-bit FLOP/s. bandwidth: bytes/s of its memory. memory: bytes. interconnect: bytes/s to
    the other GPUs of the machine, one direction. price_per_hour: USD; power_w: watts, machine included.
    """

    flops: float
    bandwidth: float
    memory: float
    interconnect: float
    price_per_hour: float
    power_w: float


# Data sheets for FLOP/s and bytes/s. Prices and powers of A100 and H100: Splitwise (ISCA '24), table 5 and
# the thermal design powers of a DGX, per GPU; the others are list prices of 2025 and only a starting point.
HARDWARE: dict[str, Hardware] = {
    "a100-80gb": Hardware(312e12, 2.039e12, 80 * GIB, 300e9, 2.20, 812.5),
    "h100-80gb": Hardware(989e12, 3.35e12, 80 * GIB, 450e9, 4.76, 1275.0),
    "h100-80gb-pcap": Hardware(989e12, 3.35e12, 80 * GIB, 450e9, 4.76, 892.5),
    "h200-141gb": Hardware(989e12, 4.8e12, 141e9, 450e9, 5.00, 1275.0),
    "b200-180gb": Hardware(2250e12, 8.0e12, 180e9, 900e9, 8.00, 1800.0),
    "l4-24gb": Hardware(121e12, 0.3e12, 24e9, 16e9, 0.80, 120.0),
    "l40s-48gb": Hardware(362e12, 0.864e12, 48e9, 32e9, 1.80, 450.0),
    "mi300x-192gb": Hardware(1307e12, 5.3e12, 192e9, 448e9, 4.50, 1250.0),
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer, as far as its costs go.

    gated_mlp: three matrices (SwiGLU) instead of two. weight_bytes: of the whole checkpoint; 0 computes them.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    gated_mlp: bool = True
    dtype_bytes: float = 2.0
    weight_bytes: float = 0.0

    @property
    def layer_params(self) -> int:
        """Weights of all layers that every token is multiplied with; no embeddings."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp)

    @property
    def head_params(self) -> int:
        """Weights of the output layer, used once for each token that is drawn."""
        return self.hidden_size * self.vocab_size

    @property
    def total_bytes(self) -> float:
        """Bytes of the checkpoint."""
        if self.weight_bytes:
            return self.weight_bytes
        return (self.layer_params + 2 * self.head_params) * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of keys and values of one token over all layers; with GQA only the KV heads count."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes


# bloom-176b's weight_bytes are splitwise-sim's, since its parity depends on them.
MODELS: dict[str, ModelShape] = {
    "bloom-176b": ModelShape(
        70, 14336, 112, 112, 128, 4 * 14336, 250_880, gated_mlp=False, weight_bytes=329e9
    ),
    "llama2-70b": ModelShape(80, 8192, 64, 8, 128, 28_672, 32_000),
    "llama3-8b": ModelShape(32, 4096, 32, 8, 128, 14_336, 128_256),
    "llama3-70b": ModelShape(80, 8192, 64, 8, 128, 28_672, 128_256),
    "qwen2.5-7b": ModelShape(28, 3584, 28, 4, 128, 18_944, 152_064),
    "qwen2.5-32b": ModelShape(64, 5120, 40, 8, 128, 27_648, 152_064),
    "opt-13b": ModelShape(40, 5120, 40, 40, 128, 20_480, 50_272, gated_mlp=False),
    "opt-66b": ModelShape(64, 9216, 72, 72, 128, 36_864, 50_272, gated_mlp=False),
    "opt-175b": ModelShape(96, 12_288, 96, 96, 128, 49_152, 50_272, gated_mlp=False),
}


def kv_token_capacity(model: ModelShape, hardware: Hardware, num_gpus: int, memory_share: float) -> int:
    """Return how many tokens of KV fit beside the weights on `num_gpus` that share the model; may be <= 0."""
    room = hardware.memory * num_gpus * memory_share - model.total_bytes
    return int(room // model.kv_bytes_per_token)
