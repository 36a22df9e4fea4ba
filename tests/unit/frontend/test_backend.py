"""The model's own sampling defaults, and what a request's usage adds up to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from frontend_fakes import FakeBackend

from disagg.errors import ConfigError, DisaggError
from disagg.frontend.backend import SamplingDefaults, load_sampling_defaults
from disagg.frontend.text_generation import GenerationGroup, TextGeneration, Usage, stream_all, total_usage
from disagg.service.generation import GenerationRequest
from disagg.types import FinishReason, SamplingParams


def test_defaults_of_a_model(tmp_path: Path) -> None:
    assert load_sampling_defaults(tmp_path) == SamplingDefaults()
    config = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert load_sampling_defaults(tmp_path) == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": -1}', '{"top_p": "x"}'])
def test_defaults_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match="generation_config"):
        load_sampling_defaults(tmp_path)


def generation(backend: FakeBackend, name: str, prompt: list[int]) -> TextGeneration:
    params = SamplingParams(max_tokens=50, seed=0)
    return TextGeneration(backend, GenerationRequest(name, prompt, params))


async def test_usage_of_prompts_and_choices(backend: FakeBackend) -> None:
    """Two prompts with two choices each; of each prompt's choices the one that found least in the cache."""
    cached = iter([0, 16, 32, 32])
    backend.generator.script = lambda _request: _remember(backend, next(cached))
    prompts = [[65] * 40, [66] * 50]
    generations = [generation(backend, f"{i}", prompt) for i, prompt in enumerate(prompts * 2)]
    generations = [generations[i] for i in (0, 2, 1, 3)]
    for each in generations:
        _ = [delta async for _, delta in stream_all([each])]
    assert total_usage(generations, 2) == Usage(90, 8, 32)


def _remember(backend: FakeBackend, cached: int) -> list[Any]:
    backend.generator.cached_tokens = cached
    return [[65], [2]]


async def test_aborting_some_of_many(backend: FakeBackend) -> None:
    """A generation that has ended keeps its own end."""
    scripts = {"a": [[65], [2]], "b": [[66], "hang"]}
    backend.generator.script = lambda request: scripts[request.request_id]
    group = GenerationGroup([generation(backend, name, [65]) for name in scripts])
    ends = {}
    async for index, delta in group.stream():
        if delta.finish_reason is not None:
            ends[index] = delta.finish_reason
        if index == 0 and 0 in ends:
            await backend.generator.until(lambda: "a" in backend.generator.finished)
            group.abort()
    assert ends == {0: FinishReason.STOP, 1: FinishReason.ABORT}
    assert backend.generator.closed == ["b"]


async def test_error_of_one_ends_all(backend: FakeBackend) -> None:
    scripts = {"a": [[65], "hang"], "b": [[66], DisaggError("broken")]}
    backend.generator.script = lambda request: scripts[request.request_id]
    group = GenerationGroup([generation(backend, name, [65]) for name in scripts])
    with pytest.raises(DisaggError, match="broken"):
        async for _ in group.stream():
            pass
    assert backend.generator.closed == ["a"] and not backend.generator.running
