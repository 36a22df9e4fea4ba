"""Cores are one worker's at a time, and free again when it is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from disagg.cluster.cores import CoreClaim

USABLE = sorted(os.sched_getaffinity(0))


def test_a_core_is_taken_once(tmp_path):
    claims = [CoreClaim(1, tmp_path) for _ in range(len(USABLE) + 1)]
    assert [list(claim.cores) for claim in claims] == [[core] for core in USABLE] + [[]]
    claims[0].close()
    again = CoreClaim(1, tmp_path)
    assert again.cores == claims[0].cores
    for claim in (*claims, again):
        claim.close()


def test_all_that_were_asked_for_or_none(tmp_path):
    first = CoreClaim(1, tmp_path)
    assert CoreClaim(len(USABLE), tmp_path).cores == ()
    # What it could not use, it did not keep.
    rest = CoreClaim(len(USABLE) - 1, tmp_path)
    assert len(rest.cores) == len(USABLE) - 1
    first.close()
    rest.close()


@pytest.mark.skipif(len(USABLE) < 2, reason="needs two cores")
def test_each_rank_has_cores_of_its_own(tmp_path):
    claim = CoreClaim(1, tmp_path, ranks=2)
    assert [claim.rank_cores(rank) for rank in range(2)] == [(core,) for core in USABLE[:2]]
    with claim.pinned():
        assert os.sched_getaffinity(0) == {USABLE[0]}
    claim.close()
    assert CoreClaim(1, tmp_path, ranks=len(USABLE) + 1).rank_cores(0) == ()


def test_threads_stay_on_the_cores(tmp_path):
    claim = CoreClaim(1, tmp_path)
    seen = []
    with claim.pinned():
        thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
    claim.close()
    assert seen == [set(claim.cores)]
    assert os.sched_getaffinity(0) == set(USABLE)


def test_the_cores_of_a_killed_process_are_free(tmp_path):
    code = f"""
import time
from pathlib import Path
from disagg.cluster.cores import CoreClaim
claim = CoreClaim({len(USABLE)}, Path({str(tmp_path)!r}))
print(len(claim.cores), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == str(len(USABLE))
        assert CoreClaim(1, tmp_path).cores == ()
        process.kill()
    claim = CoreClaim(1, tmp_path)
    assert len(claim.cores) == 1
    claim.close()


def test_without_a_folder_nothing_is_pinned(tmp_path):
    claim = CoreClaim(1, tmp_path / "missing")
    assert claim.cores == ()
    with claim.pinned():
        claim.pin_thread()
    assert os.sched_getaffinity(0) == set(USABLE)


@pytest.mark.parametrize("count", [len(USABLE) + 1])
def test_more_than_there_are(tmp_path, count):
    assert CoreClaim(count, tmp_path).cores == ()
