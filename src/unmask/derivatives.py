"""Operations whose gradient in a parameter can be had at single positions, and how.

A rule is called with an operation's own arguments and names the operands that it can do, each as a
`Role`: how the gradient at some positions follows from the output's, and what has to be kept of the
call for that. None means: not in this form of the call. Whatever isn't here is autograd's.
"""

# ruff: noqa: A002 - rules take the very arguments that operations take, by name too

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.kernels.sampled import Entries, product, wider
from unmask.products import factors
from unmask.rows import TOKENS, look_up

__all__ = ["RULES", "At", "Role"]

FEW = 16  # columns are picked before they are summed if they are fewer than one in so many
PATCHES = 1 << 22  # numbers that a convolution's input is unfolded into at once


class At:
    """Sorted flat indices in a tensor of this shape, and the views of them that rules ask for.

    index  the indices, counted from `first` on
    """

    def __init__(self, index: Tensor, shape: Sequence[int], first: int = 0) -> None:
        self.shape = tuple(shape)
        self._index, self._first = index, first
        self._grouped: dict[int, Entries] = {}

    def __len__(self) -> int:
        return len(self._index)

    @property
    def flat(self) -> Tensor:
        """The indices, int64; not held, as a vector has few and a matrix's rules take entries."""
        return self._index.long() - self._first

    @cached_property
    def entries(self) -> Entries:
        """As positions in a matrix: the first dimension by all others."""
        return self.grouped(1)

    def grouped(self, groups: int) -> Entries:
        """As `entries`; columns count on from group to group of a grouped convolution's rows."""
        if groups not in self._grouped:
            height, width = self.shape[0], math.prod(self.shape[1:])
            flat = self.flat
            rows = flat // width
            columns = flat % width + rows // (height // groups) * width
            self._grouped[groups] = Entries(rows.int(), columns.int(), (height, width * groups))
        return self._grouped[groups]


class Role(NamedTuple):
    """What one operand is to a call: gradient(of the output, at, *needs) at these positions.

    instead  the call again, given the operand itself, if its whole gradient is smaller then
    """

    operand: Any
    gradient: Callable[..., Tensor]
    needs: tuple[Tensor, ...] = ()
    instead: Callable[[Tensor], Tensor] | None = None


Rule = Callable[..., list[Role] | None]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Role] | None:
    """dW[o, i] = Σ_t dY[t, o]·X[t, i]; db[o] = Σ_t dY[t, o]."""
    if weight.dim() != 2 or (bias is not None and bias.dim() != 1):
        return None
    return [_needing(weight, _rows, input), Role(bias, _sum)]


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> list[Role] | None:
    """X·W + b, as in GPT-2's Conv1D: dW[i, o] = Σ_t X[t, i]·dY[t, o]."""
    if beta != 1 or alpha != 1 or input.dim() != 1 or len(input) != mat2.shape[1]:
        return None
    return [_needing(mat2, _columns, mat1), Role(input, _sum)]


def matmul(input: Tensor, other: Tensor) -> list[Role] | None:
    """X·W with a matrix W."""
    return [_needing(other, _columns, input)] if other.dim() == 2 and input.dim() > 1 else None


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[Role] | None:
    """dW[v, i] = Σ dY[t, i] over the places t that hold the token v, unless it pads."""
    if max_norm is not None or scale_grad_by_freq:
        return None
    padding = -1 if padding_idx is None else padding_idx % len(weight)

    def gradient(dy: Tensor, at: At, tokens: Tensor) -> Tensor:
        return _looked_up(dy, at, tokens, padding)

    few = input.numel() * TOKENS <= len(weight)
    instead = partial(look_up, tokens=input, padding=padding) if few else None
    return [Role(weight, gradient, (input,), instead)]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> list[Role]:
    """dγ[i] = Σ_t dY[t, i]·x̂[t, i]; dβ[i] = Σ_t dY[t, i]."""

    def gradient(dy: Tensor, at: At, x: Tensor) -> Tensor:
        return _scale(dy, at, F.layer_norm(wider(x), normalized_shape, eps=eps))

    return [Role(weight, gradient, (input,)), Role(bias, _sum)]


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> list[Role]:
    """dγ[i] = Σ_t dY[t, i]·x̂[t, i]."""

    def gradient(dy: Tensor, at: At, x: Tensor) -> Tensor:
        small = torch.finfo(x.dtype).eps if eps is None else eps
        return _scale(dy, at, F.rms_norm(wider(x), normalized_shape, eps=small))

    return [Role(weight, gradient, (input,))]


