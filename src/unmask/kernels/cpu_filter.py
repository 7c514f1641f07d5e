"""The compiled side of `laws`: which scalars could reach a threshold, told in vector registers."""

from __future__ import annotations

import numpy as np
from numba import carray, njit  # type: ignore[attr-defined]

from unmask.kernels.cpu_base import (
    COMMON,
    FEW,
    MAGNITUDE,
    as_bits,
    as_float,
    compiled,
    counted,
    larger,
    logarithm,
    magnitude,
    pointer,
    prefetch,
    reached,
    read,
    size,
)
from unmask.kernels.laws import (
    ANY,
    FALLING,
    INFINITE,
    LOG_ERROR,
    LOG_SLACK,
    ONE,
    ROUNDING,
    SMALLEST,
    lost,
)

PART = 256  # scalars looked at together
LINE, AHEAD = 64, 4096  # bytes: what memory is fetched in, and how far ahead
_lost = compiled(lost)


@compiled
def ending(law, exp):  # type: ignore[no-untyped-def]
    """The `end` that `lacking` is to have."""
    return np.int32(_lost(exp)) if law == FALLING else np.int32(INFINITE)


@compiled
def fetch(address, start, stop):  # type: ignore[no-untyped-def]
    """Have the memory of these bytes from an address on fetched, but AHEAD of them: processors
    don't by themselves look beyond a page."""
    for byte in range(start + AHEAD, stop + AHEAD, LINE):
        prefetch(address + np.uint64(byte))


@compiled
def reaching(address, half, at, n, low, ahead):  # type: ignore[no-untyped-def]
    """(largest, how many are `low` or more) of n numbers' magnitude bits, as float32's, from `at`
    on. What follows is fetched meanwhile if it is looked at `ahead`."""
    top16, top32, many16, many32 = np.int16(0), np.int32(0), np.int16(0), np.int32(0)
    low16, width = np.int16((np.int64(low) + 0xFFFF) >> 16), 2 if half else 4
    for first in range(at, at + n, PART):
        last = min(first + PART, at + n)
        if ahead:
            fetch(address, first * width, last * width)
        if half:
            x16 = carray(pointer(address), (last,), dtype=np.int16)[first:last]
            for i in range(len(x16)):
                top16 = larger(size(x16[i]), top16)
                many16 = counted(many16, size(x16[i]), low16)
        else:
            x32 = carray(pointer(address), (last,), dtype=np.int32)[first:last]
            for i in range(len(x32)):
                top32 = larger(size(x32[i]), top32)
                many32 = counted(many32, size(x32[i]), low)
    if half:
        return np.int32(top16) << np.int32(16), np.int32(many16)
    return top32, many32


@compiled
def reach(address, half, at, n, low):  # type: ignore[no-untyped-def]
    """Which of n numbers, FEW at the most, `reaching` counts: a bit for each."""
    if n == FEW and half:
        return reached(address + np.uint64(2 * at), np.int16((np.int64(low) + 0xFFFF) >> 16))
    if n == FEW:
        return reached(address + np.uint64(4 * at), low)
    bits = np.int64(0)
    for i in range(n):
        bits |= np.int64(read(address, half, at + i) & MAGNITUDE >= low) << i
    return bits


@compiled
def lacking(g, base, law, exp, cut, end):  # type: ignore[no-untyped-def]
    """How far a score is below the threshold that `cut` was made for: above 0 if it can't win.

    `end` is the law's `lost`: asked for here it would keep loops from being vectorised.
    """
    if law == 0:
        return cut - g
    if law == 1:
        return cut * base - g
    if law == 2:
        return cut * (base * base) - g
    if law == -1:
        return cut - g * base
    if law == FALLING and as_bits(base) >= end:
        return np.float32(-np.inf)
    return cut - (logarithm(g) - exp * logarithm(base))


