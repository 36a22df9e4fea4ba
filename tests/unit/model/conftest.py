from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from model_support import KERNELS, make_model, save
from transformers import PreTrainedModel

from disagg.model.native.library import KernelsUnavailableError, load_library

Checkpoint = tuple[PreTrainedModel, Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "torch"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with every backend that computes on a CPU."""
    if request.param == "native":
        try:
            load_library()
        except KernelsUnavailableError as error:
            pytest.skip(str(error))
    monkeypatch.setitem(KERNELS, "default", request.param)
    return request.param


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Return a case's random model and the folder it is saved in; each is made once."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            model = make_model(name)
            made[name] = model, save(model, tmp_path_factory.mktemp(name))
        return made[name]

    return get
