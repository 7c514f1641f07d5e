"""Which scalars could reach a threshold, compiled: bounds that never miss one, and judge none.

For any real exp, log2 of |g| / (|θ| + ε)^exp is at most l(|g|) - exp·l(|θ| + ε) plus a known slack,
with l(x) a polynomial near log2(x), which fits in vector registers where powers would not. The bits
b(x) of a positive float32, read as an integer, are in the order of the numbers, and b(x) / 2^23 is
at most 0.0861 below log2(x) + 127, and never above it.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit  # type: ignore[attr-defined]

from unmask.kernels.cpu_base import (
    INFINITE,
    LOG_ERROR,
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
    read,
    size,
)

LOG_SLACK = 0.0861  # the most that bits lie below log2
ONE = 2.0**23  # of log2, in bits
ROUNDING = 1e-4  # of log2 in float32, per unit of (1 + |exp|), with room to spare
SMALLEST = 1.2e-38  # the least normal float32
PRODUCTS = (0.0, 1.0, 2.0, -1.0)  # exponents compared by multiplying, closer and faster
ANY, FALLING = 8, 9  # the laws of all other exponents, from 0 up and below it
STEEP = 1000.0  # exponents beyond overflow what is compared
PART = 256  # scalars looked at together
LINE, AHEAD = 64, 4096  # bytes: what memory is fetched in, and how far ahead


def bounds(exp: float, eps: float, threshold: float) -> tuple[int, int, float]:
    """(law, least |g| bits, cut) that a score of `threshold` or more can have."""
    least = exp * math.log2(eps) if exp > 0 else 0.0  # log2 of the denominator, at exp >= 0
    normal = _normal(exp, eps)  # else torch's power may be no number to go by
    other = FALLING if exp < 0 else ANY
    known = exp in PRODUCTS and eps > SMALLEST and normal
    if threshold <= 0 or abs(exp) > STEEP:
        return int(exp) if known else other, (1 if threshold > 0 else 0), -np.inf
    log, margin = min(128.0, math.log2(threshold)), ROUNDING * (1 + abs(exp))
    if log < -125:  # such scores have few digits: they may be rounded to twice what they are
        log = max(log, -149.0) - 1
    if not normal:  # so may the denominator be, or to 0 if it is smaller yet
        least = least - 1 if eps > SMALLEST and least > -148 else -np.inf
    least += log if exp >= 0 else -np.inf  # log2 of |g|
    low = 1 if least < -126 else int(np.float32(2.0 ** min(least - margin, 127.9)).view(np.int32))
    if not normal:
        return other, low, -np.inf
    if known and -100 < log < 100 and (least > -125 or exp < 0):
        return int(exp), low, threshold * 2.0**-margin
    return other, low, log - LOG_ERROR * (1 + abs(exp)) - margin


def raising(law: int, exp: float, eps: float) -> tuple[float, float, float, float]:
    """(scale, less, above, below): of a cut that a candidate just meets, within (above, below),
    scale · cut - less is a cut that scores as good as that candidate's all meet."""
    margin = 2 * ROUNDING * (1 + abs(exp))  # of its score, and of the others'
    if not _normal(exp, eps):
        return 1.0, 0.0, np.inf, np.inf
    if law < ANY:
        above = max(-100.0, -120.0 - max(0.0, exp) * math.log2(eps))
        return 2.0**-margin, 0.0, 2.0**above, 2.0**100
    return 1.0, 2 * LOG_ERROR * (1 + abs(exp)) + margin, -100.0, 100.0


def _normal(exp: float, eps: float) -> bool:
    """Whether no weight is so small that its power has lost digits, or is 0."""
    return abs(exp) <= STEEP and (exp <= 0 or (eps > SMALLEST and exp * math.log2(eps) > -120))


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
def lost(exp):  # type: ignore[no-untyped-def]
    """At exp < 0, the b(|θ| + ε) from which up that power may have lost digits, or is 0."""
    most = INFINITE - (1 << 20)
    least = -124 + np.float32(LOG_SLACK + ROUNDING) * (1 - exp) + 127 * exp
    return np.int32(most if least <= exp * np.float64(most / ONE) else least * ONE / exp)


