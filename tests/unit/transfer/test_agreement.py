"""Which transport a pair uses, for every combination that a cluster can have, and what a refusal says."""

from __future__ import annotations

import pytest

from disagg.errors import KVLostError, LayoutMismatchError
from disagg.transfer.agreement import Device, Side, device_from_proto, transports_for
from disagg.transfer.wire import LAYOUT_VERSION, check_layout, layout_to_proto
from tests.unit.transfer.transfer_support import LAYOUT

CPU = ("shm", "grpc", "nccl", "nixl")
GPU = ("cuda_ipc", "nccl", "nixl")


def side(host: str, device: Device = "cpu", without: str = "") -> Side:
    offered = CPU if device == "cpu" else GPU
    return Side(host, device, [name for name in offered if name != without])


@pytest.mark.parametrize(
    ("wanted", "ours", "theirs", "expected"),
    [
        ("auto", side("a"), side("a"), ("shm", "grpc")),
        ("auto", side("a"), side("b"), ("grpc",)),
        ("auto", side("a", "cuda"), side("a", "cuda"), ("cuda_ipc", "nccl")),
        ("auto", side("a", "cuda"), side("b", "cuda"), ("nccl",)),
        ("auto", side("a", "cuda"), side("a", "cuda", without="cuda_ipc"), ("nccl",)),
        ("shm", side("a"), side("a"), ("shm",)),
        ("shm", side("a", "cuda"), side("a", "cuda"), ("cuda_ipc",)),
        ("grpc", side("a"), side("a"), ("grpc",)),
        ("nccl", side("a"), side("a"), ("nccl",)),
        ("nccl", side("a"), side("b"), ("nccl",)),
        ("nixl", side("a", "cuda"), side("b", "cuda"), ("nixl",)),
    ],
)  # fmt: skip
def test_what_fits_comes_best_first(wanted: str, ours: Side, theirs: Side, expected: tuple[str, ...]) -> None:
    assert transports_for(wanted, ours, theirs) == expected  # type: ignore[arg-type]


def test_auto_never_takes_nixl_by_itself() -> None:
    for ours, theirs in ((side("a"), side("b")), (side("a", "cuda"), side("b", "cuda"))):
        assert "nixl" not in transports_for("auto", ours, theirs)


@pytest.mark.parametrize(
    ("wanted", "ours", "theirs", "words"),
    [
        ("shm", side("a"), side("b"), ("shm", "another host")),
        ("nixl", side("a"), side("a", without="nixl"), ("nixl", "the peer does not offer")),
        ("nixl", side("a", without="nixl"), side("a"), ("nixl", "not offered here")),
        ("nccl", side("a"), side("a", "cuda"), ("nccl", "on cpu here")),
        ("auto", side("a"), side("a", "cuda"), ("shm", "grpc", "on cuda there")),
        ("grpc", side("a", "cuda"), side("a", "cuda"), ("grpc", "not offered here")),
    ],
)
def test_a_refusal_says_why(wanted: str, ours: Side, theirs: Side, words: tuple[str, ...]) -> None:
    with pytest.raises(KVLostError) as caught:
        transports_for(wanted, ours, theirs)  # type: ignore[arg-type]
    for word in (f"kv_transport {wanted}", *words):
        assert word in caught.value.message


def test_another_arrangement_of_bytes_is_refused_by_its_number() -> None:
    theirs = layout_to_proto(LAYOUT)
    check_layout(LAYOUT, theirs)
    theirs.version = LAYOUT_VERSION + 1
    with pytest.raises(
        LayoutMismatchError, match=rf"version: {LAYOUT_VERSION} here, {LAYOUT_VERSION + 1} there"
    ):
        check_layout(LAYOUT, theirs)


def test_an_unknown_device_is_refused() -> None:
    assert (device_from_proto(""), device_from_proto("cuda")) == ("cpu", "cuda")
    with pytest.raises(KVLostError, match="'xpu'"):
        device_from_proto("xpu")
