"""The inner loops as compiled CPU code, each over many tensors at once and on several threads."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from struct import Struct
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types  # type: ignore[attr-defined]
from torch import Tensor

from unmask.kernels.cpu_base import (
    HALF,
    INFINITE,
    MAGNITUDE,
    add,
    as_float,
    compiled,
    first_from,
    index_at,
    pointer,
    read,
    stamped,
    ticket,
)
from unmask.kernels.cpu_filter import (
    PART,
    STEEP,
    bounds,
    lacking,
    least_at,
    least_gradient,
    outdone,
    raising,
    reachable,
)
from unmask.kernels.cpu_moves import gather, insert, scatter
from unmask.kernels.threads import SHARE, Callback, at_once, shares

__all__ = ["Sweep", "gather", "handles", "insert", "scatter"]

BLOCK = 1024  # scalars bounded at once
GLANCE = 1 << 19  # least scalars of a thread's share where almost all are passed over
GROWTH = 4096  # of what is looked at, from round to round at the most
FEW = 32  # scalars of a part with candidates that are looked at together
HANDLED = frozenset([*HALF, torch.int32, torch.int64])
NONE = torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0)
_own = threading.local()

# A sweep's table has a row for each tensor, and one for the end.
START, OFFSET, GRAD, GRAD_HALF, THETA, THETA_HALF, FIRST, LAST = range(8)

# All that the threads of a look need: where something lies, and how many there are of it; what is
# to be seen; and what the law makes of the threshold, `cut` being the highest so far of any thread.
WORDS = (
    *("taken", "seats", "shares", "threads", "found", "ends"),
    *("table", "tensors", "kept", "wide", "many", "into", "index", "theta", "grad", "capacity"),
    *("start", "stop", "every", "but", "wanted", "law", "low"),
)
REALS = ("exp", "eps", "cut", "scale", "less", "above", "below")
TASK = np.dtype([*((name, np.int64) for name in WORDS), *((name, np.float64) for name in REALS)])
TAKEN, SEATS = (np.uint64(8 * WORDS.index(name)) for name in ("taken", "seats"))
SIZE = len(WORDS) + len(REALS)
_PACKED = Struct(f"{len(WORDS)}q{len(REALS)}d")


def handles(tensor: Tensor, home: torch.device) -> bool:
    """Whether these kernels can work on the tensor where it lies, with others on that device."""
    return tensor.is_cpu and tensor.dtype in HANDLED and tensor.is_contiguous()


class Sweep:
    """A pass over many tensors for scalars that could reach a threshold, in pieces of any size.

    offsets  global index of each tensor's first scalar, ascending
    kept     sorted global indices that are out of the question
    runs     (start, stop) of each tensor's among them
    into     None or float32, an entry for each of `kept`: where to add their gradients on the way,
             done for a range once it was run
    law      (exp, eps) of the score |g| / (|θ| + eps)^exp
    """

    def __init__(
        self,
        thetas: Sequence[Tensor],
        grads: Sequence[Tensor],
        offsets: Sequence[int],
        kept: Tensor,
        runs: Sequence[tuple[int, int]],
        into: Tensor | None,
        law: tuple[float, float],
    ) -> None:
        self._keep = thetas, grads, kept, into  # alive as long as their addresses are used
        self._law, self._offsets = law, offsets
        self._starts = [0, *accumulate(map(Tensor.numel, thetas))]
        self.total = self._starts[-1]
        each = zip(self._starts[:-1], offsets, grads, thetas, runs, strict=True)
        rows = [
            (start, offset, g.data_ptr(), HALF[g.dtype], t.data_ptr(), HALF[t.dtype], *run)
            for start, offset, g, t, run in each
        ]
        self._table = np.array([*rows, (self.total, *[0] * LAST)], dtype=np.int64)
        at = 0 if into is None else into.data_ptr()
        held = kept.data_ptr(), kept.dtype == torch.int64, len(kept)
        self._where = _address(self._table), len(thetas), *held, at

    def first(self, place: int) -> int:
        """The least global index from this place of the sweep on."""
        k = bisect_right(self._starts, place) - 1
        return place - self._starts[k] + self._offsets[k]

    def run(
        self,
        start: int,
        stop: int,
        threshold: float,
        capacity: int,
        every: int = 1,
        but: int = 0,
        wanted: int = 0,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], list[tuple[int, int]], int]:
        """Look at scalars [start, stop) of the tensors laid end to end, or rather at each block of
        them whose number is a multiple of `every` and none of `but`. Of candidates that `wanted`
        others outdo, if that isn't 0, some are left out.

        Returns candidates as (indices (int64), weights, gradients (float32)), the ranges left
        unseen because more than `capacity` turned up on a thread, and the position of a tensor with
        a gradient that isn't finite, or -1.
        """
        parts = len(shares(start, stop, (SHARE if threshold <= 0 else GLANCE) * every))
        threads = min(torch.get_num_threads(), parts)
        words = SIZE + threads + 3 * parts
        room, notes, rooms, at = _room(threads * capacity, words)
        found = at + 8 * SIZE
        what = *self._where, *rooms, capacity, start, stop, every, but, wanted
        how = _constants(*self._law, threshold)
        taken = 0, 0, parts, threads, found, found + 8 * threads
        _PACKED.pack_into(notes, 0, *taken, *what, *how)
        notes[SIZE : SIZE + threads] = 0
        at_once(_looker()[0], at, threads)
        said = notes[SIZE:words].tolist()
        counts, bad = said[:threads], max(said[threads + 2 :: 3])
        left: list[tuple[int, int]] = []
        for end, b in zip(said[threads::3], said[threads + 1 :: 3], strict=True):
            if end < b:  # right after another, they are one
                first = left.pop()[0] if left and left[-1][1] == end else end
                left.append((first, b))
        seats = [slice(i * capacity, i * capacity + n) for i, n in enumerate(counts) if n]
        if not seats:
            return NONE, left, bad
        index, theta, grad = (np.concatenate([x[seat] for seat in seats]) for x in room)
        return (torch.from_numpy(index), torch.from_numpy(theta), torch.from_numpy(grad)), left, bad


def _address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


@lru_cache  # a threshold soon stands, and then this would be a tenth of a short look
def _constants(exp: float, eps: float, threshold: float) -> tuple[float, ...]:
    """(law, low, exp, eps, cut, scale, less, above, below), as `cpu_filter` has them."""
    law, low, cut = bounds(exp, eps, threshold)
    how = raising(law, exp, eps)
    if abs(exp) > STEEP:
        exp = 0.0  # the weight has no say, nor may it overflow
    eps = float(torch.tensor(eps, dtype=torch.float32))  # numpy would warn that it is infinite
    return law, low, exp, eps, cut, *how


def _room(capacity: int, words: int) -> tuple[Any, ...]:
    """This thread's room for so many candidates and a task of so many words, and where it lies.

    It is kept: to ask for it anew takes as long as a look at a million scalars.
    """
    found: tuple[Any, ...] | None = getattr(_own, "room", None)
    if found is None or len(found[0][0]) < capacity or len(found[1]) < words:
        room = np.empty(capacity, np.int64), *np.empty((2, capacity), np.float32)
        notes = np.zeros(words, np.int64)
        found = _own.room = room, notes, tuple(map(_address, room)), _address(notes)
    return found


@cache
def _looker() -> Any:
    """What each thread does with a task, for `at_once`."""
    made: Any = cfunc(types.void(types.uint64), cache=True)

    @made
    @stamped
    def look(address):  # type: ignore[no-untyped-def]
        task = carray(pointer(address), (1,), dtype=TASK)[0]
        table = carray(pointer(task.table), (task.tensors + 1, 8), dtype=np.int64)
        into = carray(pointer(task.into), (task.many,), dtype=np.float32)
        counts = carray(pointer(task.found), (task.threads,), dtype=np.int64)
        ends = carray(pointer(task.ends), (task.shares, 3), dtype=np.int64)
        seat = ticket(address + SEATS)
        first, last = seat * task.capacity, (seat + 1) * task.capacity
        index = carray(pointer(task.index), (last,), dtype=np.int64)[first:]
        theta = carray(pointer(task.theta), (last,), dtype=np.int32)[first:]
        grad = carray(pointer(task.grad), (last,), dtype=np.int32)[first:]
        share = ticket(address + TAKEN)
        while share < task.shares:
            start = task.start + (task.stop - task.start) * share // task.shares
            stop = task.start + (task.stop - task.start) * (share + 1) // task.shares
            end, bad = start, -1
            if counts.sum() <= task.capacity:  # else better raise the threshold first
                given = task, table, into, index, theta, grad, start, stop, counts[seat]
                counts[seat], end, bad = _sweep(*given)
            ends[share, 0], ends[share, 1], ends[share, 2] = end, stop, bad
            share = ticket(address + TAKEN)

    return Callback(look.address), look  # which lasts as long


@compiled
def _sweep(task, table, into, out_index, out_theta, out_grad, start, stop, count):  # type: ignore[no-untyped-def]
    """(number found, where it stopped, tensor with a gradient that isn't finite or -1); the first
    `count` were found before.

    Loops over a block are kept free of branches so that they vectorise.
    """
    law, exp, eps, cut = task.law, np.float32(task.exp), np.float32(task.eps), np.float32(task.cut)
    low, every, but, wanted = np.int32(task.low), task.every, task.but, task.wanted
    first = count  # that were found in whole blocks
    due = 2 * wanted  # when there may be many that others outdo
    kept, wide = np.uint64(task.kept), task.wide != 0
    k, at, seen, t = 0, start, -1, 0
    while at < stop:
        block = at // BLOCK
        skipped = -block % every
        if skipped == 0 and but > 0 and block % but == 0:
            skipped = every
        if skipped > 0:
            at = (block + skipped) * BLOCK
            continue
        while at >= table[k + 1, START]:
            k += 1
        here = at - table[k, START]
        offset = table[k, OFFSET]
        last = table[k, LAST]
        if seen != at or here == 0:
            t = first_from(kept, wide, table[k, FIRST], last, here + offset)
        if task.cut > cut:  # another thread's
            cut = np.float32(task.cut)
            low = max(low, least_gradient(eps, law, exp, cut))
        n = min((block + 1) * BLOCK, stop, table[k + 1, START]) - at
        g_at, g_half = np.uint64(table[k, GRAD]), table[k, GRAD_HALF] != 0
        t_at, t_half = np.uint64(table[k, THETA]), table[k, THETA_HALF] != 0
        source = g_at, g_half, t_at, t_half
        wins, top = reachable(*source, here, n, law, exp, eps, low, cut)
        if top >= INFINITE:
            return count, at, k
        if wins:
            u = t
            for part in range(here, here + n, PART):  # hits are rare: look ever closer
                end = min(part + PART, here + n)
                if not reachable(*source, part, end - part, law, exp, eps, low, cut)[0]:
                    continue
                if least_at(*source, part, end - part, law, exp, eps, cut) > 0:
                    continue
                if count + n > out_index.size:
                    return first, at, -1
                for near in range(part, end, FEW):
                    some = min(FEW, end - near)
                    if least_at(*source, near, some, law, exp, eps, cut) > 0:
                        continue
                    for i in range(near, near + some):
                        g = read(g_at, g_half, i) & MAGNITUDE
                        base = as_float(read(t_at, t_half, i) & MAGNITUDE) + eps
                        if g < low or not lacking(as_float(g), base, law, exp, cut) <= 0:
                            continue
                        scalar = i + offset
                        while u < last and index_at(kept, wide, u) < scalar:
                            u += 1
                        if u == last or index_at(kept, wide, u) != scalar:
                            out_index[count] = scalar
                            out_theta[count] = read(t_at, t_half, i)
                            out_grad[count] = read(g_at, g_half, i)
                            count += 1
        if wanted > 0 and count >= due:
            found = out_index, out_theta, out_grad
            how = task.scale, task.less, task.above, task.below  # as `raising` has it
            count, task.cut = outdone(*found, count, wanted, law, exp, eps, cut, how)
            due = max(count + wanted, 2 * wanted)
        first = count
        at += n
        seen = at
        while t < last and index_at(kept, wide, t) < here + n + offset:
            if task.into != 0:
                into[t] = add(into[t], read(g_at, g_half, index_at(kept, wide, t) - offset), g_half)
            t += 1
    return count, stop, -1
