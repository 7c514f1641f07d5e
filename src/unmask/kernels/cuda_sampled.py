"""The sampled product as Triton code: a dot product over tokens for every entry.

Activations lie token by token, so both operands are turned round first, as large as they are; then
an entry is a dot product of two contiguous runs. Entries come row by row, so those that a program
does at once share the rows it reads, through the cache. The order of sums depends on the shapes
alone.
"""

# ruff: noqa: N803 - what a kernel is compiled for is written in capitals

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unmask.kernels.cuda import HOW

ENTRIES = 16  # that a program does
TOKENS = 128  # that it multiplies at once

_compile: Any = triton.jit(do_not_specialize=["count"])


def product(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, along: int) -> Tensor:
    """As `sampled.product`; both operands contiguous, of one dtype: float32, bfloat16 or float16.

    The two tensors of positions are of one dtype, int32 or int64.
    """
    if along == 0:
        left, right = left.t().contiguous(), right.t().contiguous()
    out = torch.empty(len(rows), dtype=torch.float32, device=left.device)
    if len(rows):
        with torch.cuda.device_of(out):
            _dots[(-(-len(rows) // ENTRIES),)](
                *(left, right, rows, columns, out, len(rows), left.shape[1]),
                ENTRIES=ENTRIES, TOKENS=TOKENS, **HOW,
            )  # fmt: skip
    return out


@_compile  # type: ignore[untyped-decorator]
def _dots(  # type: ignore[no-untyped-def]
    left, right, rows, columns, out, count, tokens, ENTRIES: tl.constexpr, TOKENS: tl.constexpr
):
    """out[s] = left[rows[s]] · right[columns[s]]."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < count
    token = tl.arange(0, TOKENS)
    row = tl.load(rows + entry, mask=inside, other=0).to(tl.int64) * tokens
    column = tl.load(columns + entry, mask=inside, other=0).to(tl.int64) * tokens
    p, q = left + row[:, None] + token[None, :], right + column[:, None] + token[None, :]
    sums = tl.zeros((ENTRIES, TOKENS), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        mask = inside[:, None] & (start + token < tokens)[None, :]
        a = tl.load(p + start, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(q + start, mask=mask, other=0.0).to(tl.float32)
        sums += a * b
    tl.store(out + entry, tl.sum(sums, axis=1), mask=inside)
