"""What the compiled CPU kernels share: memory by address, and float32 as bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from unmask.kernels.laws import INFINITE, LOG_A, LOG_B, LOG_C

MAGNITUDE = np.int32(0x7FFFFFFF)
HALF = {torch.float32: False, torch.bfloat16: True}  # weights handled: whether they are 16 bits

# Without types, since mypy sees what numba is given, not what it makes of it.
# Divided as C does: there is nobody whom a thread could tell of an exception.
COMMON: Any = {"nogil": True, "error_model": "numpy"}
compiled: Any = njit(**COMMON)  # as a part of what calls it
_intrinsic: Any = intrinsic
_move: Any = cgutils.raw_memmove


def stamped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a name that changes with any kernel: what numba keeps on disk goes by the
    name and the function's own file, which may be as it was when what it calls is not."""
    function.__qualname__ += f".{_version()}"
    return function


@cache
def _version() -> str:
    kernels = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"".join(path.read_bytes() for path in kernels)).hexdigest()[:8]


def entry(function: Callable[..., Any]) -> Any:
    """Compiled for Python to call, and kept on disk."""
    return njit(cache=True, **COMMON)(stamped(function))


def addresses(tensors: Iterable[Tensor]) -> np.ndarray[Any, Any]:
    """Where each tensor's numbers begin."""
    return np.array([t.data_ptr() for t in tensors], dtype=np.uint64)


def halves(tensors: Iterable[Tensor]) -> np.ndarray[Any, Any]:
    """Which tensors are of 16 bits."""
    return np.array([HALF[t.dtype] for t in tensors], dtype=np.bool_)


@_intrinsic
def pointer(_context, _address):  # type: ignore[no-untyped-def]
    """An address as something that `carray` takes."""

    def generate(_, builder, __, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), generate


def _prefetching(write: int) -> Any:
    """An intrinsic that has the memory at an address fetched. Any address will do."""

    @_intrinsic
    def prefetch(_context, _address):  # type: ignore[no-untyped-def]
        def generate(context, builder, _, arguments):  # type: ignore[no-untyped-def]
            place = builder.inttoptr(arguments[0], cgutils.voidptr_t)
            word = context.get_value_type(types.int32)
            kind = ir.FunctionType(ir.VoidType(), [place.type, word, word, word])
            fetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
            builder.call(fetch, [place, word(write), word(3), word(1)])  # to keep, data
            return context.get_dummy_value()

        return types.void(types.uint64), generate

    return prefetch


prefetch, prefetch_to_write = _prefetching(0), _prefetching(1)


@_intrinsic
def ticket(_context, _address):  # type: ignore[no-untyped-def]
    """The int64 at an address, which is one more afterwards: no two threads get the same."""

    def generate(context, builder, _, arguments):  # type: ignore[no-untyped-def]
        word = context.get_value_type(types.int64)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", place, word(1), "monotonic")

    return types.int64(types.uint64), generate


@_intrinsic
def shift(_context, numbers, start, count, by):  # type: ignore[no-untyped-def]
    """numbers[start + by : start + by + count] = numbers[start : start + count], which may
    overlap."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        vector, start, count, by = arguments
        data = context.make_array(signature.args[0])(context, builder, vector).data
        source, width = builder.gep(data, [start]), numbers.dtype.bitwidth // 8
        _move(builder, builder.gep(source, [by]), source, count, width)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, types.intp, types.intp), generate


@_intrinsic
def as_float(_context, _bits):  # type: ignore[no-untyped-def]
    """The float32 of these bits."""

    def generate(context, builder, _, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@_intrinsic
def as_bits(_context, _number):  # type: ignore[no-untyped-def]
    """The bits of this float32."""

    def generate(context, builder, _, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@_intrinsic
def magnitude(_context, bits):  # type: ignore[no-untyped-def]
    """|x| of a float32's bits (int32) or a bfloat16's (int16), in vector registers' own width."""

    def generate(context, builder, _, arguments):  # type: ignore[no-untyped-def]
        word, found = context.get_value_type(types.int32), arguments[0]
        if bits.bitwidth == 16:
            found = builder.shl(builder.zext(found, word), word(16))
        found = builder.and_(found, word(int(MAGNITUDE)))
        return builder.bitcast(found, context.get_value_type(types.float32))

    return types.float32(bits), generate


