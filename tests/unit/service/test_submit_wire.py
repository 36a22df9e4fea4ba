"""A submission as it crosses the wire."""

from __future__ import annotations

import pytest

from disagg.service import wire
from disagg.types import Request, SamplingParams


@pytest.mark.parametrize("objective", [None, 0.25])
def test_a_request_arrives_as_it_was_sent(objective: float | None) -> None:
    request = Request("r#1", [1, 2, 3], 2, SamplingParams(), priority=-2, slo_ttft_s=objective)
    message = wire.submit_to_proto(request, timeout_s=30.0)
    arrived = wire.request_from_proto(message, now=100.0)
    assert arrived.slo_ttft_s == objective
    assert arrived.deadline == 130.0
    assert (arrived.token_ids, arrived.num_prompt_tokens, arrived.priority) == ([1, 2, 3], 2, -2)
