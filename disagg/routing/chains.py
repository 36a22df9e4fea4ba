"""ChainTree: which workers are expected to hold the blocks of requests in flight, counted.

A radix tree over chained hashes. A hash stands for all blocks before it, so whether a chain's first i blocks
are known is monotonous in i, and the deepest known one is found by bisection. A node is a run of blocks that
the same requests pass through:

    root ── [system prompt] ─┬─ [conversation 1] ── [turn 2]
                             └─ [conversation 2]

One request adds a chain on its workers and later takes it back on each; adding costs one C-level dict update
for the blocks that are new, and a few steps for the nodes on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class ChainNode:
    """Blocks start..end of a chain. counts: {worker slot: requests that expect these blocks there}."""

    __slots__ = ("counts", "end", "hashes", "parent", "start")

    def __init__(self, parent: ChainNode | None, hashes: tuple[int, ...], start: int, end: int) -> None:
        self.parent = parent
        self.hashes, self.start, self.end = hashes, start, end
        self.counts: dict[int, int] = {}


class ChainTree(Protocol):
    """Chains of block hashes and who is expected to hold them.

    num_blocks: different blocks known. num_expected: (worker, block) pairs expected.
    """

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_expected(self) -> int: ...

    def add(self, hashes: Sequence[int], slots: Sequence[int], /) -> Any:
        """Expect a chain on these workers (each named once); return what `drop` takes.

        None, and nothing is expected, where it is empty or contradicts what is known: no chain then.
        """

    def drop(self, leaf: Any, slot: int, /) -> None:
        """Take back one chain that ends at `leaf` on one worker, on which it was added."""


class PythonChainTree:
    """A ChainTree in dicts. `_chains.c` does the same in C."""

    def __init__(self) -> None:
        self._nodes: dict[int, ChainNode] = {}
        self.num_expected = 0

    @property
    def num_blocks(self) -> int:
        return len(self._nodes)

    def add(self, hashes: Sequence[int], slots: Sequence[int], /) -> ChainNode | None:
        """See ChainTree."""
        chain = tuple(hashes)
        depth, node = self._deepest(chain)
        fresh = chain[depth:]
        if not chain or not slots or len(set(fresh)) < len(fresh) or not self._nodes.keys().isdisjoint(fresh):
            return None
        if node is not None and depth < node.end:
            node = self._split(node, depth)
        if fresh or node is None:
            node = ChainNode(node, chain, depth, len(chain))
            self._nodes.update(dict.fromkeys(fresh, node))
        at: ChainNode | None = node
        while at is not None:
            counts = at.counts
            for slot in slots:
                before = counts.get(slot, 0)
                counts[slot] = before + 1
                if not before:
                    self.num_expected += at.end - at.start
            at = at.parent
        return node

    def drop(self, leaf: ChainNode, slot: int, /) -> None:
        """See ChainTree."""
        at: ChainNode | None = leaf
        while at is not None:
            counts = at.counts
            left = counts[slot] - 1
            if left:
                counts[slot] = left
            else:
                del counts[slot]
                self.num_expected -= at.end - at.start
                if not counts:
                    nodes = self._nodes
                    for item in at.hashes[at.start : at.end]:
                        del nodes[item]
            at = at.parent

    def path(self, hashes: Sequence[int]) -> list[tuple[int, dict[int, int]]]:
        """Return [(depth, counts)]: who is expected to hold the blocks up to each depth, shallow first."""
        depth, at = self._deepest(tuple(hashes))
        found: list[tuple[int, dict[int, int]]] = []
        while at is not None:
            found.append((min(depth, at.end), at.counts))
            at = at.parent
        found.reverse()
        return found

    def _deepest(self, chain: tuple[int, ...]) -> tuple[int, ChainNode | None]:
        """Return how many leading blocks are known, and the node of the last of them."""
        nodes = self._nodes
        if not nodes or not chain or chain[0] not in nodes:
            return 0, None
        low, high = 1, len(chain)
        while low < high:
            middle = (low + high) // 2
            if chain[middle] in nodes:
                low = middle + 1
            else:
                high = middle
        node = nodes[chain[low - 1]]
        if not node.start < low <= node.end or node.hashes[:low] != chain[:low]:
            return 0, None  # whoever sent this made its hashes up
        return low, node

    def _split(self, node: ChainNode, depth: int) -> ChainNode:
        """Cut a node in two and return the upper one; whoever named the node goes on naming the lower."""
        upper = ChainNode(node.parent, node.hashes, node.start, depth)
        upper.counts = dict(node.counts)
        self._nodes.update(dict.fromkeys(node.hashes[node.start : depth], upper))
        node.parent, node.start = upper, depth
        return upper
