"""Work on several threads: torch's own, since those of its last operation still hold their cores.

OpenMP's threads spin for milliseconds when they are done, waiting for the next work. Threads of
another pool would share the cores with them, at half the speed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

SHARE = 1 << 15  # least scalars that a thread is given at a time
PARTS = 8  # shares for each thread
OPENMP = ("libgomp", "libiomp5", "libomp")
HOME = os.getpid()

T = TypeVar("T")
Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def shares(start: int, stop: int, least: int = SHARE) -> list[tuple[int, int]]:
    """The range in equal parts, several for each thread that torch uses, or one if it is short."""
    threads = torch.get_num_threads()
    parts = min(threads * PARTS, (stop - start) // least) if threads > 1 else 1
    cuts = [start + (stop - start) * i // max(1, parts) for i in range(max(1, parts) + 1)]
    return list(pairwise(cuts))


def at_once(function: Any, task: int, threads: int) -> None:
    """Call a compiled function with a task's address on so many threads, this one among them, and
    return when all are done. It hands out the task's parts itself: a late thread finds none left.
    """
    if threads < 2 or os.getpid() != HOME:  # a forked process has none of the threads
        function(task)
    elif (parallel := openmp()) is not None:
        parallel(function, task, threads, 0)
    else:
        helpers = [_pool().submit(function, task) for _ in range(threads - 1)]
        function(task)
        interrupt: BaseException | None = None
        for helper in helpers:
            while not (helper.cancel() or helper.done()):
                try:
                    helper.result()
                except KeyboardInterrupt as problem:  # the task's memory is still in use
                    interrupt = problem
        if interrupt is not None:
            raise interrupt


def in_threads(work: Callable[[int, int], T], ranges: list[tuple[int, int]]) -> list[T]:
    """What the work returns for each range. Threads take the next as they become free, since some
    ranges have more to them than others, and some threads a core of their own.

    What the work raises is raised once all threads have stopped; then not every range is done.
    """
    found: list[T | None] = [None] * len(ranges)
    failed: list[BaseException] = []
    waiting = iter(range(len(ranges)))  # next() on it is atomic

    def take(_: object = None) -> None:
        try:
            for i in waiting:
                if failed:
                    break
                found[i] = work(*ranges[i])
        except BaseException as problem:  # noqa: BLE001  # to be raised where it can be caught
            failed.append(problem)

    threads = min(torch.get_num_threads(), len(ranges))
    if threads < 2 or os.getpid() != HOME:  # a forked process has none of the threads
        take()
    elif (parallel := openmp()) is not None:
        parallel(Callback(take), None, threads, 0)
    else:
        helpers = [_pool().submit(take) for _ in range(threads - 1)]
        take()
        # On a busy machine a helper may not have begun: then all is done, and it needn't.
        for helper in helpers:
            if not helper.cancel():
                helper.result()
    if failed:
        raise failed[0]
    return cast("list[T]", found)


@cache
def openmp() -> Callable[..., None] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP library that came with
    torch: runs the function once on each thread. None where there is no such library."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*")):
        if path.name.startswith(OPENMP):
            with suppress(OSError, AttributeError):
                parallel: Any = ctypes.CDLL(str(path)).GOMP_parallel
                parallel.restype = None
                parallel.argtypes = [Callback, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                return cast("Callable[..., None]", parallel)
    return None


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="unmask")
