"""Work shared out among threads: all of it done, in order, and what goes wrong comes out."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from unmask.kernels import threads

RANGES = [(i, i + 1) for i in range(40)]


@pytest.fixture(params=["openmp", "pool"])
def two(request: Any, monkeypatch: Any) -> Iterator[None]:
    if request.param == "pool":
        monkeypatch.setattr(threads, "openmp", lambda: None)
    elif threads.openmp() is None:
        pytest.skip("torch came without an OpenMP library")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def slowly(work: Callable[[int], Any]) -> Callable[[int, int], Any]:
    def wait(start: int, stop: int) -> Any:
        time.sleep(0.002)  # so that no thread is done before another has begun
        return work(start)

    return wait


@pytest.mark.usefixtures("two")
def test_each_range_is_done_once_and_by_both() -> None:
    seen: list[tuple[int, int]] = []
    found = threads.in_threads(
        slowly(lambda i: seen.append((i, threading.get_ident())) or i), RANGES
    )
    assert found == list(range(40))
    assert sorted(i for i, _ in seen) == list(range(40))
    assert len({thread for _, thread in seen}) == 2


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, MemoryError])
def test_what_goes_wrong_comes_out_when_all_have_stopped(kind: type[BaseException]) -> None:
    at_work: set[int] = set()

    def work(i: int) -> None:
        at_work.add(i)
        if i == 5:
            raise kind("five")
        time.sleep(0.005)
        at_work.discard(i)

    with pytest.raises(kind, match="five"):
        threads.in_threads(slowly(work), RANGES)
    assert at_work == {5}


@pytest.mark.usefixtures("two")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes can't be forked here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_works_alone() -> None:
    """It has no threads but its own, and would wait for the others for ever."""
    threads.in_threads(slowly(lambda i: i), RANGES)
    child = os.fork()
    if not child:
        found = threads.in_threads(lambda i, _: (i, threading.get_ident()), RANGES)
        os._exit(found != [(i, threading.get_ident()) for i in range(40)])
    for _ in range(500):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("it waits for ever")
    assert status == 0


def test_one_thread_needs_no_other(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert threads.shares(0, 10**9) == [(0, 10**9)]
    found = threads.in_threads(lambda a, b: threading.get_ident(), RANGES)
    assert set(found) == {threading.get_ident()}


def test_shares_are_of_some_size_and_cover_all(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for start, stop in ((0, 10**7), (7, 7), (5, 1000), (3, 4 * threads.SHARE)):
        cuts = threads.shares(start, stop)
        assert cuts[0][0] == start
        assert cuts[-1][1] == stop
        assert all(a[1] == b[0] for a, b in pairwise(cuts))
        assert len(cuts) <= 3 * threads.PARTS
        assert len(cuts) == 1 or min(b - a for a, b in cuts) >= threads.SHARE
