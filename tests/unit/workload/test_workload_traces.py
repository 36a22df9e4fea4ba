import json
from pathlib import Path

import pytest

from disagg.workload import TraceError, TraceFormat, WorkloadError, read_azure, read_mooncake, read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
AZURE_2023 = HEADER + (
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319600,3180,8\r\n"
    "2023-11-16 18:17:10.9799600,110,0"
)
AZURE_2024 = HEADER + "2024-05-10 00:00:00.009930+00:00,2162,5\r\n2024-05-10 00:00:01+00:00,2399,6\r\n"


@pytest.fixture
def write(tmp_path: Path):  # type: ignore[no-untyped-def]
    def put(text: str) -> Path:
        path = tmp_path / "trace"
        path.write_bytes(text.encode())
        return path

    return put


def line(timestamp: object = 0, prompt: object = 1000, output: object = 5, ids: object = (1, 2)) -> str:
    entry = {"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": ids}
    return json.dumps(entry) + "\n"


def test_azure_2023(write) -> None:  # type: ignore[no-untyped-def]
    made = read_azure(write(AZURE_2023))
    assert [r.arrival_s for r in made] == pytest.approx([0, 0.052, 7.0])
    # An answer of 0 tokens is read as 1.
    assert [(r.prompt_tokens, r.output_tokens) for r in made] == [(4808, 10), (3180, 8), (110, 1)]
    assert made.name == "trace"


def test_azure_2024_has_time_zones(write) -> None:  # type: ignore[no-untyped-def]
    assert [r.arrival_s for r in read_azure(write(AZURE_2024))] == pytest.approx([0, 0.99007])


def test_azure_columns_by_name(write) -> None:  # type: ignore[no-untyped-def]
    path = write("\ufeffGeneratedTokens,x,ContextTokens,TIMESTAMP\n5,?,7,2024-05-10 00:00:00\n\n")
    (request,) = read_azure(path)
    assert (request.prompt_tokens, request.output_tokens) == (7, 5)


def test_mooncake(write) -> None:  # type: ignore[no-untyped-def]
    made = read_mooncake(write(line(3000) + "\n" + line(3000.5, 513, 6, [1, 9]) + line(27000, ids=[])))
    assert [r.arrival_s for r in made] == [0, 0.0005, 24]
    assert [r.block_ids for r in made] == [(1, 2), (1, 9), ()]
    assert made.requests[1].shared_tokens == 513


def test_window_and_limit(write) -> None:  # type: ignore[no-untyped-def]
    path = write("".join(line(1000 * i) for i in range(10)))
    made = read_trace(path, TraceFormat.MOONCAKE, start_s=2, duration_s=3)
    assert [r.arrival_s for r in made] == [0, 1, 2]
    assert len(read_trace(path, TraceFormat.MOONCAKE, limit=4)) == 4


def test_reading_stops_where_the_window_ends(write) -> None:  # type: ignore[no-untyped-def]
    path = write(line(0) + line(5000) + "not json")
    assert len(read_mooncake(path, duration_s=5)) == 1
    with pytest.raises(TraceError):
        read_mooncake(path)


@pytest.mark.parametrize(
    ("text", "at", "field"),
    [
        ("", 1, "TIMESTAMP"),
        ("TIMESTAMP,ContextTokens\n", 1, "GeneratedTokens"),
        (HEADER + "2023-11-16 18:17:03,1\n", 2, "columns"),
        (HEADER + "yesterday,1,2\n", 2, "TIMESTAMP"),
        (HEADER + "2023-11-16 18:17:03,many,2\n", 2, "ContextTokens"),
        (HEADER + "2023-11-16 18:17:03,1,2\n2023-11-16 18:17:04,1,-2\n", 3, "GeneratedTokens"),
        (HEADER + "2023-11-16 18:17:03,1,2\n2023-11-16 18:17:02,1,2\n", 3, "timestamp"),
        (HEADER + "2023-11-16 18:17:03,1,2\n2023-11-16 18:17:04+00:00,1,2\n", 3, "TIMESTAMP"),
    ],
)
def test_azure_error_names_line_and_field(write, text: str, at: int, field: str) -> None:  # type: ignore[no-untyped-def]
    path = write(text)
    with pytest.raises(TraceError) as caught:
        read_azure(path)
    assert (caught.value.path, caught.value.line, caught.value.field) == (path, at, field)
    assert f"{path}:{at}: {field}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", "column 2"),
        ("[]", "line"),
        ('{"timestamp": 1}', "input_length"),
        (line(timestamp="now"), "timestamp"),
        (line(timestamp=True), "timestamp"),
        (line(timestamp=float("nan")), "timestamp"),
        (line(prompt=-1), "input_length"),
        (line(prompt=1.5), "input_length"),
        (line(output=None), "output_length"),
        (line(ids="ab"), "hash_ids"),
        (line(ids=[1, -2]), "hash_ids"),
        (line(ids=[1, 2, 3]), "hash_ids"),
    ],
)
def test_mooncake_error_names_line_and_field(write, text: str, field: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TraceError) as caught:
        read_mooncake(write(line() + text))
    assert (caught.value.line, caught.value.field) == (2, field)


def test_missing_binary_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_azure(tmp_path / "none.csv")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not UTF-8"):
        read_mooncake(binary)
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    with pytest.raises(TraceError, match="no request"):
        read_mooncake(empty)


@pytest.mark.parametrize(("start", "duration", "field"), [(-1, None, "start_s"), (0, 0, "duration_s")])
def test_impossible_window(write, start: float, duration: float | None, field: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(WorkloadError) as caught:
        read_mooncake(write(line()), start, duration)
    assert caught.value.field == field
