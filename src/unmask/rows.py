"""Gradients of embeddings as the rows that they have: a batch looks up few of a vocabulary's.

Such a gradient is a sparse tensor with one sparse dimension, and equals the dense one bit for bit.
It is consumed a few rows at a time, so that the dense one never exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["TOKENS", "Rows", "look_up", "summed"]

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


class Rows(NamedTuple):
    """What a tensor of `height` rows has in some of them, `rows`, rising; it is 0 elsewhere."""

    rows: Tensor
    values: Tensor
    height: int

    @classmethod
    def of(cls, gradient: Tensor) -> Rows:
        """The rows of a sparse gradient with one sparse dimension."""
        gradient = summed(gradient)
        return cls(gradient._indices()[0], gradient._values(), len(gradient))

    @property
    def width(self) -> int:
        """Scalars of a row."""
        return math.prod(self.values.shape[1:])

    def within(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the tensor's scalars are in these rows, and where those are in `values`."""
        row = flat.long() // max(1, self.width)
        at = torch.searchsorted(self.rows, row)
        there = torch.cat([self.rows, self.rows.new_tensor([-1])])[at] == row
        return there, (at * self.width + flat - row * self.width)[there]

    def of_tensor(self, offset: int, at: Tensor) -> Tensor:
        """The other way: offset + the scalar of the tensor that is in this place of `values`."""
        row = at // self.width
        return self.rows[row] * self.width + at - row * self.width + offset

    def split(self, at: Tensor) -> Iterator[tuple[Rows, Tensor]]:
        """A few rows at a time, and those of the rising places `at` in `values` that are theirs."""
        some = max(1, BLOCK // max(1, self.width))
        firsts = torch.arange(0, len(self.rows) + some, some).to(at) * self.width
        cuts = torch.searchsorted(at, firsts).tolist()
        parts = zip(self.rows.split(some), self.values.split(some), strict=True)
        for i, (rows, values) in enumerate(parts):
            yield Rows(rows, values, self.height), at[cuts[i] : cuts[i + 1]] - firsts[i]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """All rows in dense blocks: the first scalar's flat index, and the block."""
        some = max(1, BLOCK // max(1, self.width))
        starts = torch.arange(0, self.height + some, some, device=self.rows.device)
        cuts = torch.searchsorted(self.rows, starts).tolist()
        for start, low, high in zip(range(0, self.height, some), cuts, cuts[1:], strict=False):
            block = self.values.new_zeros(min(some, self.height - start), *self.values.shape[1:])
            block[self.rows[low:high] - start] = self.values[low:high]
            yield start * self.width, block


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
