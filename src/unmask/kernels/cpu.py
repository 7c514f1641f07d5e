"""The scan as compiled CPU code: one pass over the gradient's bits; weights only where they count.

With b(x) the bits of a positive float32 read as an integer, L(x) = b(x) / 2^23 - 127 lies within
[0, 0.0861] below log2(x). So log2 of |g| / (|θ| + ε)^exp is at most L(|g|) - exp·L(|θ| + ε) plus a
known slack for any real exp, and integers compare in vector registers where powers would not.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

INFINITE = 0x7F800000  # b(inf): a float32 is finite exactly if its magnitude's bits are below
MAGNITUDE = np.int32(0x7FFFFFFF)
BLOCK = 2048  # scalars bounded at once: 8 KiB of gradient, well inside the first cache
LOG_SLACK = 0.0861  # the most that L(x) lies below log2(x)
LOG_ROUNDING = 1e-4  # float32 rounding of the keys, per unit of (1 + |exp|), with room to spare
SMALLEST = 1.2e-38  # below the normal numbers L(x) no longer bounds log2(x) from below

# How far a dtype's bits are shifted to be those of the same number in float32.
SHIFTS = {torch.float32: 0, torch.bfloat16: 16}


def scan(
    theta: Tensor,
    grad: Tensor,
    start: int,
    stop: int,
    law: tuple[float, float],
    threshold: float,
    taken: Tensor,
    offset: int,
    capacity: int,
) -> tuple[Tensor, int, bool]:
    """As `reference.scan`, as a filter: a superset of it by a factor of about 2^(slack)."""
    exp, eps = law
    low, cut = _bounds(exp, eps, threshold)
    out = np.empty(max(capacity, BLOCK), dtype=np.int64)
    count, end, worst = _scan(
        _bits(grad),
        _bits(theta),
        start,
        stop,
        SHIFTS[grad.dtype],
        SHIFTS[theta.dtype],
        np.float32(exp),
        np.float32(eps),
        np.int32(low),
        np.float32(cut),
        taken.numpy(),
        offset,
        out,
    )
    return torch.from_numpy(out[:count]), end, worst < INFINITE


def _bounds(exp: float, eps: float, threshold: float) -> tuple[int, float]:
    """(least |g| bits, least key) that a score of `threshold` or more can have."""
    if threshold <= 0 or not math.isfinite(threshold):
        return (1 if threshold > 0 else 0), -np.inf
    log = math.log2(threshold)
    slack = LOG_SLACK * (1 + max(0.0, -exp)) + LOG_ROUNDING * (1 + abs(exp))
    # The bound by |g| alone: the denominator is at least eps^exp where exp >= 0.
    least = log + exp * math.log2(eps) - 1e-4 * (1 + abs(exp)) if exp >= 0 else -np.inf
    low = 1 if least < -126 else int(np.float32(2.0 ** min(least, 127.9)).view(np.int32))
    if eps < SMALLEST and exp > 0:
        return low, -np.inf
    return low, (log - slack + 127 - 127 * exp) * 2.0**23


def _bits(x: Tensor) -> np.ndarray:
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32).numpy()


@njit(nogil=True, cache=True)
def _scan(grad, theta, start, stop, g_shift, t_shift, exp, eps, low, cut, taken, offset, out):  # type: ignore[no-untyped-def]
    """(number emitted, where it stopped, largest |g| bits seen); loops are kept free of branches
    so that they vectorise."""
    count = 0
    worst = np.int32(0)
    t = np.searchsorted(taken, start + offset)
    base = np.empty(BLOCK, dtype=np.float32)
    base_bits = base.view(np.int32)
    g_bits = np.empty(BLOCK, dtype=np.int32)
    at = start
    while at < stop:
        end = min(at + BLOCK, stop)
        g = grad[at:end]
        n = g.size
        top = np.int32(0)
        for i in range(n):
            bits = (np.int32(g[i]) << g_shift) & MAGNITUDE
            top = bits if bits > top else top
        worst = top if top > worst else worst
        if top >= low:
            w = theta[at:end]
            for i in range(n):
                g_bits[i] = (np.int32(g[i]) << g_shift) & MAGNITUDE
                base_bits[i] = (np.int32(w[i]) << t_shift) & MAGNITUDE
            for i in range(n):
                base[i] = base[i] + eps
            hits = np.int32(0)
            for i in range(n):
                hits += np.int32(np.float32(g_bits[i]) - exp * np.float32(base_bits[i]) >= cut)
            if hits > 0:
                if count + n > out.size:
                    return count, at, worst
                for i in range(n):
                    if (
                        g_bits[i] >= low
                        and np.float32(g_bits[i]) - exp * np.float32(base_bits[i]) >= cut
                    ):
                        scalar = at + i + offset
                        while t < taken.size and taken[t] < scalar:
                            t += 1
                        if t == taken.size or taken[t] != scalar:
                            out[count] = at + i
                            count += 1
        at = end
    return count, at, worst
