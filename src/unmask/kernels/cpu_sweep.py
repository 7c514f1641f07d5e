"""The look at many tensors' gradients as compiled code that shares itself out among threads."""

from __future__ import annotations

from functools import cache
from struct import Struct
from typing import Any

import numpy as np
from numba import carray, cfunc, types  # type: ignore[attr-defined]

from unmask.kernels.cpu_base import (
    FEW,
    MAGNITUDE,
    add,
    as_bits,
    as_float,
    compiled,
    first_from,
    index_at,
    larger,
    lowest,
    pointer,
    prefetch,
    read,
    stamped,
    ticket,
)
from unmask.kernels.cpu_filter import (
    PART,
    able,
    ending,
    lacking,
    least_gradient,
    line,
    outdone,
    reach,
    reaching,
)
from unmask.kernels.laws import FALLING, INFINITE
from unmask.kernels.threads import Callback

BLOCK = 1024  # scalars bounded at once
CROWD = 256  # kept scalars of a block that are looked at, at the most
OFTEN, WHILE = 8, 500  # blocks of which gradients say little, and then looked at with weights

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
    made: Any = cfunc(types.void(types.uint64), cache=True, error_model="numpy")

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
    every, but, wanted = task.every, task.but, task.wanted
    first = count  # that were found in whole blocks
    due = 2 * wanted  # when there may be many that others outdo
    kept, wide = np.uint64(task.kept), task.wide != 0
    # A block goes by gradients alone: beside a weight of 0 at exp >= 0, else beside the tensor's
    # largest, within `most`. Where that says little, which shows in `misses`, it goes by products
    # of gradients and weights for a while.
    falls = law == -1 or law == FALLING
    how, most = (law, exp, eps, np.int32(task.low), cut), np.int32(0)
    look, misses, left = how, 0, 0
    k, at, seen, t = 0, start, -1, 0
    while at < stop:
        ahead = _next(at, every, but)
        if ahead > at:
            at = ahead
            continue
        while at >= table[k + 1, START]:
            k += 1
        here = at - table[k, START]
        offset = table[k, OFFSET]
        last = table[k, LAST]
        if seen != at or here == 0:
            t = first_from(kept, wide, table[k, FIRST], last, here + offset)
        n = min((at // BLOCK + 1) * BLOCK, stop, table[k + 1, START]) - at
        g_at, g_half = np.uint64(table[k, GRAD]), table[k, GRAD_HALF] != 0
        t_at, t_half = np.uint64(table[k, THETA]), table[k, THETA_HALF] != 0
        source = g_at, g_half, t_at, t_half
        those, both = (kept, wide, t, last, offset), left > 0
        if falls and here == 0:
            most = np.int32(0)
        stale = task.cut > cut or (falls and here == 0)
        while True:
            if stale:
                cut = np.float32(task.cut)
                how, look = _judges(law, exp, eps, np.int32(task.low), cut, most)
            top, largest, many = _hits(source, here, n, both, look, those, True)
            stale = falls and largest > most
            if not stale:
                break
            most = larger(largest, as_bits(np.float32(1.25) * as_float(largest)))
        if top >= INFINITE:
            return count, at, k
        if many > 0:
            found = out_index, out_theta, out_grad, count
            count = _closer(source, here, n, both, how, look, those, *found)
            if count < 0:
                return first, at, -1
        if left > 0:
            left -= 1
        elif law != 0:
            misses = misses + 1 if many > 2 * (count - first) else max(misses - 3, 0)
            if misses == OFTEN:
                misses, left = OFTEN // 2, WHILE
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
def _next(at, every, but):  # type: ignore[no-untyped-def]
    """Where the next block to look at begins, or `at` if it is in one."""
    block = at // BLOCK
    skipped = -block % every
    if skipped == 0 and but > 0 and block % but == 0:
        skipped = every
    return (block + skipped) * BLOCK if skipped > 0 else at


@compiled
def _judges(law, exp, eps, low, cut, most):  # type: ignore[no-untyped-def]
    """(how, look): the (law, exp, eps, low, cut) that single scalars are judged by, and another for
    many at once that is no stricter, while no |θ| has bits above `most` if exp < 0."""
    falls = law == -1 or law == FALLING
    low = larger(low, least_gradient(eps + as_float(most) if falls else eps, law, exp, cut))
    how = law, exp, eps, low, cut
    return how, line(how, most) if law == FALLING else how


@compiled
def _hits(source, at, n, both, how, those, ahead):  # type: ignore[no-untyped-def]
    """(largest gradient's bits, largest weight's or -1, how many could win) of n scalars from `at`
    on, going by gradients alone or by `both` gradients and weights.

    The kept, the first of which is the t-th, are none of them: having been chosen for it they often
    could. Where they are many, they aren't asked for.
    """
    law, exp, eps, low, cut = how
    kept, wide, t, last, offset = those
    end = at + n + offset
    if both:
        top, most, many = able(*source, at, n, law, exp, eps, cut, ahead)
    else:
        most = np.int32(-1)
        if law == -1 or law == FALLING:
            most = reaching(source[2], source[3], at, n, np.int32(INFINITE), ahead)[0]
        top, many = reaching(source[0], source[1], at, n, low, ahead)
    if t + CROWD < last and index_at(kept, wide, t + CROWD) < end:
        return top, most, many
    while many > 0 and t < last and index_at(kept, wide, t) < end:
        i = index_at(kept, wide, t) - offset
        g = read(source[0], source[1], i) & MAGNITUDE
        if both:
            base = as_float(read(source[2], source[3], i) & MAGNITUDE) + eps
            lack = lacking(as_float(g), base, law, exp, cut, ending(law, exp))
            many -= as_bits(lack) <= 0  # as `able` counts
        else:
            many -= g >= low
        t += 1
    return top, most, many


@compiled
def _closer(source, at, n, both, how, look, those, out_index, out_theta, out_grad, count):  # type: ignore[no-untyped-def]
    """Look at n scalars from `at` on, ever closer, as hits are rare: by `look`, in the end by
    `how`. `those` tells the kept, of whom the t-th may be the first here.

    Returns the number found, with the `count` before, or -1 if there may be no room.
    """
    g_at, g_half, t_at, t_half = source
    law, exp, eps, low, cut = how
    kept, wide, t, last, offset = those
    end, both = ending(law, exp), both or law == -1 or law == FALLING
    if count + n > out_index.size:
        return -1
    for near in range(at, at if both else at + n, FEW):  # weights to come, all at once
        bits = reach(g_at, g_half, near, min(FEW, at + n - near), low)
        while bits != 0:
            prefetch(t_at + np.uint64((near + lowest(bits)) * (2 if t_half else 4)))
            bits &= bits - 1
    for part in range(at, at + n, PART):
        some = min(PART, at + n - part)
        while t < last and index_at(kept, wide, t) < part + offset:
            t += 1
        here = kept, wide, t, last, offset
        if both and _hits(source, part, some, True, look, here, False)[2] == 0:
            continue
        for near in range(part, part + some, FEW):
            few = min(FEW, part + some - near)
            if both and able(*source, near, few, law, exp, eps, cut, False)[2] == 0:
                continue
            bits = reach(g_at, g_half, near, few, low)
            while bits != 0:
                i = near + lowest(bits)
                bits &= bits - 1
                while t < last and index_at(kept, wide, t) < i + offset:
                    t += 1
                if t < last and index_at(kept, wide, t) == i + offset:
                    continue
                g, weight = read(g_at, g_half, i), read(t_at, t_half, i)
                base = as_float(weight & MAGNITUDE) + eps
                lack = lacking(as_float(g & MAGNITUDE), base, law, exp, cut, end)
                out_index[count], out_theta[count], out_grad[count] = i + offset, weight, g
                count += lack <= 0  # a branch would wait for the weight
    return count