def mul(input: Any, other: Any) -> list[Role] | None:
    """A vector that scales the last dimension, as home-made norms end."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return None
    scale, x = (other, input) if other.dim() == 1 else (input, other)
    if scale.dim() != 1 or x.dim() == 1 or x.shape[-1:] != scale.shape or not x.is_floating_point():
        return None
    return [_needing(scale, _scale, x)]


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> list[Role] | None:
    """dW[o, j] = Σ dY[o, p]·U[j, p] over all places p, with U the input's patches, unfolded."""
    dimensions = weight.dim() - 2
    if input.dim() != dimensions + 2:
        return None
    stride, dilation = (_each(x, dimensions) for x in (stride, dilation))
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads = [(r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach]
    else:
        pads = [(p, p) for p in _each(padding, dimensions)]

    def gradient(dy: Tensor, at: At, x: Tensor) -> Tensor:
        x = F.pad(x, [p for pad in reversed(pads) for p in pad])
        return _patchwise(dy, at, x, stride, dilation, groups)

    # Autograd keeps the input, whatever it is and for whichever gradient.
    return [Role(weight, gradient, (input,)), Role(bias, _channel_sum)]


RULES: Mapping[Callable[..., Any], Rule] = {
    F.linear: linear,
    torch.addmm: addmm,
    torch.Tensor.addmm: addmm,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.mul: mul,
    torch.Tensor.mul: mul,
    torch.conv1d: convolution,
    torch.conv2d: convolution,
    torch.conv3d: convolution,
}


def _needing(operand: Any, gradient: Callable[..., Tensor], x: Tensor) -> Role:
    """The operand's role, if its gradient needs x: kept, or made again from what is kept anyway."""
    make, parts = factors(x) or (lambda x: x, (x,))
    return Role(operand, lambda dy, at, *kept: gradient(dy, at, make(*kept)), parts)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _rows(dy: Tensor, at: At, x: Tensor) -> Tensor:
    return product(_matrix(dy), _matrix(x), at.entries)


def _columns(dy: Tensor, at: At, x: Tensor) -> Tensor:
    return product(_matrix(x), _matrix(dy), at.entries)


def _picked(x: Tensor, at: At) -> tuple[Tensor, Tensor | slice]:
    """The matrix's columns at these places, or all of them and which to take from their sums."""
    few = len(at) * FEW < x.shape[1]
    return (x[:, at.flat], slice(None)) if few else (x, at.flat)


def _sum(dy: Tensor, at: At) -> Tensor:
    """Σ_t dY[t, i]."""
    dy, where = _picked(dy.reshape(-1, math.prod(at.shape)), at)
    return dy.sum(0, dtype=wider(dy[:0]).dtype)[where]


def _scale(dy: Tensor, at: At, x: Tensor) -> Tensor:
    """Σ_t dY[t, i]·X[t, i]."""
    size = math.prod(at.shape)
    dy, where = _picked(dy.reshape(-1, size), at)
    x, _ = _picked(x.reshape(-1, size), at)
    return (wider(dy) * wider(x)).sum(0)[where]


def _looked_up(dy: Tensor, at: At, tokens: Tensor, padding: int) -> Tensor:
    """Sums over equal tokens, then what is asked of them: as much memory as the output has."""
    tokens = tokens.reshape(-1).int()
    rows, columns = at.entries.rows, at.entries.columns
    counts = tokens != padding
    counts &= rows[torch.searchsorted(rows, tokens).clamp_(max=len(rows) - 1)] == tokens
    places = counts.nonzero().squeeze(1)
    found, which = tokens[places].unique(return_inverse=True)
    dy = wider(_matrix(dy)[places])
    sums = dy.new_zeros(len(found), dy.shape[1]).index_add_(0, which, dy)
    out = dy.new_zeros(len(rows))
    if len(found):
        row = torch.searchsorted(found, rows).clamp_(max=len(found) - 1)
        hit = (found[row] == rows).nonzero().squeeze(1)
        out[hit] = sums[row[hit], columns[hit]]
    return out


def _each(x: Any, dimensions: int) -> tuple[int, ...]:
    given = tuple(x) if isinstance(x, Sequence) else (x,)
    return given * dimensions if len(given) == 1 else given


def _channel_sum(dy: Tensor, at: At) -> Tensor:
    return dy.sum([d for d in range(dy.dim()) if d != 1], dtype=wider(dy[:0]).dtype)[at.flat]


def _patchwise(
    dy: Tensor,
    at: At,
    x: Tensor,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Some samples at a time, so that their patches take bounded memory."""
    x, kernel, places = x.contiguous(), at.shape[2:], dy.shape[2:]
    patches = x.shape[1] * math.prod(kernel) * math.prod(places)
    size = max(1, PATCHES // max(1, patches))
    sample, channel, *steps = x.stride()
    within = [s * d for s, d in zip(steps, dilation, strict=True)]
    between = [s * d for s, d in zip(steps, stride, strict=True)]
    total = wider(dy.new_zeros(len(at)))
    for some, d in zip(x.split(size), dy.split(size), strict=True):
        # (channel, place in the kernel) by (sample, place of the kernel)
        unfolded = some.as_strided(
            (x.shape[1], *kernel, len(some), *places), (channel, *within, sample, *between),
            some.storage_offset(),
        ).reshape(x.shape[1] * math.prod(kernel), len(some) * math.prod(places))  # fmt: skip
        left = d.transpose(0, 1).flatten(1)
        total += product(left, unfolded, at.grouped(groups), along=1)
    return total
