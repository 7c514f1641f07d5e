"""The inner loops as compiled CPU code, each over many tensors at once and on several threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.kernels.cpu_base import (
    HALF,
    INFINITE,
    MAGNITUDE,
    add,
    addresses,
    as_float,
    compiled,
    halves,
    read,
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
from unmask.kernels.threads import SHARE, in_threads, shares

__all__ = ["Sweep", "gather", "handles", "insert", "scatter"]

BLOCK = 1024  # scalars bounded at once
GLANCE = 1 << 19  # least scalars of a thread's share where almost all are passed over
GROWTH = 4096  # of what is looked at, from round to round at the most
FEW = 32  # scalars of a part with candidates that are looked at together
NONE = [np.empty(0, dtype=np.int64), *np.empty((2, 0), dtype=np.float32)]
_own = threading.local()
HANDLED = frozenset([*HALF, torch.int32, torch.int64])


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
        self._keep = (thetas, grads)  # alive as long as their addresses are used
        self._law = law
        self._starts = np.array([0, *accumulate(map(Tensor.numel, thetas))], dtype=np.int64)
        self._offsets = np.array(offsets, dtype=np.int64)
        self._arrays = (
            *(self._starts, self._offsets),
            *(addresses(grads), halves(grads), addresses(thetas), halves(thetas)),
            *(kept.numpy(), np.array(runs, dtype=np.int64)),
            np.empty(0, dtype=np.float32) if into is None else into.numpy(),
        )
        self.total = int(self._starts[-1])

    def first(self, place: int) -> int:
        """The least global index from this place of the sweep on."""
        k = int(np.searchsorted(self._starts, place, side="right")) - 1
        return int(place - self._starts[k] + self._offsets[k])

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
        constants, how = _constants(*self._law, threshold)
        cuts = np.array([constants[-1]])  # the highest so far, of any thread
        rooms: dict[int, tuple[Any, ...]] = {}  # for candidates, one for each thread
        used: dict[int, int] = {}
        least = (SHARE if threshold <= 0 else GLANCE) * every

        def look(a: int, b: int) -> tuple[int, int]:
            thread = threading.get_ident()
            if thread not in rooms:
                rooms[thread] = _room(capacity)
            if sum(list(used.values())) > capacity:  # better raise the threshold first
                return a, -1
            where = *self._arrays, a, b, every, but
            more = *constants, *rooms[thread], used.get(thread, 0)
            count, end, bad = _sweep(*where, *more, cuts, wanted, how)
            used[thread] = count
            return end, bad

        ranges = shares(start, stop, least)
        looked = in_threads(look, ranges)
        left: list[tuple[int, int]] = []
        for (_, b), (end, _) in zip(ranges, looked, strict=True):
            if end < b:  # right after another, they are one
                first = left.pop()[0] if left and left[-1][1] == end else end
                left.append((first, b))
        parts = [[x[:n] for x in rooms[thread]] for thread, n in used.items() if n] or [NONE]
        columns = zip(*parts, strict=True)
        index, theta, grad = (torch.from_numpy(np.concatenate(column)) for column in columns)
        return (index, theta, grad), left, max(bad for _, bad in looked)


@lru_cache  # a threshold soon stands, and then this would be a tenth of a short look
def _constants(exp: float, eps: float, threshold: float) -> tuple[Any, Any]:
    """What `_sweep` makes of the law and the threshold: (law, exp, eps, low, cut), how."""
    law, low, cut = bounds(exp, eps, threshold)
    how = raising(law, exp, eps)
    if abs(exp) > STEEP:
        exp = 0.0  # the weight has no say, nor may it overflow
    eps = float(torch.tensor(eps, dtype=torch.float32))  # numpy would warn that it is infinite
    return (law, np.float32(exp), np.float32(eps), np.int32(low), np.float32(cut)), how


def _room(capacity: int) -> tuple[Any, ...]:
    """This thread's room for so many candidates, kept: to ask for it anew takes as long as a look
    at a million scalars."""
    room = getattr(_own, "room", None)
    if room is None or len(room[0]) < capacity:
        room = np.empty(capacity, dtype=np.int64), *np.empty((2, capacity), np.float32)
        _own.room = room
    return tuple(part[:capacity] for part in room)


@compiled
def _sweep(  # type: ignore[no-untyped-def]
    starts, offsets, g_at, g_half, t_at, t_half, kept, runs, into,
    start, stop, every, but, law, exp, eps, low, cut, out_index, out_theta, out_grad, count,
    cuts, wanted, how,
):  # fmt: skip
    """(number found, where it stopped, tensor with a gradient that isn't finite or -1); the first
    `count` were found before.

    Loops over a block are kept free of branches so that they vectorise.
    """
    out_theta, out_grad = out_theta.view(np.int32), out_grad.view(np.int32)
    first = count  # that were found in whole blocks
    due = 2 * wanted  # when there may be many that others outdo
    k = np.searchsorted(starts, start, side="right") - 1
    at, seen, t = start, -1, 0
    while at < stop:
        block = at // BLOCK
        skipped = -block % every
        if skipped == 0 and but > 0 and block % but == 0:
            skipped = every
        if skipped > 0:
            at = (block + skipped) * BLOCK
            continue
        while at >= starts[k + 1]:
            k += 1
        shift = offsets[k] - starts[k]  # from the place in the sweep to the global index
        taken = kept[runs[k, 0] : runs[k, 1]]
        if seen != at or at == starts[k]:
            t = np.searchsorted(taken, at + shift)
        if cuts[0] > cut:  # another thread's
            cut = cuts[0]
            low = max(low, least_gradient(eps, law, exp, cut))
        n = min((block + 1) * BLOCK, stop, starts[k + 1]) - at
        here = at - starts[k]
        source = g_at[k], g_half[k], t_at[k], t_half[k]
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
                        g = read(g_at[k], g_half[k], i) & MAGNITUDE
                        base = as_float(read(t_at[k], t_half[k], i) & MAGNITUDE) + eps
                        if g < low or not lacking(as_float(g), base, law, exp, cut) <= 0:
                            continue
                        scalar = i + offsets[k]
                        while u < taken.size and taken[u] < scalar:
                            u += 1
                        if u == taken.size or taken[u] != scalar:
                            out_index[count] = scalar
                            out_theta[count] = read(t_at[k], t_half[k], i)
                            out_grad[count] = read(g_at[k], g_half[k], i)
                            count += 1
        if wanted > 0 and count >= due:
            found = out_index, out_theta, out_grad
            count, cuts[0] = outdone(*found, count, wanted, law, exp, eps, cut, how)
            due = max(count + wanted, 2 * wanted)
        first = count
        at += n
        seen = at
        while t < taken.size and taken[t] < at + shift:
            if into.size > 0:
                bits = read(g_at[k], g_half[k], taken[t] - offsets[k])
                into[runs[k, 0] + t] = add(into[runs[k, 0] + t], bits, g_half[k])
            t += 1
    return count, stop, -1
