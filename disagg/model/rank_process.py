"""The process of a rank other than 0: loads its shard and computes the steps that rank 0 sends.

    python -P -m disagg.model.rank_process FD OUT IN

FD: its end of the link, see rank_link.py. OUT, IN: of those on which blocks move, see rank_moves.py.

It ends with the link, so nothing that happens to rank 0 leaves it behind.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from disagg.errors import ConfigError
from disagg.model.config import read_spec
from disagg.model.decoders import BackgroundDecoder
from disagg.model.device_loading import Fitted
from disagg.model.kv_cache import KVCache, layout
from disagg.model.loading import load
from disagg.model.parallel import RankGroup, join_store
from disagg.model.rank_link import (
    Link,
    LinkClosedError,
    RankReport,
    RankSetup,
    decode_setup,
    decode_step,
    encode_report,
)
from disagg.model.rank_moves import serve_moves
from disagg.model.shard import Shard

logger = logging.getLogger(__name__)

# Rank 0 sends the setup before it starts the process.
SETUP_TIMEOUT_S = 10.0


def follow(link: Link, moves: Sequence[Link]) -> None:
    """Serve one worker as the rank that its setup says, until rank 0 ends the link. Raises nothing."""
    try:
        setup = decode_setup(link.receive(SETUP_TIMEOUT_S))
        decoder, cache, _ = _load(setup, link)
        for each in moves:
            threading.Thread(target=serve_moves, args=(each, cache), name="kv-moves", daemon=True).start()
        link.send(encode_report(RankReport("ready")))
        with torch.inference_mode():
            while True:
                decoder.forward(decode_step(link.receive()), cache)
    except LinkClosedError:
        logger.info("rank 0 is gone")
    except ConfigError as error:
        _tell(link, RankReport("failed", error.message, error.param))
    except Exception as error:
        # Whatever it was, the ranks are out of step now: tell, and end.
        logger.exception("a rank failed")
        _tell(link, RankReport("failed", f"{type(error).__name__}: {error}"))


def _tell(link: Link, report: RankReport) -> None:
    try:
        link.send(encode_report(report))
    except LinkClosedError:
        logger.info("rank 0 is gone")


def _load(setup: RankSetup, link: Link) -> Fitted:
    if setup.cores:
        os.sched_setaffinity(0, setup.cores)
    torch.set_num_threads(setup.num_threads)
    device = torch.device(setup.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    spec = read_spec(Path(setup.folder))
    shard = Shard(setup.rank, setup.size)
    store = join_store(setup.port, setup.size, timeout_s=setup.timeout_s)
    link.send(encode_report(RankReport("joining")))
    group = RankGroup(shard, store, device=device, timeout_s=setup.timeout_s)
    cache_layout = layout(spec, model=setup.model, dtype=setup.dtype, block_size=setup.engine.block_size)
    kv_cache = None
    if setup.num_blocks is not None:
        kv_cache = KVCache(
            cache_layout,
            setup.num_blocks,
            buffer=_mapped(setup, setup.num_blocks * cache_layout.block_bytes),
            device=device,
            heads=shard.kv_heads(spec),
        )
    fitted = load(
        spec,
        setup.engine,
        cache_layout,
        group,
        device,
        max_model_len=setup.max_model_len,
        kv_cache=kv_cache,
    )
    if device.type == "cuda" and isinstance(fitted.decoder, BackgroundDecoder):
        # As rank 0 does now: its runner captures too, and a graph has the collectives of all ranks.
        with torch.inference_mode():
            fitted.decoder.capture(fitted.kv_cache, fitted.max_model_len)
    return fitted


def _mapped(setup: RankSetup, num_bytes: int) -> memoryview | None:
    """Return the worker's KV memory, which rank 0 and this rank share."""
    if setup.buffer_fd is None:
        return None
    memory = mmap.mmap(setup.buffer_fd, 0)
    os.close(setup.buffer_fd)
    return memoryview(memory)[setup.buffer_offset :][:num_bytes]


def main() -> None:
    # Ctrl-C goes to all of a terminal's processes; when to end is rank 0's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    link, *moves = (Link(socket.socket(fileno=int(fd)), timeout_s=SETUP_TIMEOUT_S) for fd in sys.argv[1:])
    follow(link, moves)


if __name__ == "__main__":
    main()
