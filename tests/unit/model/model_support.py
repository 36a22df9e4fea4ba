"""Random checkpoints of each family, and a hand that drives a ModelRunner without an engine."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from disagg.config import EngineConfig, Kernels
from disagg.engine.runner import Batch, ScheduledSequence
from disagg.engine.sequence import Sequence
from disagg.model.runner import ModelRunner, load_runner
from disagg.types import Request, SampledToken, SamplingParams

VOCAB = 97
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
MSCALE = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 16.0}
# Corrections that fall between two dimensions, so that rounding them shows.
YARN_BETWEEN = {**YARN, "rope_theta": 100.0, "original_max_position_embeddings": 64}
WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}

CASES = {
    "llama_mha": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama_gqa_tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama_mqa_biases": (LlamaConfig, {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": (LlamaConfig, {"head_dim": 20}),
    "llama_linear": (LlamaConfig, {"rope_parameters": LINEAR}),
    "llama_llama3": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama_yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "llama_yarn_between": (LlamaConfig, {"rope_parameters": YARN_BETWEEN, "head_dim": 32}),
    "llama_yarn_mscale": (LlamaConfig, {"rope_parameters": MSCALE}),
    "llama_dynamic": (LlamaConfig, {"rope_parameters": DYNAMIC}),
    "mistral_no_window": (MistralConfig, {"sliding_window": None}),
    "mistral_short_window": (MistralConfig, {"sliding_window": 5}),
    "mistral_long_window": (MistralConfig, {"sliding_window": 100}),
    "qwen2": (Qwen2Config, {}),
    "qwen2_window_tied": (Qwen2Config, {**WINDOWED, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3_biases_window": (Qwen3Config, {**WINDOWED, "head_dim": 8, "attention_bias": True}),
}


def make_model(name: str, *, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """Return a random model in which every parameter matters, biases and norms included."""
    config_class, changes = CASES[name]
    config = config_class(**{**SMALL, **changes, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            scale, centre = (0.3, 1.0) if "norm" in key else (0.15, 0.0)
            weight.copy_(torch.randn_like(weight) * scale + centre)
    return model


def save(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, tokens: SequenceOf[int]) -> torch.Tensor:
    """Return transformers' logits [len(tokens), vocab] in float32."""
    return model(torch.tensor([list(tokens)])).logits[0].float()


#: What runner_for computes with where a test does not say; tests of every backend change it.
KERNELS: dict[str, Kernels] = {"default": "auto"}


def runner_for(
    folder: Path,
    *,
    block_size: int = 4,
    num_blocks: int = 64,
    kernels: Kernels | None = None,
    num_threads: int = 1,
    **options: object,
) -> ModelRunner:
    config = EngineConfig(
        block_size=block_size, num_kv_blocks=num_blocks, kernels=kernels or KERNELS["default"]
    )
    return load_runner(folder, config, num_threads=num_threads, **options)


def random_tokens(count: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    return random.Random(seed).choices(range(3, vocab), k=count)


class Driver:
    """Does an engine's part by hand: hands out shuffled blocks, runs items, appends what was drawn."""

    def __init__(self, runner: ModelRunner, seed: int = 0) -> None:
        self.runner = runner
        self.free = list(range(runner.num_blocks))
        random.Random(seed).shuffle(self.free)
        self.logits = torch.empty(0)
        forward = runner.model.forward

        def recorded(*args: object) -> torch.Tensor:
            result = forward(*args)
            self.logits = result.clone()  # the sampler overwrites it
            return result

        runner.model.forward = recorded

    def add(
        self, tokens: SequenceOf[int], params: SamplingParams | None = None, prompt: int | None = None
    ) -> Sequence:
        params = SamplingParams(temperature=0.0) if params is None else params
        prompt = len(tokens) if prompt is None else prompt
        return Sequence(Request("r", tuple(tokens), prompt, params), now=0.0)

    def step(self, *work: tuple[Sequence, int]) -> list[SampledToken | None]:
        for seq, count in work:
            needed = -(-(seq.num_computed_tokens + count) // self.runner.layout.block_size)
            while len(seq.block_table) < needed:
                seq.block_table.append(self.free.pop())
        drawn = self.runner.execute(Batch(tuple(ScheduledSequence(seq, count) for seq, count in work)))
        for (seq, count), token in zip(work, drawn, strict=True):
            seq.num_computed_tokens += count
            if token is not None:
                seq.token_ids.append(token.token_id)
        return drawn

    def prefill(self, seq: Sequence) -> SampledToken:
        token = self.step((seq, seq.num_uncomputed_tokens))[0]
        assert token is not None
        return token

    def generate(self, seq: Sequence, count: int) -> list[SampledToken]:
        """Return the next `count` tokens of a sequence."""
        return [self.prefill(seq) for _ in range(count)]

    def forced(self, seq: Sequence, token: int) -> None:
        """Replace the last drawn token, to follow a given text."""
        seq.token_ids[-1] = token
