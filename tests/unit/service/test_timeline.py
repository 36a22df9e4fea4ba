"""Where a request's time went."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from disagg.service.timeline import Attempt, Timeline


def handed_off() -> Timeline:
    """Arrived at 10; placed at 10.1; first token 10.8 after 0.5 s of prefill; KV at 11.0; ended 12."""
    attempt = Attempt(
        asked=10.05,
        placed=10.1,
        prefill_worker="prefill-0",
        decode_worker="decode-0",
        prefill_s=0.5,
        first_output=10.8,
        handed_off=10.8,
        kv_ready=11.0,
        ended=12.0,
    )
    return Timeline(
        arrived=10.0,
        attempts=[attempt],
        first_token=10.8,
        second_token=11.1,
        last_token=12.0,
        finished=12.0,
        num_output_tokens=10,
    )


def test_parts_add_up_to_both_what_the_client_waited_for_and_all_of_it() -> None:
    parts = handed_off().parts()
    assert parts is not None
    assert parts.frontend == pytest.approx(0.05)
    assert (parts.queue, parts.prefill) == (pytest.approx(0.3), pytest.approx(0.5))
    assert (parts.kv_transfer, parts.decode) == (pytest.approx(0.2), pytest.approx(1.0))
    assert parts.first_decode == pytest.approx(0.1)
    assert parts.ttft == pytest.approx(0.8)
    assert parts.e2e == pytest.approx(2.0)
    assert parts.ttft + parts.kv_transfer + parts.first_decode == pytest.approx(1.1)


def test_a_request_of_one_token_has_no_first_decode_step() -> None:
    timeline = handed_off()
    timeline.second_token = timeline.attempts[0].handed_off = timeline.attempts[0].kv_ready = None
    timeline.finished = timeline.first_token
    parts = timeline.parts()
    assert parts is not None and parts.first_decode is None
    assert (parts.kv_transfer, parts.decode) == (0.0, 0.0)


def test_no_parts_before_the_first_token_or_the_end() -> None:
    assert Timeline().parts() is None
    timeline = handed_off()
    timeline.finished = None
    assert timeline.parts() is None


def test_a_resume_keeps_the_sum_and_counts_both_transfers() -> None:
    timeline = handed_off()
    timeline.attempts[0].ended, timeline.attempts[0].lost = 11.5, "decode-0"
    timeline.attempts.append(
        Attempt(11.5, 11.5, "prefill-0", "decode-1", prefill_s=9.0, handed_off=11.6, kv_ready=11.9)
    )
    parts = timeline.parts()
    assert parts is not None
    assert parts.prefill == pytest.approx(0.5)
    assert parts.kv_transfer == pytest.approx(0.5)
    assert parts.first_decode == pytest.approx(0.1)
    assert parts.e2e == pytest.approx(2.0)


def test_a_worker_that_counts_more_than_passed_here_can_not_make_a_part_negative() -> None:
    timeline = handed_off()
    timeline.attempts[0].prefill_s = 99.0
    timeline.attempts[0].kv_ready = 99.0
    parts = timeline.parts()
    assert parts is not None
    assert min(asdict(parts).values()) >= 0
    assert parts.ttft == pytest.approx(0.8)
    assert parts.e2e == pytest.approx(2.0)
