from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from disagg.workload import Diurnal, TraceError, TraceFormat, WorkloadError, read_trace

BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,230,1317,API log\n118,ChatGPT,417,0,417,API log\n"
)


def bailian(timestamp: object = 61.5, prompt: int = 40, ids: tuple[int, ...] = (1, 2, 3)) -> str:
    entry = {"chat_id": 1, "parent_chat_id": -1, "timestamp": timestamp, "input_length": prompt}
    return json.dumps({**entry, "output_length": 7, "type": "text", "turn": 1, "hash_ids": ids}) + "\n"


def test_burstgpt(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(BURSTGPT)
    made = read_trace(path, TraceFormat.BURSTGPT)
    assert [r.arrival_s for r in made] == [0, 40, 113]
    assert [(r.prompt_tokens, r.output_tokens) for r in made] == [(472, 18), (1087, 230), (417, 1)]
    assert [r.arrival_s for r in read_trace(path, TraceFormat.BURSTGPT, start_s=30)] == [10, 83]


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("Request tokens", "Tokens", "Request tokens"),
        ("45,GPT-4", "noon,GPT-4", "Timestamp"),
        ("45,GPT-4", "nan,GPT-4", "Timestamp"),
        ("1087", "many", "Request tokens"),
        (",230,", ",-1,", "Response tokens"),
        ("45,", "4,", "timestamp"),
    ],
)
def test_burstgpt_names_the_field(tmp_path: Path, old: str, new: str, field: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(BURSTGPT.replace(old, new, 1))
    with pytest.raises(TraceError) as error:
        read_trace(path, TraceFormat.BURSTGPT)
    assert error.value.field == field


def test_bailian_counts_seconds_and_blocks_of_16(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(bailian() + bailian(62.0, 33, (1, 2, 9)))
    made = read_trace(path, TraceFormat.BAILIAN)
    assert [r.arrival_s for r in made] == [0, 0.5]
    assert [r.block_tokens for r in made] == [16, 16]
    assert [segment.tokens for segment in made.requests[1].segments()] == [16, 16, 1]
    path.write_text(bailian(prompt=32))
    with pytest.raises(TraceError, match="fill only 2 of 16 tokens"):
        read_trace(path, TraceFormat.BAILIAN)


def test_diurnal_rate_follows_the_sine() -> None:
    times = Diurnal(100.0, 0.8, period_s=100.0).times(20_000, np.random.default_rng(0))
    assert times[0] == 0 and (np.diff(times) >= 0).all()
    assert times[-1] == pytest.approx(200, rel=0.03)
    counts, _ = np.histogram(times, bins=20, range=(0, 200))
    expected = 1000 * (1 + 0.8 * np.sin(2 * np.pi * (np.arange(20) + 0.5) / 10))
    # The last requests come before the last bin is full.
    assert counts[:19] == pytest.approx(expected[:19], rel=0.15, abs=60)


def test_diurnal_checks_its_fields() -> None:
    for field, made in (("amplitude", (1.0, 1.5)), ("period_s", (1.0, 0.5, 0.0)), ("rate_per_s", (0.0,))):
        with pytest.raises(WorkloadError) as error:
            Diurnal(*made)
        assert error.value.field == field
