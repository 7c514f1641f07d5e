"""Which scalars could reach a threshold: bounds that never miss one and judge none, for kernels.

For any real exp, log2 of |g| / (|θ| + ε)^exp is at most l(|g|) - exp·l(|θ| + ε) plus a known slack,
with l(x) a polynomial near log2(x), which fits in vector registers where powers would not. The bits
b(x) of a positive float32, read as an integer, are in the order of the numbers, and b(x) / 2^23 is
at most 0.0861 below log2(x) + 127, and never above it.

With b(x) / 2^23 = e + m, 0 <= m < 1: l(x) = e + m - 127 + m (1 - m) (A - B m + C m²).
"""

from __future__ import annotations

import math

import numpy as np

INFINITE = 0x7F800000  # the bits of inf: a float32 is finite exactly if its magnitude's are below
LOG_A, LOG_B, LOG_C = (float(np.float32(x)) for x in (0.438726, 0.239058, 0.0821307))  # fitted
LOG_ERROR = 0.00014  # 0.000113 for the fit, the rest for float32's rounding
LOG_SLACK = 0.0861  # the most that bits lie below log2
ONE = 2.0**23  # of log2, in bits
ROUNDING = 1e-4  # of log2 in float32, per unit of (1 + |exp|), with room to spare
SMALLEST = 1.2e-38  # the least normal float32
PRODUCTS = (0.0, 1.0, 2.0, -1.0)  # exponents compared by multiplying, closer and faster
ANY, FALLING = 8, 9  # the laws of all other exponents, from 0 up and below it
STEEP = 1000.0  # exponents beyond overflow what is compared


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


def lost(exp: float) -> int:
    """At exp < 0, the b(|θ| + ε) from which up that power may have lost digits, or is 0."""
    most = INFINITE - (1 << 20)
    least = -124 + (LOG_SLACK + ROUNDING) * (1 - exp) + 127 * exp
    return most if least <= exp * (most / ONE) else int(least * ONE / exp)
