"""Golomb-Rice codes as compiled code: one pass to write them, one to read them, both checked."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unmask.kernels.cpu_base import compiled, entry

Array = NDArray[np.int64]
Bytes = NDArray[np.uint8]

ONE = np.uint64(1)
# A power of two times this number has in its six highest bits what no other has.
DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
PLACE = np.zeros(64, dtype=np.int64)
PLACE[[(0x03F79D71B4CB0A89 << bit) % 2**64 >> 58 for bit in range(64)]] = range(64)


def encode(index: Array, counts: Array, sizes: Array) -> tuple[Array, Bytes, Bytes]:
    """As `codec.encode`."""
    widths, bits = _widths(index, counts, sizes)
    needed = int((-(-counts * widths // 8)).sum())
    remainders, quotients = np.zeros(needed // 8 + 2, "<u8"), np.zeros(bits // 64 + 1, "<u8")
    _write(index, counts, widths, remainders, quotients)
    return widths, _as_bytes(remainders, needed), _as_bytes(quotients, -(-bits // 8))


def decode(
    widths: Array, remainders: Bytes, quotients: Bytes, counts: Array, sizes: Array
) -> Array | None:
    """As `codec.decode`, which has checked all lengths; None if the code isn't of such indices."""
    index = np.empty(int(counts.sum()), dtype=np.int64)
    good = _read(widths, _as_words(remainders), _as_words(quotients), counts, sizes, index)
    return index if good == len(quotients) else None


def _as_words(stream: Bytes) -> NDArray[np.uint64]:
    words = np.zeros(len(stream) // 8 + 2, dtype="<u8")
    words.view(np.uint8)[: len(stream)] = stream
    return words.astype(np.uint64, copy=False)


def _as_bytes(words: NDArray[np.uint64], count: int) -> Bytes:
    return words.view(np.uint8)[:count].copy()


@entry
def _widths(index, counts, sizes):  # type: ignore[no-untyped-def]
    """The best width of each tensor, and the bits of all quotients."""
    widths = np.zeros(len(counts), dtype=np.int64)
    start, bits = 0, 0
    for k in range(len(counts)):
        count = counts[k]
        if count == 0:
            continue
        width = 0
        while sizes[k] // count >> width:
            width += 1
        best = _high(index, start, count, width)
        while width > 0:
            other = _high(index, start, count, width - 1)
            if other > best + count:
                break
            width, best = width - 1, other
        widths[k] = width
        bits += best + count
        start += count
    return widths, bits


@compiled
def _high(index, start, count, width):  # type: ignore[no-untyped-def]
    """The sum of a tensor's quotients."""
    total = index[start] >> width
    for i in range(start + 1, start + count):
        total += (index[i] - index[i - 1] - 1) >> width
    return total


@entry
def _write(index, counts, widths, remainders, quotients):  # type: ignore[no-untyped-def]
    i, one, bit = 0, -1, 0
    for k in range(len(counts)):
        width = widths[k]
        mask = (ONE << np.uint64(width)) - ONE
        last = -1
        for _ in range(counts[k]):
            gap = index[i] - last - 1
            last = index[i]
            i += 1
            one += (gap >> width) + 1
            quotients[one >> 6] |= ONE << np.uint64(one & 63)
            low, shift = np.uint64(gap) & mask, np.uint64(bit & 63)
            remainders[bit >> 6] |= low << shift
            remainders[(bit >> 6) + 1] |= low >> (np.uint64(63) - shift) >> ONE
            bit += width
        bit = (bit + 7) // 8 * 8


@entry
def _read(widths, remainders, quotients, counts, sizes, index):  # type: ignore[no-untyped-def]
    """How many bytes of quotients the code took; -1 if it is no code of such indices."""
    i, one, bit = 0, -1, 0
    word, left = 0, quotients[0]
    for k in range(len(counts)):
        width, size = widths[k], sizes[k]
        mask = (ONE << np.uint64(width)) - ONE
        room = size >> width  # keeps the sums below from overflowing
        last = -1
        for _ in range(counts[k]):
            while left == 0:
                word += 1
                if word >= len(quotients):
                    return -1
                left = quotients[word]
            lowest = left & (~left + ONE)
            left ^= lowest
            here = 64 * word + PLACE[lowest * DE_BRUIJN >> np.uint64(58)]
            quotient = here - one - 1
            one = here
            room -= quotient
            if room < 0:
                return -1
            shift = np.uint64(bit & 63)
            low = remainders[bit >> 6] >> shift
            low |= remainders[(bit >> 6) + 1] << (np.uint64(63) - shift) << ONE
            last += (quotient << width) + np.int64(low & mask) + 1
            index[i] = last
            bit += width
            i += 1
        if last >= size:
            return -1
        pad = (8 - bit % 8) % 8
        if pad and (remainders[bit >> 6] >> np.uint64(bit & 63)) & ((ONE << np.uint64(pad)) - ONE):
            return -1
        bit += pad
    if left != 0:
        return -1
    for rest in range(word + 1, len(quotients)):
        if quotients[rest] != 0:
            return -1
    return (one + 8) // 8