@compiled
def lacking(g, base, law, exp, cut):  # type: ignore[no-untyped-def]
    """How far a score is below the threshold that `cut` was made for: above 0 if it can't win."""
    if law == 0:
        return cut - g
    if law == 1:
        return cut * base - g
    if law == 2:
        return cut * (base * base) - g
    if law == -1:
        return cut - g * base
    if law == FALLING and as_bits(base) >= lost(exp):
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
def least_gradient(eps, law, exp, cut):  # type: ignore[no-untyped-def]
    """The least |g| bits, 0 or more, with which a scalar may lack nothing, at exp >= 0."""
    if law == ANY:  # of l(|g|), less by how much l may stray
        slack = (2 * LOG_ERROR + ROUNDING) * (1 + abs(exp))
        log = np.float64(cut + exp * logarithm(eps)) - slack
        return as_bits(np.float32(2.0 ** min(log, 127.9))) if log > -125 else np.int32(0)
    if not cut > 0 or as_bits(eps) >= INFINITE:
        return np.int32(0)
    return as_bits(cut if law == 0 else cut * eps if law == 1 else cut * (eps * eps))


@compiled
def line(how, most):  # type: ignore[no-untyped-def]
    """The (law, exp, eps, low, cut) of an exp < 0 as one of products, that lets no less through
    while no |θ| has bits above `most`; or as it was, where numbers are out of hand.

    Of x = |θ| + eps, x^-exp is at most α + βx = β (|θ| + eps'): its chord, or else its tangent.
    """
    _, exp, eps, low, cut = how
    size, start, far = np.float64(-exp), np.float64(eps), np.float64(as_float(most))
    tame = far > 0 and as_bits(eps + as_float(most)) < lost(exp)
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
    reach = 2.0**cut / slope * (1 - 1e-5)  # more than float32 rounds
    if not (1e-30 < reach < 1e30 and 1e-30 < base < 1e30):
        return how
    return -1, exp, np.float32(base), low, np.float32(reach)


@njit(inline="always")
def _able_by(g, t, law, exp, eps, cut):  # type: ignore[no-untyped-def]
    top, most, many = np.int32(0), np.int32(0), np.int32(0)
    for i in range(len(g)):
        grad, weight = magnitude(g[i]), magnitude(t[i])
        top, most = larger(as_bits(grad), top), larger(as_bits(weight), most)
        lack = as_bits(lacking(grad, weight + eps, law, exp, cut))
        many = counted(many, np.int32(0), lack)
    return top, most, many


@compiled
def _able(g, t, law, exp, eps, cut):  # type: ignore[no-untyped-def]
    """By the law outside of the loops, and as integers, so that they vectorise."""
    if law == 0:
        return _able_by(g, t, 0, exp, eps, cut)
    if law == 1:
        return _able_by(g, t, 1, exp, eps, cut)
    if law == 2:
        return _able_by(g, t, 2, exp, eps, cut)
    if law == -1:
        return _able_by(g, t, -1, exp, eps, cut)
    if law == FALLING:
        return _able_by(g, t, FALLING, exp, eps, cut)
    return _able_by(g, t, ANY, exp, eps, cut)


@compiled
def able(g_at, g_half, t_at, t_half, at, n, law, exp, eps, cut, ahead):  # type: ignore[no-untyped-def]
    """(largest bits of gradients', of weights' magnitudes, as float32's, how many could win) of n
    scalars from `at` on. What follows is fetched meanwhile if it is looked at `ahead`."""
    top, most, many, width = np.int32(0), np.int32(0), np.int32(0), 2 if g_half else 4
    if g_half != t_half:  # seldom, and to have these loops vectorise takes a second for each
        for i in range(at, at + n):
            g, t = read(g_at, g_half, i) & MAGNITUDE, read(t_at, t_half, i) & MAGNITUDE
            many += as_bits(lacking(as_float(g), as_float(t) + eps, law, exp, cut)) <= 0
            top, most = larger(g, top), larger(t, most)
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
    left = 0
    for i in range(count):
        base = as_float(theta[i] & MAGNITUDE) + eps
        if lacking(as_float(grad[i] & MAGNITUDE), base, law, exp, higher) <= 0:
            index[left], theta[left], grad[left] = index[i], theta[i], grad[i]
            left += 1
    return left, higher
