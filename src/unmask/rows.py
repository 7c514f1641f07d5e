"""Gradients of embeddings as the rows that they have: a batch looks up few of a vocabulary's.

Such a gradient is a sparse tensor with one sparse dimension, and equals the dense one bit for bit.
It is consumed a few rows at a time, so that the dense one never exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["TOKENS", "blocks", "look_up", "summed"]

TOKENS = 2  # so many times as many rows as tokens, at the least, for it to pay
BLOCK = 1 << 20  # scalars that are dense at a time
_dense = torch.ops.aten.embedding_dense_backward


def look_up(weight: Tensor, tokens: Tensor, padding: int) -> Tensor:
    """weight[tokens]; in backward the row `padding` has no gradient, -1 for none."""
    return _LookUp.apply(weight, tokens, padding)  # type: ignore[no-any-return,no-untyped-call]


def summed(gradient: Tensor) -> Tensor:
    """The sparse gradient with its rows in order and each once, where it may have several parts:
    added up one after another, as autograd adds."""
    if gradient.sparse_dim() > 1:  # no embedding's
        return gradient.coalesce()
    rows, values = gradient._indices()[0], gradient._values()
    if gradient.is_coalesced() or bool((rows[1:] > rows[:-1]).all()):
        return gradient
    rows, which = rows.unique(return_inverse=True)
    sums = values.new_zeros(len(rows), *values.shape[1:]).index_add_(0, which, values)
    return _of_rows(rows, sums, gradient.shape)


def blocks(gradient: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The gradient in dense blocks of whole rows: the first scalar's flat index, and the block."""
    gradient = summed(gradient)
    rows, sums = gradient._indices()[0], gradient._values()
    height, width = len(gradient), math.prod(gradient.shape[1:])
    some = max(1, BLOCK // max(1, width))
    starts = torch.arange(0, height + some, some, device=rows.device)
    cuts = torch.searchsorted(rows, starts).tolist()
    for start, low, high in zip(range(0, height, some), cuts, cuts[1:], strict=False):
        block = sums.new_zeros(min(some, height - start), *sums.shape[1:])
        block[rows[low:high] - start] = sums[low:high]
        yield start * width, block


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.padding = weight.shape, padding
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (tokens,) = ctx.saved_tensors
        if not _accumulates(ctx.next_functions[0][0]):
            return _dense(dy, tokens, ctx.shape[0], ctx.padding, False), None, None
        rows, which = tokens.unique(return_inverse=True)
        # The very sum that a dense gradient's rows are.
        padding = (rows == ctx.padding).nonzero().flatten().tolist()
        sums = _dense(dy, which, len(rows), padding[0] if padding else -1, False)
        return _of_rows(rows, sums, ctx.shape), None, None


def _accumulates(leaf: Any) -> bool:
    """Whether backward is on its way to the parameter's `.grad`, not to a result of its own."""
    try:
        return bool(torch._C._will_engine_execute_node(leaf))
    except RuntimeError:
        return False


def _of_rows(rows: Tensor, sums: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(
        rows[None], sums, shape, is_coalesced=True, check_invariants=False
    )
