"""A delta as the sparse weight patches that vLLM applies to a running server.

vLLM's `sparse_nccl` weight transfer (its pull requests 40096, 50723 and 53751) takes, for each
tensor of a checkpoint, name, full shape, flat int32 indices and the values there. The server's own
loader maps them to its fused and sharded weights. This module imports nothing of vLLM: a patch is a
plain tuple with the attributes that vLLM reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.delta import Delta
from unmask.errors import UnmaskError

__all__ = ["Patch", "patches"]

LARGEST = torch.iinfo(torch.int32).max


class Patch(NamedTuple):
    """New values at flat indices of one tensor of a checkpoint.

    Has the attributes of vLLM's `SparseWeightPatch`, for `send_weights`, and the fields of its
    `CheckpointWeightPatch`, for `load_checkpoint_weight_patches`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape, as `SparseWeightPatch` calls it."""
        return self.shape


def patches(
    delta: Delta,
    *,
    rename: Callable[[str], str] = str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> list[Patch]:
    """The delta as patches, one a tensor: they do to a server what `apply` does to a model.

    The undo of a delta makes the patches that take it off again. `rename` turns a parameter's name
    into the checkpoint's, where they differ; `dtype` casts, as the server will anyway, before the
    values travel. Parameters stored whole become patches of all their scalars.
    """
    if delta.buffers:
        raise UnmaskError(
            f"the delta changes the buffer {min(delta.buffers)!r}, but vLLM takes parameters only; "
            "serve the merged model (`unmask apply`)"
        )
    scalars = [(n, p.shape, p.values, p.indices) for n, p in delta.sparse.items()]
    whole = [
        (n, tuple(t.shape), t.view(-1), torch.arange(t.numel())) for n, t in delta.full.items()
    ]
    made = []
    for name, shape, values, index in (*scalars, *whole):
        if math.prod(shape) > LARGEST:
            raise UnmaskError(
                f"{name!r} has {math.prod(shape):,} scalars, vLLM's int32 indices end at "
                f"{LARGEST:,}; serve the merged model (`unmask apply`)"
            )
        if not values.is_floating_point() or torch.isnan(values).any():
            raise UnmaskError(
                f"{name!r} holds NaN or isn't floating-point, and vLLM marks what stays with NaN; "
                "serve the merged model (`unmask apply`)"
            )
        values = values.to(device, dtype or values.dtype)
        index = index.to(device, torch.int32)
        made.append(Patch(rename(name), tuple(shape), values.dtype, values, index))
    _distinct(patch.name for patch in made)
    return made


def _distinct(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UnmaskError(f"rename= gives two tensors the name {name!r}")
        seen.add(name)
