"""The inner loops as compiled CPU code, each over many tensors at once and on several threads.

With b(x) the bits of a positive float32 read as an integer, L(x) = b(x) / 2^23 - 127 lies within
[0, 0.0861] below log2(x). So log2 of |g| / (|θ| + ε)^exp is at most L(|g|) - exp·L(|θ| + ε) plus a
known slack for any real exp, and integers compare in vector registers where powers would not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

if TYPE_CHECKING:
    from unmask.kernels import Run

INFINITE = 0x7F800000  # b(inf): a float32 is finite exactly if its magnitude's bits are below
MAGNITUDE = np.int32(0x7FFFFFFF)
BLOCK = 2048  # scalars bounded at once: 8 KiB of gradient, well inside the first cache
FEW = 64  # scalars of a block with candidates that are looked at together
SHARE = 1 << 15  # least scalars for which a second thread is worth waking
LOG_SLACK = 0.0861  # the most that L(x) lies below log2(x)
LOG_ROUNDING = 1e-4  # float32 rounding of the keys, per unit of (1 + |exp|), with room to spare
SMALLEST = 1.2e-38  # below the normal numbers L(x) no longer bounds log2(x) from below

T = TypeVar("T")
# Without types, since mypy sees what numba is given, not what it makes of it.
_compile: Any = njit(nogil=True, cache=True)
_intrinsic: Any = intrinsic

HALF = {torch.float32: False, torch.bfloat16: True}  # weights handled: whether they are 16 bits


def handles(tensor: Tensor) -> bool:
    """Whether these kernels can work on the tensor where it lies."""
    return (tensor.dtype in HALF or tensor.dtype == torch.int64) and tensor.is_contiguous()


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
        self._keep = (thetas, grads, taken, into)  # alive as long as their addresses are used
        self._law = law
        self._starts = np.array([0, *accumulate(map(len, thetas))], dtype=np.int64)
        self._offsets = np.array(offsets, dtype=np.int64)
        self._arrays = (
            *(_addresses(grads), _halves(grads), _addresses(thetas), _halves(thetas)),
            *(_addresses(taken), np.array([len(t) for t in taken], dtype=np.int64)),
            np.array([0 if x is None else x.data_ptr() for x in into], dtype=np.uint64),
        )
        self.total = int(self._starts[-1])

    def first(self, place: int) -> int:
        """The least global index from this place of the sweep on."""
        k = int(np.searchsorted(self._starts, place, side="right")) - 1
        return int(place - self._starts[k] + self._offsets[k])

    def run(
        self, start: int, stop: int, threshold: float, capacity: int
    ) -> tuple[list[list[Tensor]], list[tuple[int, int]], int]:
        """Look at scalars [start, stop) of the tensors laid end to end.

        Returns candidates as [indices (int64), weights, gradients (float32)], the ranges left
        unseen because more than `capacity` turned up on a thread, and the position of a tensor with
        a gradient that isn't finite, or -1.
        """
        exp, eps = self._law
        low, cut = _bounds(exp, eps, threshold)

        def look(a: int, b: int) -> tuple[list[Tensor], int, int]:
            index = np.empty(capacity, dtype=np.int64)
            theta, grad = (np.empty(capacity, dtype=np.float32) for _ in range(2))
            constants = np.float32(exp), np.float32(eps), np.int32(low), np.float32(cut)
            places = self._starts, self._offsets
            count, end, bad = _sweep(*places, *self._arrays, a, b, *constants, index, theta, grad)
            found = [torch.from_numpy(x[:count]) for x in (index, theta, grad)]
            return found, end, bad

        ranges = _shares(start, stop)
        looked = _in_threads(look, ranges)
        left = [(end, b) for (_, b), (_, end, _) in zip(ranges, looked, strict=True) if end < b]
        bad = max(bad for _, _, bad in looked)
        return [found for found, _, _ in looked if len(found[0])], left, bad


def gather(runs: list[Run], index: Tensor, out: Tensor, add: bool) -> None:
    """As `reference.gather`."""
    table = _table(runs)

    def work(a: int, b: int) -> None:
        _gather(*table, index.numpy(), a, b, out.numpy(), add)

    _in_threads(work, _shares(0, len(index)))


def scatter(runs: list[Run], index: Tensor, values: Tensor, where: Tensor | None) -> None:
    """As `reference.scatter`."""
    table = _table(runs)
    places = index.numpy() if where is None else where.numpy()

    def work(a: int, b: int) -> None:
        _scatter(*table, index.numpy(), a, b, values.numpy(), places, where is not None)

    _in_threads(work, _shares(0, len(index)))


def _bounds(exp: float, eps: float, threshold: float) -> tuple[int, float]:
    """(least |g| bits, least key) that a score of `threshold` or more can have."""
    if threshold <= 0 or not math.isfinite(threshold):
        return (1 if threshold > 0 else 0), -np.inf
    log = math.log2(threshold)
    slack = LOG_SLACK * (1 + max(0.0, -exp)) + LOG_ROUNDING * (1 + abs(exp))
    # The bound by |g| alone: the denominator is at least eps^exp where exp >= 0.
    least = log + exp * math.log2(eps) - LOG_ROUNDING * (1 + abs(exp)) if exp >= 0 else -np.inf
    low = 1 if least < -126 else int(np.float32(2.0 ** min(least, 127.9)).view(np.int32))
    if eps < SMALLEST and exp > 0:
        return low, -np.inf
    return low, (log - slack + 127 - 127 * exp) * 2.0**23


def _addresses(tensors: Iterable[Tensor]) -> np.ndarray[Any, Any]:
    return np.array([t.data_ptr() for t in tensors], dtype=np.uint64)


def _halves(tensors: Iterable[Tensor]) -> np.ndarray[Any, Any]:
    return np.array([HALF[t.dtype] for t in tensors], dtype=np.bool_)


def _table(runs: list[Run]) -> tuple[np.ndarray[Any, Any], ...]:
    numbers = np.array([run[1:] for run in runs], dtype=np.int64).reshape(-1, 3)
    tensors = [run.tensor for run in runs]
    return numbers, _addresses(tensors), _halves(tensors)


def _shares(start: int, stop: int) -> list[tuple[int, int]]:
    """The range in as many equal parts as torch uses threads, or fewer if it is short."""
    parts = max(1, min(torch.get_num_threads(), (stop - start) // SHARE))
    cuts = [start + (stop - start) * i // parts for i in range(parts + 1)]
    return list(pairwise(cuts))


def _in_threads(work: Callable[[int, int], T], ranges: list[tuple[int, int]]) -> list[T]:
    if len(ranges) == 1:
        return [work(*ranges[0])]
    return list(_pool(len(ranges)).map(lambda r: work(*r), ranges))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="unmask")


@_intrinsic
def _pointer(_context, _address):  # type: ignore[no-untyped-def]
    """An address as something that `carray` takes."""

    def generate(_, builder, __, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), generate


@_intrinsic
def _as_float(_context, _bits):  # type: ignore[no-untyped-def]
    """The float32 of these bits."""

    def generate(context, builder, _, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@_intrinsic
def _as_bits(_context, _number):  # type: ignore[no-untyped-def]
    """The bits of this float32."""

    def generate(context, builder, _, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@_compile
def _load(address, half, at, n, out):  # type: ignore[no-untyped-def]
    """The magnitude bits of n numbers from `at` on, as float32's, into `out`; the largest."""
    top = np.int32(0)
    if half:
        x16 = carray(_pointer(address), (at + n,), dtype=np.int16)[at : at + n]
        for i in range(n):
            bits = (np.int32(x16[i]) << np.int32(16)) & MAGNITUDE
            out[i] = bits
            top = bits if bits > top else top
    else:
        x32 = carray(_pointer(address), (at + n,), dtype=np.int32)[at : at + n]
        for i in range(n):
            bits = x32[i] & MAGNITUDE
            out[i] = bits
            top = bits if bits > top else top
    return top


