"""Sorted indices in close to as few bits as there can be: Golomb-Rice codes of the gaps.

The gap before an index is the number of scalars between it and the one before. Of a gap, the low
`width` bits are its remainder, stored as they are; the rest is its quotient, stored as that many
zeros and a one. With the best width of each tensor this takes at most log2(N / B) + 2 bits for each
of B indices among N, whatever the set, and 0.1 bit more than the entropy for a random one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unmask.errors import UnmaskError
from unmask.kernels.lazy import compiled

__all__ = ["Coded", "decode", "encode"]

LARGEST = 1 << 52  # scalars in one tensor: all sums then fit into 64 bits, all powers into a float
CHUNK = 1 << 16  # numbers unpacked at once; a multiple of 8, so that each chunk begins on a byte
Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Coded(NamedTuple):
    """The code of several tensors' indices; in all bytes the lowest bit comes first.

    `remainders` begins each tensor on a new byte, `quotients` is one stream over all of them.
    """

    widths: Integers
    remainders: Bytes
    quotients: Bytes


def encode(index: Integers, counts: Integers, sizes: Integers) -> Coded:
    """Code the sorted indices of several tensors, `counts[k]` of them in the k-th of `sizes`."""
    if len(sizes) and sizes.max() >= LARGEST:
        raise UnmaskError(
            f"a tensor of {sizes.max():,} scalars is too large for layout='compact', which ends at "
            f"{LARGEST:,}; save with layout='plain'"
        )
    kernels = compiled("rice", len(index))
    return Coded(*(kernels.encode if kernels else _encode)(index, counts, sizes))


def decode(coded: Coded, counts: Integers, sizes: Integers) -> Integers:
    """Return the indices that `encode` was given. Nothing is trusted.

    Anything but the code of `counts[k]` increasing indices below `sizes[k]`, for each k, raises,
    and does so before memory of more than a small multiple of the code's is asked for.
    """
    widths, remainders, quotients = coded
    if not len(widths) == len(counts) == len(sizes):
        raise UnmaskError("counts, widths and sizes are of different lengths")
    for what, numbers, limit in (("count", counts, LARGEST), ("size", sizes, LARGEST)):
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < limit):
            raise UnmaskError(f"a {what} is out of range")
    if (counts > sizes).any():
        raise UnmaskError("a tensor has more indices than scalars")
    # Wider than this is never shorter; and the sums below can't overflow.
    if ((widths < 0) | (widths > 52)).any() or (
        counts > (2 * sizes >> np.clip(widths, 0, 52))
    ).any():
        raise UnmaskError("a width is out of range")
    if sum(counts.tolist()) > 8 * len(quotients):
        raise UnmaskError("the quotients are cut off")
    bytes_ = -(-counts * widths // 8)
    if sum(bytes_.tolist()) != len(remainders):
        raise UnmaskError(f"{len(remainders)} bytes of remainders, {int(bytes_.sum())} needed")
    kernels = compiled("rice", int(counts.sum()))
    index: Integers | None = (kernels.decode if kernels else _decode)(*coded, counts, sizes)
    if index is None:
        raise UnmaskError("the code is damaged, or of other indices than these")
    return index


# Both in plain numpy; kernels/rice.py has the same compiled.


def _encode(index: Integers, counts: Integers, sizes: Integers) -> Coded:
    gaps = np.diff(index, prepend=-1) - 1
    starts = _starts(counts)
    first = starts[:-1][counts > 0]
    gaps[first] = index[first]
    widths = np.array(
        [_width(gaps[a:b], int(n)) for a, b, n in zip(starts, starts[1:], sizes, strict=False)],
        dtype=np.int64,
    )
    each = np.repeat(widths, counts)
    ones = np.cumsum((gaps >> each) + 1) - 1
    quotients = np.zeros(int(ones[-1]) + 1 if len(ones) else 0, dtype=np.uint8)
    quotients[ones] = 1
    parts = [
        _pack(gaps[a:b], int(width))
        for a, b, width in zip(starts, starts[1:], widths, strict=False)
    ]
    remainders = np.concatenate([np.zeros(0, dtype=np.uint8), *parts])
    return Coded(widths, remainders, np.packbits(quotients, bitorder="little"))


def _decode(
    widths: Integers, remainders: Bytes, quotients: Bytes, counts: Integers, sizes: Integers
) -> Integers | None:
    ones = np.flatnonzero(np.unpackbits(quotients, bitorder="little").view(np.bool_))
    last = int(ones[-1]) if len(ones) else -1
    if len(ones) != counts.sum() or len(quotients) != last // 8 + 1:
        return None
    gaps = np.diff(ones, prepend=-1) - 1
    starts, bytes_ = _starts(counts), _starts(-(-counts * widths // 8))
    for k, (width, size) in enumerate(zip(widths.tolist(), sizes.tolist(), strict=True)):
        part, count = gaps[starts[k] : starts[k + 1]], int(counts[k])
        low = _unpack(remainders[bytes_[k] : bytes_[k + 1]], count, width)
        if low is None or (high := int(part.sum())) > size >> width:
            return None
        if (high << width) + int(low.sum()) + count > size:
            return None
        part <<= width
        part += low
        part += 1
        np.cumsum(part, out=part)
        part -= 1
    return gaps


def _pack(numbers: Integers, width: int) -> Bytes:
    """The low `width` bits of each number."""
    bits = np.empty((len(numbers), width), dtype=np.uint8)
    for bit in range(width):
        bits[:, bit] = numbers >> bit & 1
    packed: Bytes = np.packbits(bits, bitorder="little")
    return packed


def _unpack(stream: Bytes, count: int, width: int) -> Integers | None:
    """The inverse of `_pack`; None if anything stands after the last number."""
    if len(stream) and stream[-1] >> 8 - (8 * len(stream) - count * width):
        return None
    numbers = np.zeros(count, dtype=np.int64)
    exact = np.dtype(np.float32 if width <= 24 else np.float64)
    places = np.exp2(np.arange(width)).astype(exact)
    for at in range(0, count if width else 0, CHUNK):
        rows = min(CHUNK, count - at)
        bits = np.unpackbits(stream[at * width // 8 :], count=rows * width, bitorder="little")
        # Not matmul: the threads of a BLAS cost more than so little work.
        table: NDArray[Any] = bits.reshape(rows, width).astype(exact)
        numbers[at : at + rows] = np.einsum("ij,j->i", table, places)
    return numbers


def _width(gaps: Integers, size: int) -> int:
    """The width that makes the code shortest, the smallest such; the length is convex in it."""
    if not len(gaps):
        return 0
    width = (size // len(gaps)).bit_length()  # more is never better
    while width and _length(gaps, width - 1) <= _length(gaps, width):
        width -= 1
    return width


def _length(gaps: Integers, width: int) -> int:
    return len(gaps) * (width + 1) + int((gaps >> width).sum())


def _starts(counts: Integers) -> Integers:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
