from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from frontend_fakes import FakeBackend

from disagg.frontend.http import create_app


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def http(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    """The app without a network: for what doesn't depend on streaming or connections."""
    transport = httpx.ASGITransport(create_app(backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
