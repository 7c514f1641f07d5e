"""What runs on the GPU itself. `cuda` says what it is given, and what it is for.

A kernel gets a table of int64, a column for each tensor and a row for each thing to know of it;
the first row holds the number of the tensor's first block. Tensors are handed over as addresses, so
that one launch does for hundreds of them. Flat indices are 64 bits wide wherever they are formed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803 - what a kernel is compiled for is written in capitals

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from unmask.kernels import laws

# Without types, since mypy sees what triton is given, not what it makes of it.
_compile: Any = triton.jit
_numbers = ["tensors", "first", "every", "but", "start", "stop", "low", "lost", "room"]
# A number's value is no reason to compile anew.
_compile_scan: Any = triton.jit(do_not_specialize=_numbers)
_compile_move: Any = triton.jit(do_not_specialize=["tensors"])

INFINITE, FALLING = tl.constexpr(laws.INFINITE), tl.constexpr(laws.FALLING)
LOG_A, LOG_B, LOG_C = (tl.constexpr(x) for x in (laws.LOG_A, laws.LOG_B, laws.LOG_C))
MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@_compile
def _pointer(address, KIND: tl.constexpr):
    if KIND == 0:
        return address.to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        return address.to(tl.pointer_type(tl.bfloat16))
    else:
        return address.to(tl.pointer_type(tl.float16))


@_compile
def _integers(address, WIDE: tl.constexpr):
    if WIDE:
        return address.to(tl.pointer_type(tl.int64))
    else:
        return address.to(tl.pointer_type(tl.int32))


@_compile
def _place(entries, count, x):
    """The last place in these sorted numbers of one that is at most x, or 0."""
    place = x * 0
    while count > 1:
        half = count // 2
        place += tl.where(tl.load(entries + place + half) <= x, half, 0)
        count -= half
    return place


@_compile
def _block_of(address, at, low, high, BLOCK: tl.constexpr, KIND: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    if (low == 0) & (high == BLOCK) & (address % 16 == 0):  # 16 bytes at once
        pointer = tl.multiple_of(_pointer(address, KIND) + at, 16)
        x = tl.load(pointer + lane).to(tl.float32)
    else:
        inside = (lane >= low) & (lane < high)
        x = tl.load(_pointer(address, KIND) + at + lane, mask=inside, other=0.0).to(tl.float32)
    return x


@_compile
def _block(address, kind, at, low, high, BLOCK: tl.constexpr):
    """Numbers low to high of the block from `at` on, as float32; 0 for the others."""
    if kind == 0:
        x = _block_of(address, at, low, high, BLOCK, 0)
    elif kind == 1:
        x = _block_of(address, at, low, high, BLOCK, 1)
    else:
        x = _block_of(address, at, low, high, BLOCK, 2)
    return x


@_compile
def _some(address, kind, at, mask):
    """Single numbers as float32."""
    if kind == 0:
        x = tl.load(_pointer(address, 0) + at, mask=mask, other=0.0)
    elif kind == 1:
        x = tl.load(_pointer(address, 1) + at, mask=mask, other=0.0).to(tl.float32)
    else:
        x = tl.load(_pointer(address, 2) + at, mask=mask, other=0.0).to(tl.float32)
    return x


@_compile
def _to_bfloat16(x):
    """Rounded to even, as torch does; spelt out, since Triton's interpreter cuts digits off."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    rounded = tl.where((bits & MAGNITUDE) > INFINITE, 0x7FC00000, rounded)  # NaN stays one
    return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)


@_compile
def _logarithm(bits):
    """log2 of a normal positive float32, as `laws` has it."""
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    slope = LOG_A - m * (LOG_B - LOG_C * m)
    return bits.to(tl.float32) * 2.0**-23 - 127.0 + m * (1.0 - m) * slope


@_compile
def _could_win(grad, theta, exp, eps, low, cut, lost, LAW: tl.constexpr):
    """Which scores may reach the threshold that `laws.bounds` is about."""
    size, base = tl.abs(grad), tl.abs(theta) + eps
    bits, base_bits = size.to(tl.int32, bitcast=True), base.to(tl.int32, bitcast=True)
    if LAW == 0:
        near = size >= cut
    elif LAW == 1:
        near = size >= cut * base
    elif LAW == 2:
        near = size >= cut * (base * base)
    elif LAW == -1:
        near = size * base >= cut
    else:
        near = _logarithm(bits) - exp * _logarithm(base_bits) >= cut
        if LAW == FALLING:
            near |= base_bits >= lost
    return (near | (base_bits >= INFINITE)) & (bits >= low)


