"""Cores for a worker's compute threads, so that workers on one machine do not chase each other over it.

A core is taken by locking a file of its number. The lock goes with the process, however it ends, and holds
between clusters of the same user on one machine too.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CoreClaim:
    """Cores of this machine that are this process's, and its ranks', until `close`.

    count: for each of `ranks` processes. cores: as many as were asked for in all, or none where not so many
    are free: part of them would be worse than leaving the choice to the kernel.
    """

    def __init__(self, count: int, folder: Path | None = None, *, ranks: int = 1) -> None:
        self._files: list[int] = []
        taken: list[int] = []
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        directory = folder or _folder()
        for core in usable:
            if len(taken) == count * ranks:
                break
            if directory is not None and self._lock(directory / str(core)):
                taken.append(core)
        if len(taken) < count * ranks:
            self.close()
            taken = []
        self._count = count
        self.cores = tuple(taken)

    def rank_cores(self, rank: int) -> tuple[int, ...]:
        """Return one rank's own cores, none where there are none."""
        return self.cores[rank * self._count :][: self._count]

    def pin_thread(self) -> None:
        """Keep the calling thread, and those that it starts, on the first rank's cores, if there are any."""
        if self.cores:
            os.sched_setaffinity(0, self.rank_cores(0))

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Pin the calling thread for a while: threads that start meanwhile stay pinned."""
        if not self.cores:
            yield
            return
        before = os.sched_getaffinity(0)
        self.pin_thread()
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def close(self) -> None:
        """Let others have the cores."""
        for file in self._files:
            os.close(file)
        self._files.clear()

    def _lock(self, path: Path) -> bool:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            return False
        self._files.append(file)
        return True


def _folder() -> Path | None:
    """Return this user's folder of lock files, None where it can't be had."""
    folder = Path(tempfile.gettempdir()) / f"disagg-cores-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    return folder if status.st_uid == os.getuid() and not folder.is_symlink() else None
