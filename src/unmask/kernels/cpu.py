"""The inner loops as compiled CPU code, each over many tensors at once and on several threads.

With b(x) the bits of a positive float32 read as an integer, L(x) = b(x) / 2^23 - 127 lies within
[0, 0.0861] below log2(x). So log2 of |g| / (|θ| + ε)^exp is at most L(|g|) - exp·L(|θ| + ε) plus a
known slack for any real exp, and integers compare in vector registers where powers would not.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from unmask.kernels.cpu_base import (
    HALF,
    INFINITE,
    MAGNITUDE,
    add,
    addresses,
    as_bits,
    as_float,
    compiled,
    halves,
    in_threads,
    pointer,
    read,
    shares,
)
from unmask.kernels.cpu_moves import gather, merge, scatter

__all__ = ["Sweep", "gather", "handles", "merge", "scatter"]

BLOCK = 1024  # scalars bounded at once: they and what is made of them stay in the first cache
FEW = 64  # scalars of a block with candidates that are looked at together
LOG_SLACK = 0.0861  # the most that L(x) lies below log2(x)
ROUNDING = 1e-4  # of log2 in float32, per unit of (1 + |exp|), with room to spare
SMALLEST = 1.2e-38  # the least normal float32
PRODUCTS = (0.0, 1.0, 2.0, -1.0)  # exponents compared by multiplying, closer and faster
ANY = 9  # the law of all other exponents
INDEX = (torch.int32, torch.int64)


def handles(tensor: Tensor) -> bool:
    """Whether these kernels can work on the tensor where it lies."""
    return (tensor.dtype in HALF or tensor.dtype in INDEX) and tensor.is_contiguous()


class Sweep:
    """A pass over many 1-D tensors for scalars that could reach a threshold, in pieces of any size.

    offsets  global index of each tensor's first scalar, ascending
    taken    for each tensor, the sorted global indices that are out of the question
    into     for each tensor, None or where to add the gradients of its `taken` on the way: float32,
             done for a range once it was run
    law      (exp, eps) of the score |g| / (|θ| + eps)^exp
    """

    def __init__(
        self,
        thetas: Sequence[Tensor],
        grads: Sequence[Tensor],
        offsets: Sequence[int],
        taken: Sequence[Tensor],
        into: Sequence[Tensor | None],
        law: tuple[float, float],
    ) -> None:
        like = taken[0][:0]
        if any(t.dtype != like.dtype for t in taken):
            taken = [t.long() for t in taken]
            like = like.long()
        self._keep = (thetas, grads, taken, into)  # alive as long as their addresses are used
        self._law = law
        self._starts = np.array([0, *accumulate(map(len, thetas))], dtype=np.int64)
        self._offsets = np.array(offsets, dtype=np.int64)
        self._arrays = (
            *(self._starts, self._offsets),
            *(addresses(grads), halves(grads), addresses(thetas), halves(thetas)),
            *(addresses(taken), np.array([len(t) for t in taken], dtype=np.int64)),
            np.array([0 if x is None else x.data_ptr() for x in into], dtype=np.uint64),
            like.numpy(),
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
    ) -> tuple[list[list[Tensor]], list[tuple[int, int]], int]:
        """Look at scalars [start, stop) of the tensors laid end to end, or rather at each block of
        them whose number is a multiple of `every` and none of `but`.

        Returns candidates as [indices (int64), weights, gradients (float32)], the ranges left
        unseen because more than `capacity` turned up on a thread, and the position of a tensor with
        a gradient that isn't finite, or -1.
        """
        exp, eps = self._law
        law, low, cut = _bounds(exp, eps, threshold)
        constants = law, np.float32(exp), np.float32(eps), np.int32(low), np.float32(cut)

        rooms: dict[int, Any] = {}  # for candidates, one for each thread, as they aren't small
        counts: list[int] = []

        def look(a: int, b: int) -> tuple[list[Tensor], int, int]:
            if sum(counts) > capacity:  # better raise the threshold first
                return [], a, -1
            room = rooms.get(threading.get_ident())
            if room is None:
                room = np.empty(capacity, dtype=np.int64), *np.empty((2, capacity), np.float32)
                rooms[threading.get_ident()] = room
            where = *self._arrays, a, b, every, but
            count, end, bad = _sweep(*where, *constants, *room)
            counts.append(count)
            return [torch.from_numpy(x[:count].copy()) for x in room], end, bad

        ranges = shares(start, stop)
        looked = in_threads(look, ranges)
        left: list[tuple[int, int]] = []
        for (_, b), (_, end, _) in zip(ranges, looked, strict=True):
            if end < b:  # right after another, they are one
                first = left.pop()[0] if left and left[-1][1] == end else end
                left.append((first, b))
        bad = max(bad for _, _, bad in looked)
        return [found for found, _, _ in looked if found and len(found[0])], left, bad


def _bounds(exp: float, eps: float, threshold: float) -> tuple[int, int, float]:
    """(law, least |g| bits, cut) that a score of `threshold` or more can have."""
    if threshold <= 0 or not math.isfinite(threshold):
        return ANY, (1 if threshold > 0 else 0), -np.inf
    log, margin = math.log2(threshold), ROUNDING * (1 + abs(exp))
    least = log + exp * math.log2(eps) if exp >= 0 else -np.inf
    # The bound by |g| alone: the denominator is at least eps^exp where exp >= 0.
    low = 1 if least < -126 else int(np.float32(2.0 ** min(least - margin, 127.9)).view(np.int32))
    if exp > 0 and exp * math.log2(eps) < -125:  # torch's power may be no normal number
        return ANY, low, -np.inf
    if exp in PRODUCTS and -100 < log < 100 and (least > -125 or exp < 0) and eps > SMALLEST:
        return int(exp), low, threshold * 2.0**-margin
    slack = LOG_SLACK * (1 + max(0.0, -exp)) + margin
    return ANY, low, (log - slack + 127 - 127 * exp) * 2.0**23


@compiled
def _top(address, half, at, n):  # type: ignore[no-untyped-def]
    """The largest magnitude bits, as float32's, of n numbers from `at` on."""
    if half:
        x16 = carray(pointer(address), (at + n,), dtype=np.uint16)[at : at + n]
        top16 = np.uint16(0)
        for i in range(n):
            bits16 = x16[i] & np.uint16(0x7FFF)
            top16 = bits16 if bits16 > top16 else top16
        return np.int32(top16) << np.int32(16)
    x32 = carray(pointer(address), (at + n,), dtype=np.int32)[at : at + n]
    top = np.int32(0)
    for i in range(n):
        bits = x32[i] & MAGNITUDE
        top = bits if bits > top else top
    return top