@_intrinsic
def logarithm(_context, _number):  # type: ignore[no-untyped-def]
    """log2 of a normal positive float32, within LOG_ERROR. With a mantissa of 1 + m it is m and
    the exponent, which are its bits, and at most 0.0861, as `laws` has it."""

    def generate(context, builder, _, arguments):  # type: ignore[no-untyped-def]
        word, real = (context.get_value_type(kind) for kind in (types.int32, types.float32))
        bits, one = builder.bitcast(arguments[0], word), real(1.0)
        mantissa = builder.or_(builder.and_(bits, word(0x7FFFFF)), word(0x3F800000))
        m = builder.fsub(builder.bitcast(mantissa, real), one)
        line = builder.fmul(builder.sitofp(bits, real), real(2.0**-23))
        slope = builder.fsub(real(LOG_B), builder.fmul(m, real(LOG_C)))
        slope = builder.fsub(real(LOG_A), builder.fmul(m, slope))
        rest = builder.fmul(builder.fmul(m, builder.fsub(one, m)), slope)
        return builder.fadd(builder.fsub(line, real(127.0)), rest)

    return types.float32(types.float32), generate


@_intrinsic
def size(_context, bits):  # type: ignore[no-untyped-def]
    """The bits of |x|, of x's (int32 or int16), no wider: numba's own `&` makes 64 of them."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = context.get_value_type(bits)
        return builder.and_(arguments[0], word((1 << (bits.bitwidth - 1)) - 1))

    return bits(bits), generate


@_intrinsic
def larger(_context, one, other):  # type: ignore[no-untyped-def]
    """The larger of two integers, no wider than they are."""

    def generate(context, builder, _, arguments):  # type: ignore[no-untyped-def]
        return builder.select(builder.icmp_signed(">", *arguments), *arguments)

    return one(one, one), generate


@_intrinsic
def counted(_context, count, one, other):  # type: ignore[no-untyped-def]
    """One more than count if one >= other, three integers no wider than they are."""

    def generate(_, builder, __, arguments):  # type: ignore[no-untyped-def]
        total, first, second = arguments
        reaches = builder.icmp_signed(">=", first, second)
        return builder.add(total, builder.zext(reaches, total.type))

    return count(count, one, other), generate


FEW = 32  # numbers that `reached` compares


@_intrinsic
def reached(_context, _address, least):  # type: ignore[no-untyped-def]
    """Which of FEW numbers at an address have magnitude bits, as wide as these, of `least` or more:
    a bit for each, from the lowest on."""

    def generate(context, builder, _, arguments):  # type: ignore[no-untyped-def]
        width = least.bitwidth
        lanes, word = ir.VectorType(ir.IntType(width), FEW), context.get_value_type(types.int64)
        place = builder.inttoptr(arguments[0], lanes.as_pointer())
        size = builder.and_(
            builder.load(place, align=width // 8), _all(lanes, (1 << width - 1) - 1)
        )
        one = builder.insert_element(lanes(ir.Undefined), arguments[1], ir.IntType(32)(0))
        every = builder.shuffle_vector(one, lanes(ir.Undefined), _all(_WORDS, 0))
        found = builder.bitcast(builder.icmp_signed(">=", size, every), ir.IntType(FEW))
        return builder.zext(found, word)

    return types.int64(types.uint64, least), generate


_WORDS = ir.VectorType(ir.IntType(32), FEW)


def _all(lanes: Any, number: int) -> Any:
    return ir.Constant(lanes, [number] * FEW)


@_intrinsic
def lowest(_context, _word):  # type: ignore[no-untyped-def]
    """The place of an int64's lowest bit that is set; there must be one."""

    def generate(_, builder, __, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.int64), generate


@compiled
def read(address, half, i):  # type: ignore[no-untyped-def]
    """The bits of the i-th number at an address, as float32's."""
    if half:
        return np.int32(carray(pointer(address), (i + 1,), dtype=np.int16)[i]) << np.int32(16)
    return carray(pointer(address), (i + 1,), dtype=np.int32)[i]


@compiled
def index_at(address, wide, i):  # type: ignore[no-untyped-def]
    """The i-th of the indices at an address, int64 or int32."""
    if wide:
        return carray(pointer(address), (i + 1,), dtype=np.int64)[i]
    return np.int64(carray(pointer(address), (i + 1,), dtype=np.int32)[i])


@compiled
def first_from(address, wide, start, stop, least):  # type: ignore[no-untyped-def]
    """The place, from start on, of the first of the rising indices that is `least` or more."""
    while start < stop:
        middle = (start + stop) // 2
        if index_at(address, wide, middle) < least:
            start = middle + 1
        else:
            stop = middle
    return start


@compiled
def rounded(bits):  # type: ignore[no-untyped-def]
    """The bits of the bfloat16 nearest to a float32, ties to even, as torch rounds."""
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(INFINITE):
        return np.uint16(0x7FC0)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@compiled
def add(total, bits, half):  # type: ignore[no-untyped-def]
    """Add a number in its own precision, as autograd adds up gradients."""
    exact = total + as_float(bits)
    if not half:
        return exact
    return as_float(np.int32(rounded(np.uint32(as_bits(exact)))) << np.int32(16))