@_compile_scan
def scan_kernel(
    table, tensors, first, every, but, start, stop, low, exp, eps, cut, lost,
    state, out_index, out_theta, out_grad, room,
    LAW: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows: first block, place in the sweep, size, offset; the address and kind of gradient and of
    weight; the address and length of `taken`.

    state  candidates found so far; how many tensors there are from the first bad one on, or 0
    """
    block = (tl.program_id(0).to(tl.int64) + first) * every
    if but > 0:  # noqa: SIM102 - `and` would look at the other side, too
        if block % but == 0:
            return
    k = _place(table, tensors, block)
    row = table + k
    at = (block - tl.load(row)) * BLOCK
    begin, size = tl.load(row + tensors), tl.load(row + 2 * tensors)
    grad_at, grad_kind = tl.load(row + 4 * tensors), tl.load(row + 5 * tensors)
    theta_at, theta_kind = tl.load(row + 6 * tensors), tl.load(row + 7 * tensors)
    left = tl.maximum(start - begin - at, 0).to(tl.int32)
    right = tl.minimum(tl.minimum(size, stop - begin) - at, BLOCK).to(tl.int32)
    grad = _block(grad_at, grad_kind, at, left, right, BLOCK)
    top = tl.max(grad.to(tl.int32, bitcast=True) & MAGNITUDE, axis=0)
    if top >= INFINITE:
        tl.atomic_max(state + 1, tensors - k)
    if top >= low:
        theta = _block(theta_at, theta_kind, at, left, right, BLOCK)
        many = tl.sum(_could_win(grad, theta, exp, eps, low, cut, lost, LAW).to(tl.int32), axis=0)
        if many > 0:
            # Most are of the taken, as these were chosen for it. What follows reads again, from the
            # cache, a few at a time, so that it takes no registers from what precedes.
            scalar = tl.load(row + 3 * tensors) + at
            taken, entries = tl.load(row + 9 * tensors), _integers(tl.load(row + 8 * tensors), WIDE)
            before = _place(entries, taken, scalar)
            entries += before
            taken = tl.minimum(taken - before, BLOCK + 1)
            nth = tl.arange(0, PART)
            spot = tl.load(entries + nth, mask=nth < taken, other=-1).to(tl.int64) - scalar
            keep = (nth < taken) & (spot >= left) & (spot < right)
            grad_here = _some(grad_at, grad_kind, at + spot, keep)
            theta_here = _some(theta_at, theta_kind, at + spot, keep)
            keep &= _could_win(grad_here, theta_here, exp, eps, low, cut, lost, LAW)
            many -= tl.sum(keep.to(tl.int32), axis=0)
            for part in range(0, BLOCK if many > 0 else 0, PART):
                lane = part + nth
                keep = (lane >= left) & (lane < right)
                grad_here = _some(grad_at, grad_kind, at + lane, keep)
                theta_here = _some(theta_at, theta_kind, at + lane, keep)
                keep &= _could_win(grad_here, theta_here, exp, eps, low, cut, lost, LAW)
                if tl.max(keep.to(tl.int32), axis=0) > 0:
                    if taken > 0:
                        nearest = entries + _place(entries, taken, scalar + lane)
                        keep &= tl.load(nearest) != scalar + lane
                    found = keep.to(tl.int32)
                    count = tl.sum(found, axis=0).to(tl.int64)
                    here = tl.atomic_add(state, count) + tl.cumsum(found, axis=0) - 1
                    keep &= here < room
                    tl.store(out_index + here, scalar + lane, mask=keep)
                    tl.store(out_theta + here, theta_here, mask=keep)
                    tl.store(out_grad + here, grad_here, mask=keep)


@_compile
def _run(table, tensors, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(row, entries of the run that the program does, which of them are any, their flat indices).

    Rows: first block; address, kind and offset of the tensor; length of the run; the addresses of
    its indices, of what is read or written in their order, and of where to find that.
    """
    block = tl.program_id(0).to(tl.int64)
    row = table + _place(table, tensors, block)
    entry = (block - tl.load(row)) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < tl.load(row + 4 * tensors)
    entries = _integers(tl.load(row + 5 * tensors), WIDE)
    index = tl.load(entries + entry, mask=mask, other=0).to(tl.int64)
    return row, entry, mask, index - tl.load(row + 3 * tensors)


@_compile_move
def gather_kernel(
    table, tensors, BLOCK: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The scalars, one of each index, into `out`, or with ADD onto what is there."""
    row, entry, mask, flat = _run(table, tensors, BLOCK, WIDE)
    kind = tl.load(row + 2 * tensors)
    x = _some(tl.load(row + tensors), kind, flat, mask)
    out = _pointer(tl.load(row + 6 * tensors), 0) + entry
    if ADD:  # in the scalars' own precision, as autograd adds up gradients
        x += tl.load(out, mask=mask, other=0.0)
        if kind == 1:
            x = _to_bfloat16(x).to(tl.float32)
        elif kind == 2:
            x = x.to(tl.float16).to(tl.float32)
    tl.store(out, x, mask=mask)


@_compile_move
def scatter_kernel(
    table, tensors, BLOCK: tl.constexpr, WIDE: tl.constexpr, JUMP: tl.constexpr, FAR: tl.constexpr
):  # fmt: skip
    """The scalars, one of each index, = the values, or with JUMP those at the places given."""
    row, entry, mask, flat = _run(table, tensors, BLOCK, WIDE)
    if JUMP:
        places = _integers(tl.load(row + 7 * tensors), FAR)
        entry = tl.load(places + entry, mask=mask, other=0).to(tl.int64)
    x = tl.load(_pointer(tl.load(row + 6 * tensors), 0) + entry, mask=mask, other=0.0)
    address, kind = tl.load(row + tensors), tl.load(row + 2 * tensors)
    if kind == 0:
        tl.store(_pointer(address, 0) + flat, x, mask=mask)
    elif kind == 1:
        tl.store(_pointer(address, 1) + flat, _to_bfloat16(x), mask=mask)
    else:
        tl.store(_pointer(address, 2) + flat, x.to(tl.float16), mask=mask)
