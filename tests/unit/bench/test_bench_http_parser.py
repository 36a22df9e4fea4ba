import pytest

from disagg.bench.failures import StreamFailure
from disagg.bench.http import MAX_HEAD_BYTES, ResponseParser
from disagg.bench.stream import SseDecoder

CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n"
    b"5;ext=1\r\nhello\r\n1\r\n \r\n5\r\nworld\r\n0\r\nX-Trailer: 1\r\n\r\n"
)


def feed(parser: ResponseParser, data: bytes, step: int) -> bytes:
    return b"".join(parser.feed(data[at : at + step]) for at in range(0, len(data), step))


@pytest.mark.parametrize("step", [*range(1, 30), len(CHUNKED)])
def test_chunked_body_in_pieces_of_any_size(step: int) -> None:
    parser = ResponseParser()
    assert feed(parser, CHUNKED, step) == b"hello world"
    assert parser.complete and parser.keep_alive
    assert parser.head is not None and parser.head.status == 200 and parser.head.headers["x-a"] == "b"


@pytest.mark.parametrize("step", [1, 3, 100])
def test_fixed_length(step: int) -> None:
    parser = ResponseParser()
    assert feed(parser, b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nabc", step) == b"abc"
    assert parser.complete


def test_until_close() -> None:
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.1 200 OK\r\n\r\nabc") == b"abc"
    assert not parser.complete
    parser.eof()
    assert parser.complete and not parser.keep_alive


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nsurplus",
    ],
)
def test_connection_is_not_used_again(start: bytes) -> None:
    parser = ResponseParser()
    parser.feed(start)
    assert parser.complete and not parser.keep_alive


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 5_000,
        b"x" * (MAX_HEAD_BYTES + 1),
    ],
)
def test_what_is_not_http_is_refused(data: bytes) -> None:
    with pytest.raises(StreamFailure, match="protocol"):
        ResponseParser().feed(data)


@pytest.mark.parametrize("step", range(1, 12))
def test_events_in_pieces_of_any_size(step: int) -> None:
    data = b": comment\n\ndata: a\n\ndata:b\r\n\r\nid: 1\nevent: error\ndata: c\ndata: d\n\n\ndata: e"
    decoder = SseDecoder()
    found = [e for at in range(0, len(data), step) for e in decoder.feed(data[at : at + step])]
    assert found == [(b"", b"a"), (b"", b"b"), (b"error", b"c\nd")]
    assert decoder.inside_event
