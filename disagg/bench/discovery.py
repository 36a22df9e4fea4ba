"""What the endpoint says of itself, asked before any load is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from disagg.bench.client import Endpoint
from disagg.bench.failures import BenchError
from disagg.bench.prompts import WORDS

TIMEOUT_S = 10.0

# Words in several spellings, digits and signs: its tokens are the pool that prompts are drawn from.
_SAMPLE = " ".join((*WORDS, *(word.capitalize() for word in WORDS), *"0123456789.,;:!?()+-*/=<>[]{}#&%$"))


@dataclass(frozen=True)
class Tokenizer:
    """What `/tokenize` told."""

    pool: NDArray[np.int64]
    """Ids of ordinary text tokens, without special ones, ascending."""
    tokens_per_word: float
    max_model_len: int | None
    """Most tokens of prompt and answer together."""


def find_model(endpoint: Endpoint, wanted: str | None) -> str:
    """The model to ask for: `wanted`, if it is served, or the only one there is."""
    with _session(endpoint) as session:
        response = _send(session, endpoint, "GET", "/v1/models")
    if response.status_code in (401, 403):
        raise BenchError("--api-key", f"{endpoint.url} answered HTTP {response.status_code} to /v1/models")
    names = _model_names(response)
    if wanted is None:
        if names is None:
            raise BenchError(
                "--model", f"needed: {endpoint.url}/v1/models names none ({response.status_code})"
            )
        if len(names) != 1:
            raise BenchError("--model", f"needed, one of: {', '.join(names) or '(none served)'}")
        return names[0]
    if names is not None and wanted not in names:
        raise BenchError("--model", f"{wanted!r} is not served; there is: {', '.join(names) or '(none)'}")
    return wanted


def find_tokenizer(endpoint: Endpoint, model: str) -> Tokenizer | None:
    """What vLLM's `/tokenize` says, or None where there is no such route."""
    with _session(endpoint) as session:
        words = _tokenize(session, endpoint, model, " ".join(WORDS))
        sample = _tokenize(session, endpoint, model, _SAMPLE)
    if words is None or sample is None:
        return None
    limit = sample.get("max_model_len")
    return Tokenizer(
        pool=np.unique(np.array(sample["tokens"], dtype=np.int64)),
        tokens_per_word=len(words["tokens"]) / len(WORDS),
        max_model_len=limit if type(limit) is int and limit > 0 else None,
    )


def _tokenize(session: httpx.Client, endpoint: Endpoint, model: str, text: str) -> dict[str, Any] | None:
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    response = _send(session, endpoint, "POST", "/tokenize", body)
    answer = _json(response) if response.status_code == 200 else None
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        return None
    return answer


def _model_names(response: httpx.Response) -> list[str] | None:
    answer = _json(response) if response.status_code == 200 else None
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list):
        return None
    return [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model]


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _session(endpoint: Endpoint) -> httpx.Client:
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    # No proxies from the environment: the load itself is not sent through one either.
    return httpx.Client(headers=headers, timeout=TIMEOUT_S, trust_env=False)


def _send(
    session: httpx.Client, endpoint: Endpoint, method: str, path: str, body: dict[str, Any] | None = None
) -> httpx.Response:
    try:
        return session.request(method, endpoint.url + path, json=body)
    except httpx.HTTPError as error:
        raise BenchError(
            "--url", f"cannot reach {endpoint.url}{path}: {error or type(error).__name__}"
        ) from error