@compiled
def met(g, base, law, exp):  # type: ignore[no-untyped-def]
    """The cut that a scalar just meets, -inf if its score may be no normal number."""
    power = exp * (np.float32(as_bits(base)) / np.float32(ONE) - np.float32(127))
    most = np.float32(120) - np.float32(LOG_SLACK) * abs(exp)
    digits = min(g, base) >= np.float32(SMALLEST)  # else bits are no logarithm
    if not digits or as_bits(base) >= INFINITE or not abs(power) < most:
        return np.float32(-np.inf)
    if law == 0:
        return g
    if law == 1:
        return g / base
    if law == 2:
        return g / (base * base)
    if law == -1:
        return g * base
    return logarithm(g) - exp * logarithm(base)


@compiled
def least_gradient(base, law, exp, cut):  # type: ignore[no-untyped-def]
    """The least |g| bits, 0 or more, with which a scalar may lack nothing, if `base` is as good as
    any |θ| + eps: the least of them at exp >= 0, else the largest."""
    if law == ANY or (law == FALLING and as_bits(base) < _lost(exp)):
        slack = (2 * LOG_ERROR + ROUNDING) * (1 + abs(exp))  # by which l may stray
        log = np.float64(cut + exp * logarithm(base)) - slack
        return as_bits(np.float32(2.0 ** min(log, 127.9))) if log > -125 else np.int32(0)
    if law == FALLING or not cut > 0 or not as_bits(base) < INFINITE:
        return np.int32(0)
    if law == -1:
        least = np.float64(cut) / np.float64(base) * (1 - 1e-6)  # as products are rounded
        return as_bits(np.float32(min(least, 3e38))) if least > 2 * SMALLEST else np.int32(0)
    return as_bits(cut if law == 0 else cut * base if law == 1 else cut * (base * base))


@compiled
def line(how, most):  # type: ignore[no-untyped-def]
    """The (law, exp, eps, low, cut) of an exp < 0 as one of products, that lets no less through
    while no |θ| has bits above `most`; or as it was, where numbers or the power are out of hand.

    Of x = |θ| + eps, x^-exp is at most α + βx = β (|θ| + eps'): its chord, or else its tangent.
    """
    _, exp, eps, low, cut = how
    size, start, far = np.float64(-exp), np.float64(eps), np.float64(as_float(most))
    tame = far > 0 and as_bits(eps + as_float(most)) < _lost(exp)
    if not (tame and size > 1e-3 and abs(cut) < 100):
        return how
    if size < 1:
        middle = start + far / 2
        slope = size * middle ** (size - 1)
        base = start + middle * (1 / size - 1)
    else:
        far = max(far, 1e-3 * start)
        slope = ((start + far) ** size - start**size) / far
        base = start**size / slope
        if slope * (far / 2 + base) > 1.05 * (start + far / 2) ** size:  # too much gets through
            return how
    reach = 2.0**cut / slope * (1 - 1e-5)  # more than float32 rounds
    if not (1e-30 < reach < 1e30 and 1e-30 < base < 1e30):
        return how
    return -1, exp, np.float32(base), low, np.float32(reach)


@njit(inline="always", **COMMON)
def _able_by(g, t, law, exp, eps, cut, end):  # type: ignore[no-untyped-def]
    top, most, many = np.int32(0), np.int32(0), np.int32(0)
    for i in range(len(g)):
        grad, weight = magnitude(g[i]), magnitude(t[i])
        top, most = larger(as_bits(grad), top), larger(as_bits(weight), most)
        lack = as_bits(lacking(grad, weight + eps, law, exp, cut, end))
        many = counted(many, np.int32(0), lack)
    return top, most, many


