"""The look at many tensors' gradients as compiled code that shares itself out among threads."""

from __future__ import annotations

from functools import cache
from struct import Struct
from typing import Any

import numpy as np
from numba import carray, cfunc, types  # type: ignore[attr-defined]

from unmask.kernels.cpu_base import (
    INFINITE,
    MAGNITUDE,
    add,
    as_float,
    compiled,
    first_from,
    index_at,
    larger,
    pointer,
    read,
    stamped,
    ticket,
)
from unmask.kernels.cpu_filter import (
    ANY,
    FALLING,
    PART,
    able,
    beyond,
    lacking,
    least_gradient,
    outdone,
    reachable,
)
from unmask.kernels.threads import Callback

BLOCK = 1024  # scalars bounded at once
CROWD, MANY = 16, 256  # kept scalars of a block that are looked at: a product costs less
FEW = 32  # scalars of a part with candidates that are looked at together

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
PACKED = Struct(f"{len(WORDS)}q{len(REALS)}d")


@cache
def looker() -> Any:
    """What each thread does with a task, for `at_once`, by its address."""
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
    kept, wide, crowd = np.uint64(task.kept), task.wide != 0, CROWD if law < ANY else MANY
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
            if law != -1 and law != FALLING:  # else it depends on the weights
                low = larger(low, least_gradient(eps, law, exp, cut))
        n = min((block + 1) * BLOCK, stop, table[k + 1, START]) - at
        g_at, g_half = np.uint64(table[k, GRAD]), table[k, GRAD_HALF] != 0
        t_at, t_half = np.uint64(table[k, THETA]), table[k, THETA_HALF] != 0
        source = g_at, g_half, t_at, t_half
        top, least = reachable(*source, here, n, law, exp, eps, low, cut)
        if top >= INFINITE:
            return count, at, k
        those = kept, wide, t, last, offset, crowd
        if top >= least and _others(g_at, g_half, here, n, least, those):
            how = law, exp, eps, low, cut
            count = _closer(source, here, n, how, those, out_index, out_theta, out_grad, count)
            if count < 0:
                return first, at, -1
        if wanted > 0 and count >= due:
            found = out_index, out_theta, out_grad, count
            raised = task.scale, task.less, task.above, task.below  # as `raising` has it
            count, task.cut = outdone(*found, wanted, law, exp, eps, cut, raised)
            due = max(count + wanted, 2 * wanted)
        first = count
        at += n
        seen = at
        while t < last and index_at(kept, wide, t) < here + n + offset:
            if task.into != 0:
                into[t] = add(into[t], read(g_at, g_half, index_at(kept, wide, t) - offset), g_half)
            t += 1
    return count, stop, -1


@compiled
def _crowded(those, end):  # type: ignore[no-untyped-def]
    """Whether more than `crowd` of the kept, from the t-th on, come before the `end`."""
    kept, wide, t, last, offset, crowd = those
    return t + crowd < last and index_at(kept, wide, t + crowd) < end + offset


@compiled
def _others(address, half, at, n, least, those):  # type: ignore[no-untyped-def]
    """Whether any of n gradients from `at` on is large enough but those of the kept, the first of
    which is the t-th. Having been chosen for it, these often are. Of many kept it isn't asked."""
    kept, wide, t, last, offset, _ = those
    many, end = -1, at + n + offset
    if _crowded(those, at + n):
        return True
    while t < last and index_at(kept, wide, t) < end:
        if many < 0:
            many = beyond(address, half, at, n, least)
        many -= (read(address, half, index_at(kept, wide, t) - offset) & MAGNITUDE) >= least
        t += 1
    return many != 0


@compiled
def _closer(source, at, n, how, those, out_index, out_theta, out_grad, count):  # type: ignore[no-untyped-def]
    """Look at n scalars from `at` on, ever closer, as hits are rare. `those` tells the kept, of
    whom the t-th may be the first here.

    Returns the number found, with the `count` before, or -1 if there may be no room.
    """
    g_at, g_half, t_at, t_half = source
    law, exp, eps, low, cut = how
    kept, wide, t, last, offset, crowd = those
    few_kept = not _crowded(those, at + n)
    for part in range(at, at + n, PART):
        some = min(PART, at + n - part)
        start = part + offset
        while t < last and index_at(kept, wide, t) < start:
            t += 1
        least, here = low, (kept, wide, t, last, offset, crowd)
        if law != -1:  # whose products take no longer than this
            top, least = reachable(*source, part, some, law, exp, eps, low, cut)
            if top < least:
                continue
        if law >= ANY and not _others(g_at, g_half, part, some, least, here):
            continue
        tame = ANY if law == FALLING and least > low else law  # no power has lost digits
        left, u = able(*source, part, some, tame, exp, eps, cut), t
        while few_kept and u < last and index_at(kept, wide, u) < start + some:
            i = index_at(kept, wide, u) - offset
            if read(g_at, g_half, i) & MAGNITUDE >= least:
                left -= able(*source, i, 1, tame, exp, eps, cut)
            u += 1
        if left <= 0:
            continue
        if count + n > out_index.size:
            return -1
        for near in range(part, part + some, FEW):
            few = min(FEW, part + some - near)
            if able(*source, near, few, tame, exp, eps, cut) == 0:
                continue
            for i in range(near, near + few):
                g, weight = read(g_at, g_half, i), read(t_at, t_half, i)
                size, base = g & MAGNITUDE, as_float(weight & MAGNITUDE) + eps
                if size < low or not lacking(as_float(size), base, law, exp, cut) <= 0:
                    continue
                while t < last and index_at(kept, wide, t) < i + offset:
                    t += 1
                if t == last or index_at(kept, wide, t) != i + offset:
                    out_index[count], out_theta[count], out_grad[count] = i + offset, weight, g
                    count += 1
    return count
