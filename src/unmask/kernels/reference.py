"""The kernels in plain torch: the meaning of the fast ones, and the fallback on any device.

(The sweep's plain form is `TopK`'s own walk over whole runs of scalars, in select.py.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

if TYPE_CHECKING:
    from unmask.kernels import Run


def gather(runs: list[Run], index: Tensor, out: Tensor, add: bool) -> None:
    """out[i] = (or +=) the scalar with the sorted global index[i], for all i of the runs."""
    for tensor, offset, start, stop in runs:
        flat = (index[start:stop] - offset).to(tensor.device, torch.int64)
        if tensor.is_contiguous():
            scalars = tensor.detach().view(-1).index_select(0, flat)
        else:
            scalars = tensor.detach()[torch.unravel_index(flat, tensor.shape)]
        if add:  # in the scalars' own precision, as autograd adds up gradients
            scalars = (out[start:stop].to(scalars.device) + scalars).to(scalars.dtype)
        out[start:stop] = scalars.to(out.device, out.dtype)


def scatter(runs: list[Run], index: Tensor, values: Tensor, where: Tensor | None) -> None:
    """The scalar with the sorted global index[i] = values[where[i]] (or values[i]), cast."""
    for tensor, offset, start, stop in runs:
        flat = (index[start:stop] - offset).to(tensor.device, torch.int64)
        scalars = values[start:stop] if where is None else values[where[start:stop]]
        scalars = scalars.to(tensor.device, tensor.dtype)
        if tensor.is_contiguous():
            # Several times as fast as index_copy_.
            tensor.detach().view(-1).scatter_(0, flat, scalars)
        else:
            tensor.detach()[torch.unravel_index(flat, tensor.shape)] = scalars


def insert(index: Tensor, more: Tensor, belongs: Tensor, more_belongs: Tensor) -> None:
    """Put `more` into `index`, which has room for it at its end; both sorted, without a common
    entry; and what belongs to each entry likewise."""
    count = len(index) - len(more)
    merged, order = torch.cat([index[:count], more]).sort()
    index.copy_(merged)
    belongs.copy_(torch.cat([belongs[:count], more_belongs])[order])


def search(index: Tensor, wanted: Tensor) -> Tensor:
    """How many entries of `index` each of `wanted` is above, int64; both sorted."""
    return torch.searchsorted(index, wanted)


def written(tensors: Iterable[Tensor]) -> None:
    """Tell autograd of writes that it can't have seen, as compiled code's."""
    tensors = list(tensors)
    try:
        increment_version(tensors)
    except (TypeError, AttributeError):  # torch 2.6 takes them one by one
        for tensor in tensors:
            increment_version(tensor)
