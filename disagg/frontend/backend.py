"""What HTTP and gRPC need of the process they run in, and the model's own sampling defaults."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from disagg.config import FrontendConfig
from disagg.errors import ConfigError, InvalidRequestError
from disagg.frontend.running import RunningRequests
from disagg.frontend.shedding import Shedding
from disagg.service.generation import Generator
from disagg.service.tokenizer import Tokenizer
from disagg.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether requests can be served, and if not, why."""

    ok: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Used where a request leaves a field out: those of generation_config.json, else OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        try:
            SamplingParams(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
            )
        except (InvalidRequestError, TypeError) as error:
            raise ConfigError(f"generation_config.json: {error}", param="model") from None


class Backend(Protocol):
    """One model behind a front end.

    max_model_len: prompt and output tokens together. vocab_size: ids that a prompt may hold are below it.
    ready: cheap to ask, since probes do so every second. metrics: Prometheus text exposition of the whole
    cluster. running: requests that clients may abort by id. shedding: stops a flood at the door. abort: at
    whichever front end runs it; False if none does. status: what `disagg status --json` prints. dashboard:
    what the page /dashboard draws.
    """

    @property
    def generator(self) -> Generator: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def model_name(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> Sequence[int]: ...
    @property
    def version(self) -> str: ...
    @property
    def config(self) -> FrontendConfig: ...
    @property
    def sampling_defaults(self) -> SamplingDefaults: ...

    @property
    def running(self) -> RunningRequests: ...
    @property
    def shedding(self) -> Shedding: ...

    async def ready(self) -> Readiness: ...
    async def abort(self, request_id: str) -> bool: ...
    async def metrics(self) -> bytes: ...
    async def status(self) -> dict[str, Any]: ...
    async def dashboard(self) -> dict[str, Any]: ...


def load_sampling_defaults(folder: Path) -> SamplingDefaults:
    """Read generation_config.json, if there is one. Raises ConfigError where it can't be used."""
    path = folder / "generation_config.json"
    if not path.exists():
        return SamplingDefaults()
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {path}: {error}", param="model") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object", param="model")
    names = SamplingDefaults.__dataclass_fields__
    return SamplingDefaults(**{name: config[name] for name in names if config.get(name) is not None})
