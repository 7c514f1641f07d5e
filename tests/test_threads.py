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
        calls: list[int] = []
        threads.at_once(calls.append, 7, 2)
        os._exit(found != [(i, threading.get_ident()) for i in range(40)] or calls != [7])
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


def handing_out(parts: int, work: Callable[[int], Any]) -> Any:
    """A function as `at_once` calls it, that takes parts as long as there are any."""
    waiting = iter(range(parts))

    def take(_: object = None) -> None:
        for i in waiting:
            work(i)

    return threads.Callback(take)


@pytest.mark.usefixtures("two")
def test_a_task_is_done_once_and_by_both_when_it_returns() -> None:
    seen: list[tuple[int, int]] = []

    def work(i: int) -> None:
        time.sleep(0.002)
        seen.append((i, threading.get_ident()))

    threads.at_once(handing_out(40, work), 0, 2)
    assert sorted(i for i, _ in seen) == list(range(40))
    assert len({thread for _, thread in seen}) == 2


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that interrupts")
def test_a_task_outlasts_an_interrupt(monkeypatch: Any) -> None:
    """Threads write to its memory, so it isn't left while one is at it."""
    monkeypatch.setattr(threads, "openmp", lambda: None)
    begun, done = threading.Event(), threading.Event()

    def work(_: object = None) -> None:
        if threading.current_thread() is threading.main_thread():
            begun.wait(10)  # then all that is left is to wait for the other
        else:
            begun.set()
            time.sleep(0.3)
            done.set()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            threads.at_once(work, 0, 2)
        assert done.is_set()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
