"""The swap as compiled code: one call for all tensors, and as many threads as torch uses.

A model has hundreds of tensors and a delta a few hundred scalars in each, so what a call for each
tensor costs would outweigh the work. The kernels are handed addresses instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from unmask.errors import UnmaskError
from unmask.kernels.cpu_base import entry, prefetch_to_write
from unmask.kernels.reference import written
from unmask.kernels.swap import Moves
from unmask.kernels.threads import SHARE, in_threads

WORD = {2: np.empty(0, np.uint16), 4: np.empty(0, np.uint32), 8: np.empty(0, np.uint64)}
TENSOR, SIZE, AT, NEW, OLD = range(5)  # columns of a batch's table
NONE = np.empty(0, dtype=np.uint64)
READ, WRITE, TRADE, TRADE_KNOWN = range(4)  # what is done with a scalar
AHEAD = 16  # scalars whose memory is asked for before it is needed


def gather(moves: Sequence[Moves]) -> None:
    """As `swap.gather`; all tensors contiguous and in CPU memory."""
    for batch in _batches(moves):
        batch.run(READ)


class Exchange:
    """As `swap.Exchange`; all tensors contiguous and in CPU memory."""

    def __init__(self, moves: Sequence[Moves], known: bool) -> None:
        self._tensors = [tensor for some in moves for tensor in some.tensors]
        self._batches = _batches(moves)
        self._way = TRADE_KNOWN if known else TRADE

    def apart(self) -> bool:
        """Whether no two tensors share memory: then no scalar has two values."""
        begin = np.concatenate([NONE, *(batch.table[:, TENSOR] for batch in self._batches)])
        sizes = (batch.table[:, SIZE] * batch.width for batch in self._batches)
        order, end = np.argsort(begin), begin + np.concatenate([NONE, *sizes])
        return bool(np.all(end[order[:-1]] <= begin[order[1:]]))

    def start(self) -> bool:
        """Exchange all; whether all was as known."""
        return all(batch.run(self._way) for batch in self._batches)

    def finish(self) -> None:
        """Tell autograd."""
        written(self._tensors)

    def revert(self) -> None:
        """Exchange back what is exchanged, however far an interrupt let it come."""
        for batch in self._batches:
            batch.revert()


class _Batch:
    """All moves of one width: where everything lies, and how much of each share is done."""

    def __init__(self, moves: Sequence[Moves], width: int) -> None:
        self.moves = moves  # whose memory has to last as long as a thread may work on it
        self.table = np.concatenate([_table(some) for some in moves])
        counts = np.concatenate([np.diff(some.starts) for some in moves])
        self.starts = np.concatenate([[0], counts.cumsum()])
        self.word, self.width = WORD[width], np.uint64(width)
        total = int(self.starts[-1])
        self.shares = [(start, min(start + SHARE, total)) for start in range(0, total, SHARE)]
        self.done = np.zeros(len(self.shares), dtype=np.int64)
        self.at_work = [Lock() for _ in self.shares]
        self.stopped = False

    def run(self, way: int) -> bool:
        """Move all, each share once it is sure that its indices are in their tensors; whether all
        was moved."""

        def work(i: int, _: int) -> bool:
            with self.at_work[i]:
                if self.stopped:
                    return False
                if not _sound(self.table, self.starts, *self.shares[i]):
                    # Only if someone wrote into a delta's own indices.
                    raise UnmaskError("an index lies outside of its tensor; load the delta afresh")
                return self._move(i, *self.shares[i], way)

        return all(in_threads(work, [(i, i) for i in range(len(self.shares))]))

    def revert(self) -> None:
        """Write back what was there."""
        self.stopped = True
        for lock in self.at_work:  # after an interrupt another thread may still be at it
            with lock:
                pass
        self.table[:, NEW] = self.table[:, OLD]
        for i, count in enumerate(self.done.tolist()):
            start = self.shares[i][0]
            self._move(i, start, start + count, WRITE)

    def _move(self, i: int, start: int, stop: int, way: int) -> bool:
        return bool(_move(self.table, self.starts, self.word, start, stop, way, self.done, i))


def _batches(moves: Sequence[Moves]) -> list[_Batch]:
    widths = defaultdict(list)
    for some in moves:
        widths[some.new.element_size()].append(some)
    return [_Batch(same, width) for width, same in widths.items()]


def _table(moves: Moves) -> np.ndarray[Any, Any]:
    """Where each tensor and its parts of the vectors begin."""
    table = np.empty((len(moves.tensors), 5), dtype=np.uint64)
    table[:, TENSOR] = [tensor.data_ptr() for tensor in moves.tensors]
    table[:, SIZE] = [tensor.numel() for tensor in moves.tensors]
    begin = moves.starts[:-1].astype(np.uint64)
    for column, vector in ((AT, moves.at), (NEW, moves.new), (OLD, moves.old)):
        size = np.uint64(vector.element_size())
        table[:, column] = begin * size + np.uint64(vector.data_ptr())
    return table


def _as_pointer(_: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to elements of the type of the array `like`."""
    signature = types.CPointer(like.dtype)(address, like)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


_pointer: Any = intrinsic(_as_pointer)


# Entries start..stop of all moves' together are one thread's share. Indices are compared as
# unsigned numbers, so a negative one is out of range too.


@entry
def _sound(table, starts, start, stop):  # type: ignore[no-untyped-def]
    """Whether indices rise strictly and stay in their tensors, so that no scalar moves twice."""
    k, wrong = np.searchsorted(starts, start, side="right") - 1, False
    while k < len(table) and starts[k] < stop:
        at = _pointer(table[k, AT], table)
        first, last = max(start - starts[k], 0), min(stop, starts[k + 1]) - starts[k]
        wrong |= last > first and at[last - 1] >= table[k, SIZE]
        for i in range(max(first, 1), last):
            wrong |= at[i] <= at[i - 1]
        k += 1
    return not wrong


@entry
def _move(table, starts, word, start, stop, way, done, share):  # type: ignore[no-untyped-def]
    """Read scalars to `OLD`, write those at `NEW`, or both, and note how many.

    If they are known, `OLD` is what they must be: up to the first that isn't.
    """
    k, same = np.searchsorted(starts, start, side="right") - 1, True
    while same and k < len(table) and starts[k] < stop:
        scalars, at = _pointer(table[k, TENSOR], word), _pointer(table[k, AT], table)
        new, old = _pointer(table[k, NEW], word), _pointer(table[k, OLD], word)
        i, last = max(start - starts[k], 0), min(stop, starts[k + 1]) - starts[k]
        begin, width = table[k, TENSOR], np.uint64(word.itemsize)
        while i < last:
            prefetch_to_write(begin + width * at[min(i + AHEAD, last - 1)])
            here = at[i]
            if way == TRADE_KNOWN and scalars[here] != old[i]:
                same = False
                break
            if way in (READ, TRADE):
                old[i] = scalars[here]
            if way != READ:
                scalars[here] = new[i]
            i += 1
        done[share] = starts[k] + i - start
        k += 1
    return same
