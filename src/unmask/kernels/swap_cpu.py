"""The swap as compiled code: one call for all tensors, and as many threads as torch uses.

A model has hundreds of tensors and a delta a few hundred scalars in each, so what a call for each
tensor costs would outweigh the work. The kernels are handed addresses instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic

from unmask.errors import UnmaskError
from unmask.kernels.cpu_base import SHARE, in_threads
from unmask.kernels.swap import Move

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
        starts = np.cumsum([0, *(move.at.numel() for move in same)], dtype=np.int64)
        total = int(starts[-1])
        ranges = [(at, min(at + SHARE, total)) for at in range(0, total, SHARE)]
        if not all(in_threads(partial(kernel, table, starts, word), ranges)):
            # Only if someone wrote into a delta's own indices.
            raise UnmaskError("an index lies outside of its tensor; load the delta afresh")


def _as_pointer(_: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to elements of the type of the array `like`."""
    signature = types.CPointer(like.dtype)(address, like)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


_pointer: Any = intrinsic(_as_pointer)


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
