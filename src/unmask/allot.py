"""Whole numbers out of shares: one by itself, or parts that add up."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

__all__ = ["allot", "down", "up"]

ROUNDING = 1e-12  # of a product of floats, as a share of it


def down(x: float) -> int:
    """⌊x⌋ of a share of a count, where the last digit of a float costs no one.

    >>> int(0.29 * 100), down(0.29 * 100)
    (28, 29)
    """
    return math.floor(x * (1 + ROUNDING))


def up(x: float) -> int:
    """⌈x⌉ of a share of a count, where the last digit of a float adds no one.

    >>> math.ceil(0.07 * 100), up(0.07 * 100)
    (8, 7)
    """
    return math.ceil(x * (1 - ROUNDING))


def allot(
    total: int, claims: Sequence[int], least: Sequence[int], most: Sequence[int]
) -> list[int]:
    """`total` in whole parts in proportion to `claims`, each from `least` to `most`.

    Seats go one by one to the largest claim / (2·part + 1), of equals the first: Sainte-Laguë, done
    for all but the last few at once. What claims leave over goes by what room there is.

    >>> allot(10, [3, 2, 1], [0, 0, 0], [9, 9, 9])
    [5, 3, 2]
    """
    parts = list(least)
    for weights in (claims, most):
        high = [m if w else p for w, m, p in zip(weights, most, parts, strict=True)]
        parts = _apportion(min(total, sum(high)), weights, parts, high)
    return parts


def _apportion(
    total: int, claims: Sequence[int], least: Sequence[int], most: Sequence[int]
) -> list[int]:
    def at(rate: float) -> list[int]:
        whole = (math.floor(rate * c + 0.5) if c else 0 for c in claims)
        return [max(low, min(w, high)) for w, low, high in zip(whole, least, most, strict=True)]

    low, high = 0.0, 2.0 * max(most, default=0) + 2.0
    for _ in range(64):  # a rate, as high as may be, that doesn't give out too much
        rate = (low + high) / 2
        given = sum(at(rate))
        low, high = (rate, high) if given <= total else (low, rate)
        if given == total:
            break
    parts = at(low * (1 - 1e-12))  # seats of equal claim are left over, for the first to have
    open_ = [(-c / (2 * p + 1), i) for i, (c, p) in enumerate(zip(claims, parts, strict=True))
             if c and p < most[i]]  # fmt: skip
    heapq.heapify(open_)
    while open_ and sum(parts) < total:
        _, i = heapq.heappop(open_)
        parts[i] += 1
        if parts[i] < most[i]:
            heapq.heappush(open_, (-claims[i] / (2 * parts[i] + 1), i))
    return parts