@_compile
def _hits(bits, address, half, at, n, exp, eps, cut):  # type: ignore[no-untyped-def]
    """How many of a block's keys reach `cut`, given the gradients' bits and the weights' place."""
    hits = np.int32(0)
    if half:
        x16 = carray(_pointer(address), (at + n,), dtype=np.int16)[at : at + n]
        for i in range(n):
            base = _as_float((np.int32(x16[i]) << np.int32(16)) & MAGNITUDE) + eps
            hits += np.int32(np.float32(bits[i]) - exp * np.float32(_as_bits(base)) >= cut)
    else:
        x32 = carray(_pointer(address), (at + n,), dtype=np.int32)[at : at + n]
        for i in range(n):
            base = _as_float(x32[i] & MAGNITUDE) + eps
            hits += np.int32(np.float32(bits[i]) - exp * np.float32(_as_bits(base)) >= cut)
    return hits


@_compile
def _read(address, half, i):  # type: ignore[no-untyped-def]
    """The bits of the i-th number at an address, as float32's."""
    if half:
        return np.int32(carray(_pointer(address), (i + 1,), dtype=np.int16)[i]) << np.int32(16)
    return carray(_pointer(address), (i + 1,), dtype=np.int32)[i]


@_compile
def _round(bits):  # type: ignore[no-untyped-def]
    """The bits of the bfloat16 nearest to a float32, ties to even, as torch rounds."""
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(INFINITE):
        return np.uint16(0x7FC0)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@_compile
