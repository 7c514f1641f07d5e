"""The swap as compiled code: one call for all tensors, and as many threads as torch uses.

A model has hundreds of tensors and a delta a few hundred scalars in each, so what a call for each
tensor costs would outweigh the work. The kernels are handed addresses instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic

from unmask.errors import UnmaskError
from unmask.kernels.swap import Move

SHARE = 1 << 14  # scalars that are worth a thread of their own
WORD = {2: np.empty(0, np.uint16), 4: np.empty(0, np.uint32), 8: np.empty(0, np.uint64)}


def gather(moves: Sequence[Move]) -> None:
    """As `swap.gather`; all tensors contiguous and in CPU memory."""
    _run(_gather, moves)


def scatter(moves: Sequence[Move]) -> None:
    """As `swap.scatter`; all tensors contiguous and in CPU memory."""
    _run(_scatter, moves)
    for move in moves:  # autograd has to learn of it
        torch.autograd.graph.increment_version(move.tensor)


def _run(kernel: Callable[..., bool], moves: Sequence[Move]) -> None:
    for size, word in WORD.items():
        same = [move for move in moves if move.tensor.element_size() == size]
        places = [(t.data_ptr(), t.numel(), at.data_ptr(), v.data_ptr()) for t, at, v in same]
        table = np.array(places, dtype=np.uint64).reshape(-1, 4)
        starts = np.cumsum([0, *(len(move.at) for move in same)], dtype=np.int64)
        work = partial(kernel, table, starts, word)
        threads = max(1, min(torch.get_num_threads(), int(starts[-1]) // SHARE))
        cuts = [int(starts[-1]) * i // threads for i in range(threads + 1)]
        jobs = [_pool().submit(work, *cuts[i : i + 2]) for i in range(1, threads)]
        done = [work(*cuts[:2]), *(job.result() for job in jobs)]
        if not all(done):  # only if someone wrote into a delta's own indices
            raise UnmaskError("an index lies outside of its tensor; load the delta afresh")


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="unmask-swap")


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to elements of the type of the array `like`."""
    signature = types.CPointer(like.dtype)(address, like)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


# Entries start..stop of all moves' together are one thread's share. The index is compared as an
# unsigned number, so a negative one is out of range too.


@njit(nogil=True, cache=True)
def _gather(table, starts, word, start, stop):  # type: ignore[no-untyped-def]
    k = np.searchsorted(starts, start, side="right") - 1
    while k < len(table) and starts[k] < stop:
        scalars, size = _pointer(table[k, 0], word), table[k, 1]
        at, values = _pointer(table[k, 2], table), _pointer(table[k, 3], word)
        for i in range(max(start - starts[k], 0), min(stop, starts[k + 1]) - starts[k]):
            if at[i] >= size:
                return False
            values[i] = scalars[at[i]]
        k += 1
    return True


@njit(nogil=True, cache=True)
def _scatter(table, starts, word, start, stop):  # type: ignore[no-untyped-def]
    k = np.searchsorted(starts, start, side="right") - 1
    while k < len(table) and starts[k] < stop:
        scalars, size = _pointer(table[k, 0], word), table[k, 1]
        at, values = _pointer(table[k, 2], table), _pointer(table[k, 3], word)
        for i in range(max(start - starts[k], 0), min(stop, starts[k + 1]) - starts[k]):
            if at[i] >= size:
                return False
            scalars[at[i]] = values[i]
        k += 1
    return True
