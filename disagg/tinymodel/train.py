"""Train the bundled model from a seed: ``python -m disagg.tinymodel.train --out DIR --seed 0``.

The training text is made on the fly and every token of it is seen once. Sequences start short, where
the model finds out how to look things up, and end at the whole context, where it learns to do so from
far away. The run is a fixed number of steps, so the result does not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from disagg.tinymodel import data
from disagg.tinymodel.model import ModelShape, TinyLlama, save_checkpoint
from disagg.tinymodel.tokenizer import BOS, IM_END, build_tokenizer, save_tokenizer

IGNORE = -100


@dataclass(frozen=True)
class Phase:
    """A stretch of training: ``steps`` updates on ``rows`` sequences of ``tokens`` tokens.

    The learning rates go linearly from ``start`` to ``end`` times their base values.
    """

    steps: int
    rows: int
    tokens: int
    #: Name of the mix of data, in ``data.MIXES``.
    mix: str
    start: float = 1.0
    end: float = 1.0


#: 4,096 tokens a step.
PHASES = (
    Phase(30, 16, 256, "dense", start=0.02),
    Phase(420, 16, 256, "dense"),
    Phase(40, 4, 1024, "far"),
    Phase(350, 16, 256, "chat"),
    Phase(40, 2, 2048, "far"),
    Phase(300, 16, 256, "chat", 1.0, 0.6),
    Phase(50, 2, 2048, "far", 0.6, 0.5),
    Phase(260, 16, 256, "chat", 0.5, 0.2),
    Phase(60, 2, 2048, "far", 0.2, 0.12),
    Phase(150, 16, 256, "chat", 0.12, 0.02),
)
MUON_LR = 0.012
ADAM_LR = 3e-3
SECONDS_BETWEEN_REPORTS = 20.0


def encode_row(tokenizer: Tokenizer, document: data.Document, length: int) -> tuple[list[int], list[int]]:
    """Token ids and targets of a document, both cut or padded to ``length``.

    Targets that are not supervised are IGNORE.
    """
    ids: list[int] = []
    targets: list[int] = []
    for encoding, (_, supervised) in zip(
        tokenizer.encode_batch([text for text, _ in document]), document, strict=True
    ):
        ids += encoding.ids
        targets += encoding.ids if supervised else [IGNORE] * len(encoding.ids)
    # Position t predicts token t + 1.
    ids, targets = ids[: length + 1], targets[1 : length + 1]
    ids = ids[: len(targets)]
    gap = length - len(ids)
    return ids + [0] * gap, targets + [IGNORE] * gap


def batches(tokenizer: Tokenizer, phase: Phase, rng: Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (ids, targets), each [rows, tokens]."""
    mix = data.MIXES[phase.mix]
    while True:
        documents = [data.training_document(rng, phase.tokens, mix) for _ in range(phase.rows)]
        rows = [encode_row(tokenizer, document, phase.tokens) for document in documents]
        yield torch.tensor([ids for ids, _ in rows]), torch.tensor([targets for _, targets in rows])


def orthogonalize(update: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix to ``update`` [rows, columns], by a Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = update.shape[0] > update.shape[1]
    x: Tensor = (update.T if tall else update) / (update.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for the weight matrices."""

    def __init__(
        self, parameters: list[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix once."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if "buffer" not in state:
                    state["buffer"] = torch.zeros_like(weight)
                buffer = state["buffer"]
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["decay"])
                weight.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model: TinyLlama) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices: list[Tensor] = [p for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    others: list[Tensor] = [p for n, p in model.named_parameters() if not n.endswith("_proj.weight")]
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr=MUON_LR), adam]


def loss_of(model: TinyLlama, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the supervised targets; logits are made only where they count."""
    hidden = model(ids)
    chosen = targets != IGNORE
    return F.cross_entropy(model.logits(hidden[chosen]), targets[chosen])


class Reporter:
    """Prints the smoothed loss, the speed and the time left, every few seconds."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.start = self.last = time.monotonic()
        self.loss = 0.0
        self.count = 0
        self.tokens = 0

    def update(self, step: int, loss: float, tokens: int) -> None:
        """Note one step of ``tokens`` tokens."""
        self.loss += loss
        self.count += 1
        self.tokens += tokens
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_REPORTS and step + 1 < self.steps:
            return
        spent = now - self.start
        left = spent / (step + 1) * (self.steps - step - 1)
        print(
            f"step {step + 1}/{self.steps} loss {self.loss / self.count:.4f} "
            f"{self.tokens / spent:.0f} tokens/s spent {spent:.0f} s left {left:.0f} s",
            flush=True,
        )
        self.last, self.loss, self.count = now, 0.0, 0


class Trainer:
    """Model, optimizers and data stream of one run."""

    def __init__(self, out: Path, seed: int, shape: ModelShape) -> None:
        torch.manual_seed(seed)
        self.out = out
        self.tokenizer = build_tokenizer(data.corpus(seed), shape.vocab_size)
        self.model = TinyLlama(shape)
        self.optimizers = make_optimizers(self.model)
        self.base = [[group["lr"] for group in each.param_groups] for each in self.optimizers]
        self.rng = Random(seed)

    def save(self) -> None:
        """Write the model and its tokenizer to the output directory."""
        eos = [self.tokenizer.token_to_id(token) for token in (IM_END, BOS)]
        save_tokenizer(self.tokenizer, self.out, self.model.shape.max_position_embeddings)
        save_checkpoint(self.model, self.out, [token for token in eos if token is not None])

    def set_learning_rate(self, share: float) -> None:
        """Set every learning rate to ``share`` of its base value."""
        for optimizer, rates in zip(self.optimizers, self.base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share

    def step(self, ids: Tensor, targets: Tensor) -> float:
        """One update on a batch; returns its loss in nats per supervised token."""
        loss = loss_of(self.model, ids, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def run(self, phases: Sequence[Phase], save_every: int) -> None:
        """Train through ``phases``; save at the end and every ``save_every`` steps (0: only at the end)."""
        reporter = Reporter(sum(phase.steps for phase in phases))
        done = 0
        for phase in phases:
            print(f"phase: {phase}", flush=True)
            stream = batches(self.tokenizer, phase, self.rng)
            for step in range(phase.steps):
                self.set_learning_rate(phase.start + (phase.end - phase.start) * step / phase.steps)
                ids, targets = next(stream)
                reporter.update(done, self.step(ids, targets), ids.numel())
                done += 1
                if save_every and done % save_every == 0:
                    self.save()
        self.save()


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory for the model and the tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads; another number rounds differently"
    )
    parser.add_argument("--save-every", type=int, default=0, help="also save every so many steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    trainer = Trainer(args.out, args.seed, ModelShape())
    trainer.run(PHASES, args.save_every)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"done: {parameters} parameters, {math.ceil(time.monotonic() - started)} s, "
        f"CPU time {used.ru_utime:.0f} s user, {used.ru_stime:.0f} s system",
        flush=True,
    )


if __name__ == "__main__":
    main()
