"""The sampled product as compiled code: a dot product over tokens for every entry.

Activations lie token by token, so what an entry needs of them is strewn over memory. A block of
tokens at a time is turned round, 16 columns (a cache line) at once and squares of them in vector
registers, into a buffer that the second cache holds; there each entry is a dot product of two
short contiguous runs. Both take about as long, together a few per cent of the dense product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from unmask.kernels.cpu_base import COMMON, compiled, entry
from unmask.kernels.threads import in_threads

BLOCK = 64  # tokens turned round at once
TILE = 16  # columns turned round together
SIDE = 8  # of a square that vector registers hold, also those of AVX2
PARTS = 8  # sums kept apart and added up at the end, whatever the number of threads
WORTH = 1 << 18  # multiplications and moves from which a second thread is worth waking

# Sums may be taken in any order, so that they vectorise; NaN and infinity still count.
_FAST = {"reassoc", "contract", "nsz"}
_compile_sums: Any = njit(fastmath=_FAST, **COMMON)

# How a dtype's bits are looked at, and how far they are shifted to be the same float32's.
BITS = {torch.float32: (torch.int32, 0), torch.bfloat16: (torch.int16, 16)}


def prepared(rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> tuple[Any, ...]:
    """(rows, columns, tiles of the left operand that they touch, tiles of the right one)."""
    r, c = rows.numpy(), columns.numpy()
    return r, c, np.unique(r // TILE), np.unique(c // TILE)


def product(left: Tensor, right: Tensor, entries: Any, count: int, along: int) -> Tensor:
    """As `sampled.product`; both operands contiguous, of one dtype of BITS."""
    view, shift = BITS[left.dtype]
    rows, columns, left_tiles, right_tiles = entries
    a, b = (x.view(view).numpy() for x in (left, right))
    tokens = left.shape[along]
    parts = max(1, min(PARTS, tokens // BLOCK))
    sums = np.zeros((parts, count), dtype=np.float32)
    cuts = [tokens * p // parts // BLOCK * BLOCK for p in range(parts)] + [tokens]

    def work(first: int, last: int) -> None:
        for p in range(first, last):
            args = (rows, columns, left_tiles, right_tiles, cuts[p], cuts[p + 1], sums[p])
            _product(a, b, shift, along, *args)

    width = TILE * (len(left_tiles) + len(right_tiles)) if along == 0 else 0
    heavy = tokens * (count + width) >= WORTH
    in_threads(work, [(p, p + 1) for p in range(parts)] if heavy else [(0, parts)])
    return torch.from_numpy(sums.sum(0))


def _squares(_: Any, x: Any, start: Any, width: Any, out: Any, at: Any, length: Any) -> Any:
    """out[at + j·length + t] = x[start + t·width + j] as float32's bits, of both arrays' numbers
    from their first on, for all t and j below SIDE."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_value, start, width, out_value, at, length = arguments
        source, target = (
            context.make_array(kind)(context, builder, value).data
            for kind, value in ((signature.args[0], x_value), (signature.args[3], out_value))
        )

        def row(data: Any, first: Any, stride: Any, k: int, bits: int) -> Any:
            place = builder.add(first, builder.mul(stride, stride.type(k)))
            of = ir.VectorType(ir.IntType(bits), SIDE)
            return builder.bitcast(builder.gep(data, [place]), of.as_pointer())

        word = ir.VectorType(ir.IntType(32), SIDE)
        narrow, rows = x.dtype.bitwidth, []
        for k in range(SIDE):
            found = builder.load(row(source, start, width, k, narrow), align=narrow // 8)
            if narrow == 16:
                found = builder.shl(builder.zext(found, word), ir.Constant(word, [16] * SIDE))
            rows.append(found)
        # Dealt like cards, the first half of the rows with the second, they have turned after
        # as many times as SIDE can be halved.
        for _ in range(SIDE.bit_length() - 1):
            pairs = zip(rows[: SIDE // 2], rows[SIDE // 2 :], strict=True)
            rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in _DEALT]
        for k, turned in enumerate(rows):
            builder.store(turned, row(target, at, length, k, 32), align=4)
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, out, types.intp, types.intp), generate


_DEALT = [
    ir.Constant(ir.VectorType(ir.IntType(32), SIDE), [i for k in half for i in (k, SIDE + k)])
    for half in (range(SIDE // 2), range(SIDE // 2, SIDE))
]
_turn_square: Any = intrinsic(_squares)


@compiled
def _turn(x, shift, tiles, start, count, out):  # type: ignore[no-untyped-def]
    """out[j, t] = x[start + t, j] as float32, for the columns j in these tiles."""
    bits = out.view(np.int32)
    width, length, whole = x.shape[1], out.shape[1], count // SIDE * SIDE
    for tile in tiles:
        first, last = tile * TILE, min(tile * TILE + TILE, width)
        rest = first  # columns in no square
        for j in range(first, last - SIDE + 1, SIDE):
            for t in range(0, whole, SIDE):
                _turn_square(x, (start + t) * width + j, width, bits, j * length + t, length)
            rest = j + SIDE
        for j in range(first, last):
            for t in range(whole if j < rest else 0, count):
                bits[j, t] = np.int32(x[start + t, j]) << shift


@compiled
def _cut(x, shift, tiles, start, count, out):  # type: ignore[no-untyped-def]
    """out[j, t] = x[j, start + t] as float32, for the rows j in these tiles."""
    bits = out.view(np.int32)
    for tile in tiles:
        for j in range(tile * TILE, min(tile * TILE + TILE, x.shape[0])):
            for t in range(count):
                bits[j, t] = np.int32(x[j, start + t]) << shift


@_compile_sums
def _dots(a, b, rows, columns, count, sums):  # type: ignore[no-untyped-def]
    """sums[s] += a[rows[s], :count] · b[columns[s], :count]."""
    for s in range(rows.size):
        p, q = a[rows[s]], b[columns[s]]
        total = np.float32(0)
        for t in range(count):
            total += p[t] * q[t]
        sums[s] += total


@entry
def _product(a, b, shift, along, rows, columns, a_tiles, b_tiles, start, stop, sums):  # type: ignore[no-untyped-def]
    """One part's sums, over tokens start to stop; of each operand they are dimension `along`."""
    p = np.empty((a.shape[1 - along], BLOCK), dtype=np.float32)
    q = np.empty((b.shape[1 - along], BLOCK), dtype=np.float32)
    for t in range(start, stop, BLOCK):
        count = min(BLOCK, stop - t)
        for x, tiles, out in ((a, a_tiles, p), (b, b_tiles, q)):
            if along == 0:
                _turn(x, shift, tiles, t, count, out)
            else:
                _cut(x, shift, tiles, t, count, out)
        _dots(p, q, rows, columns, count, sums)
