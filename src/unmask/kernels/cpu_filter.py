"""Which scalars could reach a threshold, compiled: bounds that never miss one, and judge none.

With b(x) the bits of a positive float32 read as an integer, L(x) = b(x) / 2^23 - 127 lies within
[0, 0.0861] below log2(x). So log2 of |g| / (|θ| + ε)^exp is at most L(|g|) - exp·L(|θ| + ε) plus a
known slack for any real exp, and integers compare in vector registers where powers would not.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from unmask.kernels.cpu_base import (
    INFINITE,
    MAGNITUDE,
    as_bits,
    compiled,
    magnitude,
    pointer,
)

LOG_SLACK = 0.0861  # the most that L(x) lies below log2(x)
ROUNDING = 1e-4  # of log2 in float32, per unit of (1 + |exp|), with room to spare
SMALLEST = 1.2e-38  # the least normal float32
PRODUCTS = (0.0, 1.0, 2.0, -1.0)  # exponents compared by multiplying, closer and faster
ANY = 9  # the law of all other exponents


def bounds(exp: float, eps: float, threshold: float) -> tuple[int, int, float]:
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
def largest(address, half, at, n):  # type: ignore[no-untyped-def]
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
    return cut - (np.float32(as_bits(g)) - exp * np.float32(as_bits(base)))


@compiled
def _least(g, t, law, exp, eps, cut):  # type: ignore[no-untyped-def]
    """The bits of the least that any of these scalars lacks, above 0 if none can win, and the
    largest magnitude bits of their gradients.

    By the law outside of the loops, and as integers, so that they vectorise.
    """
    least, top = np.int32(INFINITE), np.int32(0)
    if law == 0:
        for i in range(len(g)):
            size = magnitude(g[i])
            lack = as_bits(lacking(size, eps, 0, exp, cut))
            least = lack if lack < least else least
            top = as_bits(size) if as_bits(size) > top else top
    elif law == 1:
        for i in range(len(g)):
            size = magnitude(g[i])
            lack = as_bits(lacking(size, magnitude(t[i]) + eps, 1, exp, cut))
            least = lack if lack < least else least
            top = as_bits(size) if as_bits(size) > top else top
    elif law == 2:
        for i in range(len(g)):
            size = magnitude(g[i])
            lack = as_bits(lacking(size, magnitude(t[i]) + eps, 2, exp, cut))
            least = lack if lack < least else least
            top = as_bits(size) if as_bits(size) > top else top
    elif law == -1:
        for i in range(len(g)):
            size = magnitude(g[i])
            lack = as_bits(lacking(size, magnitude(t[i]) + eps, -1, exp, cut))
            least = lack if lack < least else least
            top = as_bits(size) if as_bits(size) > top else top
    else:
        for i in range(len(g)):
            size = magnitude(g[i])
            lack = as_bits(lacking(size, magnitude(t[i]) + eps, ANY, exp, cut))
            least = lack if lack < least else least
            top = as_bits(size) if as_bits(size) > top else top
    return least, top


@compiled
def least_at(g_at, g_half, t_at, t_half, at, n, law, exp, eps, cut):  # type: ignore[no-untyped-def]
    """The same of n scalars from `at` on."""
    g16 = carray(pointer(g_at), (at + n,), dtype=np.int16)[at:]
    g32 = carray(pointer(g_at), (at + n,), dtype=np.int32)[at:]
    t16 = carray(pointer(t_at), (at + n,), dtype=np.int16)[at:]
    t32 = carray(pointer(t_at), (at + n,), dtype=np.int32)[at:]
    if g_half and t_half:
        return _least(g16, t16, law, exp, eps, cut)
    if g_half:
        return _least(g16, t32, law, exp, eps, cut)
    if t_half:
        return _least(g32, t16, law, exp, eps, cut)
    return _least(g32, t32, law, exp, eps, cut)
