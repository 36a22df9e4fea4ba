"""What benchmarks of a whole cluster share: a checkpoint of a named shape, `disagg serve`, its client.

The cluster is the one that users run: a process each for worker, router and front end, the proxy, Ray's own.
All of them and the client share this machine's cores; each worker's compute threads have cores of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tokenizers
import yaml
from engine import SHAPES, make_checkpoint

from disagg.bench.client import StreamRequest
from disagg.cluster.launch import free_port
from disagg.config import BUNDLED_MODEL

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0
# Ids below are special in most checkpoints.
FIRST_PLAIN_ID = 3
BUNDLED = "bundled"


@dataclass(frozen=True)
class LocalCluster:
    """A running `disagg serve`. pid: its first process, whose descendants are all the others."""

    url: str
    log: Path
    vocab_size: int
    pid: int

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.url}/status", timeout=20, trust_env=False).json()
        return answer

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", timeout=20, trust_env=False).text


@contextlib.contextmanager
def checkpoint(shape: str) -> Iterator[Path]:
    """A folder with a checkpoint: the bundled model, or random weights of a shape of benchmarks/engine.py."""
    if shape == BUNDLED:
        yield BUNDLED_MODEL
        return
    with tempfile.TemporaryDirectory(prefix="disagg-bench-") as name:
        folder = Path(name)
        make_checkpoint(SHAPES[shape], folder)
        _write_tokenizer(folder, int(SHAPES[shape]["vocab_size"]))
        yield folder


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One word per id, so that every token has a text of its own and every step shows in the stream."""
    vocab = {f"w{index}": index for index in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(BUNDLED_MODEL / "generation_config.json", folder)


@contextlib.contextmanager
def serving(model: Path, settings: Mapping[str, Any]) -> Iterator[LocalCluster]:
    """Run `disagg serve` with these settings until the block ends. Raises RuntimeError with its log."""
    port = free_port()
    front = {"port": port, "grpc_port": free_port()}
    path = None if model == BUNDLED_MODEL else str(model)
    with tempfile.TemporaryDirectory(prefix="disagg-bench-") as name:
        config, log = Path(name) / "config.yaml", Path(name) / "serve.log"
        config.write_text(yaml.safe_dump({**settings, "model": {"path": path}, "frontend": front}))
        command = [sys.executable, "-m", "disagg.cli.main", "serve", "--config", str(config)]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        try:
            _wait_ready(process, log)
            vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
            yield LocalCluster(f"http://127.0.0.1:{port}", log, vocab_size, process.pid)
        finally:
            _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not re.search(r"^ready in \d", log.read_text(), re.M):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"disagg serve did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    if process.poll() is None:
        process.kill()
        process.wait()


class PromptSource:
    """Prompts of random ids, no two of which share a prefix."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(seed)

    def request(self, prompt_tokens: int, output_tokens: int, **fields: Any) -> StreamRequest:
        """Return a completion request that ends after exactly `output_tokens`."""
        ids = self._rng.integers(FIRST_PLAIN_ID, self._vocab_size, prompt_tokens).tolist()
        body = {
            "prompt": ids,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **fields,
        }
        return StreamRequest(
            path="/v1/completions",
            body=json.dumps(body, separators=(",", ":")).encode(),
            prompt_tokens=prompt_tokens,
            expected_tokens=output_tokens,
        )