@compiled
def _able(g, t, law, exp, eps, cut):  # type: ignore[no-untyped-def]
    """By the law outside of the loops, and as integers, so that they vectorise."""
    end = ending(law, exp)
    if law == 0:
        return _able_by(g, t, 0, exp, eps, cut, end)
    if law == 1:
        return _able_by(g, t, 1, exp, eps, cut, end)
    if law == 2:
        return _able_by(g, t, 2, exp, eps, cut, end)
    if law == -1:
        return _able_by(g, t, -1, exp, eps, cut, end)
    if law == FALLING:
        return _able_by(g, t, FALLING, exp, eps, cut, end)
    return _able_by(g, t, ANY, exp, eps, cut, end)


@compiled
def able(g_at, g_half, t_at, t_half, at, n, law, exp, eps, cut, ahead):  # type: ignore[no-untyped-def]
    """(largest bits of gradients', of weights' magnitudes, as float32's, how many could win) of n
    scalars from `at` on. What follows is fetched meanwhile if it is looked at `ahead`."""
    top, most, many, width = np.int32(0), np.int32(0), np.int32(0), 2 if g_half else 4
    if g_half != t_half:  # seldom, and to have these loops vectorise takes a second for each
        end = ending(law, exp)
        for i in range(at, at + n):
            g, t = read(g_at, g_half, i) & MAGNITUDE, read(t_at, t_half, i) & MAGNITUDE
            lack = as_bits(lacking(as_float(g), as_float(t) + eps, law, exp, cut, end))
            top, most, many = larger(g, top), larger(t, most), many + (lack <= 0)
        return top, most, many
    for first in range(at, at + n, PART):
        last = min(first + PART, at + n)
        if ahead:
            fetch(g_at, first * width, last * width)
            fetch(t_at, first * width, last * width)
        if g_half:
            g16 = carray(pointer(g_at), (last,), dtype=np.int16)[first:]
            t16 = carray(pointer(t_at), (last,), dtype=np.int16)[first:]
            a, b, c = _able(g16, t16, law, exp, eps, cut)
        else:
            g32 = carray(pointer(g_at), (last,), dtype=np.int32)[first:]
            t32 = carray(pointer(t_at), (last,), dtype=np.int32)[first:]
            a, b, c = _able(g32, t32, law, exp, eps, cut)
        top, most, many = larger(a, top), larger(b, most), many + c
    return top, most, many


@compiled
def nth(numbers, n):  # type: ignore[no-untyped-def]
    """The n-th smallest, from 0 on; the vector is partly sorted on the way. (numba's `np.partition`
    takes ten seconds to compile.)"""
    first, last = 0, len(numbers) - 1
    while first < last:
        pivot, i, j = numbers[(first + last) // 2], first, last
        while i <= j:
            while numbers[i] < pivot:
                i += 1
            while numbers[j] > pivot:
                j -= 1
            if i <= j:
                numbers[i], numbers[j] = numbers[j], numbers[i]
                i, j = i + 1, j - 1
        if n <= j:  # those up to j aren't above the pivot, those from i on not below it
            last = j
        elif n >= i:
            first = i
        else:
            break
    return numbers[n]


@compiled
def outdone(index, theta, grad, count, wanted, law, exp, eps, cut, raising):  # type: ignore[no-untyped-def]
    """Drop of `count` candidates (weights and gradients as bits) those that `wanted` of them
    certainly outdo; returns how many are left and the cut that did it."""
    cuts = np.empty(count, dtype=np.float32)
    for i in range(count):
        base = as_float(theta[i] & MAGNITUDE) + eps
        cuts[i] = met(as_float(grad[i] & MAGNITUDE), base, law, exp)
    scale, less, above, below = raising
    last = nth(cuts, count - wanted)
    higher = np.float32(scale * last - less)
    if not above < last < below or not higher > cut:
        return count, cut
    left, end = 0, ending(law, exp)
    for i in range(count):
        base = as_float(theta[i] & MAGNITUDE) + eps
        if lacking(as_float(grad[i] & MAGNITUDE), base, law, exp, higher, end) <= 0:
            index[left], theta[left], grad[left] = index[i], theta[i], grad[i]
            left += 1
    return left, higher