def _sum(total, bits, half):  # type: ignore[no-untyped-def]
    """Add a number in its own precision, as autograd adds up gradients."""
    exact = total + _as_float(bits)
    if not half:
        return exact
    return _as_float(np.int32(_round(np.uint32(_as_bits(exact)))) << np.int32(16))


@_compile
def _sweep(  # type: ignore[no-untyped-def]
    starts, offsets, g_at, g_half, t_at, t_half, taken_at, taken_len, into_at,
    start, stop, exp, eps, low, cut, out_index, out_theta, out_grad,
):  # fmt: skip
    """(number found, where it stopped, tensor with a gradient that isn't finite or -1).

    Loops over a block are kept free of branches so that they vectorise.
    """
    count = 0
    out_theta, out_grad = out_theta.view(np.int32), out_grad.view(np.int32)
    bits = np.empty(BLOCK, dtype=np.int32)
    k = np.searchsorted(starts, start, side="right") - 1
    at = start
    while at < stop:
        while at >= starts[k + 1]:
            k += 1
        last = min(stop, starts[k + 1])
        taken = carray(_pointer(taken_at[k]), (taken_len[k],), dtype=np.int64)
        shift = offsets[k] - starts[k]  # from the place in the sweep to the global index
        into = carray(_pointer(into_at[k]), (taken_len[k],), dtype=np.float32)
        fill = into_at[k] != 0
        t = np.searchsorted(taken, at + shift)
        while at < last:
            n = min(BLOCK, last - at)
            here = at - starts[k]
            top = _load(g_at[k], g_half[k], here, n, bits)
            if top >= INFINITE:
                return count, at, k
            if top >= low:
                hits = _hits(bits, t_at[k], t_half[k], here, n, exp, eps, cut)
                if hits > 0:
                    if count + n > out_index.size:
                        return count, at, -1
                    u = t
                    for i in range(n):
                        # Hits are rare: look at a few at a time, then at each.
                        if i % FEW == 0:
                            some = min(FEW, n - i)
                            near = bits[i : i + some]
                            place = here + i
                            hits = _hits(near, t_at[k], t_half[k], place, some, exp, eps, cut)
                        if hits == 0:
                            continue
                        theta = _read(t_at[k], t_half[k], here + i)
                        base = _as_float(theta & MAGNITUDE) + eps
                        key = np.float32(bits[i]) - exp * np.float32(_as_bits(base))
                        if bits[i] >= low and key >= cut:
                            scalar = at + i + shift
                            while u < taken.size and taken[u] < scalar:
                                u += 1
                            if u == taken.size or taken[u] != scalar:
                                out_index[count] = scalar
                                out_theta[count] = theta
                                out_grad[count] = _read(g_at[k], g_half[k], here + i)
                                count += 1
            at += n
            while t < taken.size and taken[t] < at + shift:
                if fill:
                    place = taken[t] - offsets[k]
                    into[t] = _sum(into[t], _read(g_at[k], g_half[k], place), g_half[k])
                t += 1
    return count, at, -1


@_compile
def _gather(runs, address, half, index, first, last, out, add):  # type: ignore[no-untyped-def]
    for k in range(len(runs)):
        offset, start, stop = runs[k]
        for i in range(max(start, first), min(stop, last)):
            bits = _read(address[k], half[k], index[i] - offset)
            out[i] = _sum(out[i], bits, half[k]) if add else _as_float(bits)


@_compile
def _scatter(runs, address, half, index, first, last, values, where, jump):  # type: ignore[no-untyped-def]
    for k in range(len(runs)):
        offset, start, stop = runs[k]
        for i in range(max(start, first), min(stop, last)):
            flat = index[i] - offset
            bits = np.uint32(_as_bits(values[where[i] if jump else i]))
            if not half[k]:
                carray(_pointer(address[k]), (flat + 1,), dtype=np.uint32)[flat] = bits
                continue
            carray(_pointer(address[k]), (flat + 1,), dtype=np.uint16)[flat] = _round(bits)
