"""What travels on a bulk stream, byte by byte. Pure: nothing here touches a socket.

    puller                                          owner
      hello     magic, nonce ──────────────────►
                ◄────────────── nonce, proof        of the secret, by this worker and incarnation
      proof     of the secret ─────────────────►
      request   magic, length, PullRequest ────►    for as many pulls as the connection lives
                ◄──── header, blocks ... header (END or REFUSED)

Everything has a size that the receiver knows before it reads: a header is 20 bytes, the blocks behind it are
as many as it says, at most as many as the puller still waits for, of the size in the agreed layout.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
import zlib
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from disagg.errors import KVLostError
from disagg.transfer.calls import DamagedKVError
from disagg.v1 import worker_pb2

_MAGIC = b"KV"
_VERSION = 1
# magic, version, kind, first block, count, checksum of the blocks, CRC-32 of all before
_HEADER = struct.Struct("<2sBBIIII")
HEADER_BYTES = _HEADER.size
_GUARDED = HEADER_BYTES - 4

# magic, version, zero, length of the message
_REQUEST = struct.Struct("<2sBBI")
REQUEST_HEAD_BYTES = _REQUEST.size
# Three ids of 256 characters, four bytes each in UTF-8, the key, and room.
MAX_REQUEST_BYTES = 4096

NONCE_BYTES = 16
PROOF_BYTES = 32
_HELLO = b"disagg-kv-bulk-1"
HELLO_BYTES = len(_HELLO) + NONCE_BYTES
CHALLENGE_BYTES = NONCE_BYTES + PROOF_BYTES


class FrameKind(enum.IntEnum):
    """DATA: blocks follow. END: all were sent. REFUSED: no lease (any more); nothing follows."""

    DATA = 1
    END = 2
    REFUSED = 3


_KINDS = {kind.value: kind for kind in FrameKind}


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame's header. first_block: position within the handle's blocks. count: blocks that follow; in an
    END, blocks that were sent in all."""

    kind: FrameKind
    first_block: int = 0
    count: int = 0
    checksum: int = 0


def encode_frame(frame: Frame) -> bytes:
    head = _HEADER.pack(_MAGIC, _VERSION, frame.kind, frame.first_block, frame.count, frame.checksum, 0)
    guarded = head[:_GUARDED]
    return guarded + struct.pack("<I", zlib.crc32(guarded))


def decode_frame(data: bytes | bytearray) -> Frame:
    """Raises DamagedKVError for anything but a header as `encode_frame` makes it."""
    if len(data) != HEADER_BYTES:
        raise DamagedKVError(f"a frame's header has {len(data)} bytes instead of {HEADER_BYTES}")
    magic, version, kind, first_block, count, checksum, guard = _HEADER.unpack(data)
    if guard != zlib.crc32(bytes(data[:_GUARDED])):
        raise DamagedKVError("a frame's header failed its checksum")
    if (magic, version) != (_MAGIC, _VERSION) or kind not in _KINDS:
        raise DamagedKVError("a frame is of no kind that is known here")
    frame = Frame(_KINDS[kind], first_block, count, checksum)
    if frame.kind is not FrameKind.DATA and frame != Frame(frame.kind, count=_said(frame)):
        raise DamagedKVError("a frame says what its kind has no use for")
    return frame


def _said(frame: Frame) -> int:
    return frame.count if frame.kind is FrameKind.END else 0


def encode_request(request: worker_pb2.PullRequest) -> bytes:
    data = request.SerializeToString()
    return _REQUEST.pack(_MAGIC, _VERSION, 0, len(data)) + data


def request_length(head: bytes | bytearray) -> int:
    """Return how many bytes follow a request's head. Raises KVLostError for what is no such head."""
    magic, version, zero, length = _REQUEST.unpack(head)
    if (magic, version, zero) != (_MAGIC, _VERSION, 0) or length > MAX_REQUEST_BYTES:
        raise KVLostError("what came is no pull request")
    return int(length)


def decode_request(data: bytes | bytearray) -> worker_pb2.PullRequest:
    """Raises KVLostError where the bytes are no such message."""
    try:
        return worker_pb2.PullRequest.FromString(bytes(data))
    except DecodeError:
        raise KVLostError("what came is no pull request") from None


# -- who is there ----------------------------------------------------------------------------------------


def encode_hello(nonce: bytes) -> bytes:
    return _HELLO + nonce


def decode_hello(data: bytes | bytearray) -> bytes:
    """Return the puller's nonce. Raises KVLostError for who speaks something else."""
    if len(data) != HELLO_BYTES or data[: len(_HELLO)] != _HELLO:
        raise KVLostError("what came is no greeting of this protocol")
    return bytes(data[len(_HELLO) :])


def proof(side: str, secret: str, owner: tuple[str, str], nonces: bytes) -> bytes:
    """Return what only a member of the cluster can say: HMAC over both nonces and who is meant.

    side: "owner" or "puller", so that neither can be answered with its own words. owner: worker_id and
    incarnation of the publishing worker. nonces: the puller's, then the owner's.
    """
    parts = [side.encode(), *(part.encode() for part in owner), nonces]
    text = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    return hmac.new(secret.encode(), text, hashlib.sha256).digest()