@compiled
def _magnitudes(address, half, at, n, plus, out):  # type: ignore[no-untyped-def]
    """|x| + plus, float32, of n numbers from `at` on, into `out`."""
    if half:
        x16 = carray(pointer(address), (at + n,), dtype=np.int16)[at : at + n]
        for i in range(n):
            out[i] = as_float((np.int32(x16[i]) << np.int32(16)) & MAGNITUDE) + plus
    else:
        x32 = carray(pointer(address), (at + n,), dtype=np.int32)[at : at + n]
        for i in range(n):
            out[i] = as_float(x32[i] & MAGNITUDE) + plus


@compiled
def _could_win(g, base, law, exp, cut):  # type: ignore[no-untyped-def]
    """Whether a score may reach the threshold that `cut` was made for."""
    if law == 0:
        return g >= cut
    if law == 1:
        return g >= cut * base
    if law == 2:
        return g >= cut * (base * base)
    if law == -1:
        return g * base >= cut
    return np.float32(as_bits(g)) - exp * np.float32(as_bits(base)) >= cut


@compiled
def _hits(g, base, n, law, exp, cut):  # type: ignore[no-untyped-def]
    """How many of n scalars could win; by the law outside of the loops, so that they vectorise."""
    hits = np.int32(0)
    if law == 0:
        for i in range(n):
            hits += np.int32(_could_win(g[i], base[i], 0, exp, cut))
    elif law == 1:
        for i in range(n):
            hits += np.int32(_could_win(g[i], base[i], 1, exp, cut))
    elif law == 2:
        for i in range(n):
            hits += np.int32(_could_win(g[i], base[i], 2, exp, cut))
    elif law == -1:
        for i in range(n):
            hits += np.int32(_could_win(g[i], base[i], -1, exp, cut))
    else:
        for i in range(n):
            hits += np.int32(_could_win(g[i], base[i], ANY, exp, cut))
    return hits


@compiled
def _sweep(  # type: ignore[no-untyped-def]
    starts, offsets, g_at, g_half, t_at, t_half, taken_at, taken_len, into_at,
    like, start, stop, every, but, law, exp, eps, low, cut, out_index, out_theta, out_grad,
):  # fmt: skip
    """(number found, where it stopped, tensor with a gradient that isn't finite or -1).

    Loops over a block are kept free of branches so that they vectorise.
    """
    count = 0
    out_theta, out_grad = out_theta.view(np.int32), out_grad.view(np.int32)
    g = np.empty(BLOCK, dtype=np.float32)
    base = np.empty(BLOCK, dtype=np.float32)
    k = np.searchsorted(starts, start, side="right") - 1
    at, seen, t = start, -1, 0
    while at < stop:
        block = at // BLOCK
        if block % every != 0 or (but > 0 and block % but == 0):
            at = (block + 1) * BLOCK
            continue
        while at >= starts[k + 1]:
            k += 1
        shift = offsets[k] - starts[k]  # from the place in the sweep to the global index
        taken = carray(pointer(taken_at[k]), (taken_len[k],), like.dtype)
        if seen != at or at == starts[k]:
            t = np.searchsorted(taken, at + shift)
        into = carray(pointer(into_at[k]), (taken_len[k],), dtype=np.float32)
        n = min((block + 1) * BLOCK, stop, starts[k + 1]) - at
        here = at - starts[k]
        top = _top(g_at[k], g_half[k], here, n)
        if top >= INFINITE:
            return count, at, k
        if top >= low:
            _magnitudes(g_at[k], g_half[k], here, n, np.float32(0), g)
            _magnitudes(t_at[k], t_half[k], here, n, eps, base)
            if _hits(g, base, n, law, exp, cut) > 0:
                if count + n > out_index.size:
                    return count, at, -1
                u = t
                for part in range(0, n, FEW):  # hits are rare: a few at a time, then each
                    some = min(FEW, n - part)
                    near = _hits(
                        g[part : part + some], base[part : part + some], some, law, exp, cut
                    )
                    if near == 0:
                        continue
                    for i in range(part, part + some):
                        if as_bits(g[i]) < low or not _could_win(g[i], base[i], law, exp, cut):
                            continue
                        scalar = at + i + shift
                        while u < taken.size and taken[u] < scalar:
                            u += 1
                        if u == taken.size or taken[u] != scalar:
                            out_index[count] = scalar
                            out_theta[count] = read(t_at[k], t_half[k], here + i)
                            out_grad[count] = read(g_at[k], g_half[k], here + i)
                            count += 1
        at += n
        seen = at
        while t < taken.size and taken[t] < at + shift:
            if into_at[k] != 0:
                place = taken[t] - offsets[k]
                into[t] = add(into[t], read(g_at[k], g_half[k], place), g_half[k])
            t += 1
    return count, stop, -1
