"""Scalars by position, their fingerprint, and where they go in a model: bits, never floats."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unmask.eligible import FLOATS
from unmask.errors import UnmaskError

__all__ = [
    "Sparse",
    "bits",
    "describe",
    "held_by",
    "target",
]

# Values travel as integers of their width: then no float rule can touch a NaN's payload or a -0.0.
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Sparse:
    """Some scalars of one tensor: `values[i]` stands at flat index `indices[i]` of `shape`.

    An instance is valid, wherever its parts came from: both vectors lie in CPU memory, `indices`
    is int64, strictly increasing and inside the shape, `values` has the weights' own dtype.
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        for part in ("indices", "values"):
            object.__setattr__(self, part, getattr(self, part).detach().cpu().contiguous())
        if self.values.dtype not in FLOATS:
            raise UnmaskError(f"values are {describe(self.values)}, not 16 to 64-bit floats")
        if self.indices.dtype != torch.int64 or self.indices.ndim != 1:
            raise UnmaskError(f"indices are {describe(self.indices)}, not an int64 vector")
        if self.values.shape != self.indices.shape:
            raise UnmaskError(f"{len(self.indices)} indices for values {list(self.values.shape)}")
        at = self.indices.numpy()
        if at.size and not (at[0] >= 0 and at[-1] < self.numel and np.all(at[1:] > at[:-1])):
            raise UnmaskError(
                f"indices from {at[0]} to {at[-1]} aren't strictly increasing "
                f"within the {self.numel:,} scalars of shape {list(self.shape)}"
            )

    @property
    def numel(self) -> int:
        """Scalars of the whole tensor."""
        return math.prod(self.shape)

    @classmethod
    def valid(cls, shape: tuple[int, ...], indices: Tensor, values: Tensor) -> Sparse:
        """Made of what is known to be valid: not checked."""
        other = object.__new__(cls)
        vars(other).update(shape=shape, indices=indices, values=values)
        return other


def bits(tensor: Tensor) -> Tensor:
    """View `tensor` as integers of the same width."""
    if tensor.element_size() not in _INTEGER:
        raise UnmaskError(f"{describe(tensor)} is too wide to be kept bit for bit")
    return tensor.view(_INTEGER[tensor.element_size()])


def describe(tensor: Tensor) -> str:
    """Dtype and shape, for messages and comparisons."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def held_by(model: nn.Module, kind: str, names: Collection[str]) -> Mapping[str, Tensor]:
    """Find the parameters or buffers of these names, by a walk over all only if it takes that."""
    found, holding = {}, f"_{kind}"
    modules: dict[str, nn.Module | None] = {}
    for name in names:
        path, dot, leaf = name.rpartition(".")
        if dot and path not in modules:
            module: nn.Module | None = model
            for part in path.split("."):
                module = None if module is None else module._modules.get(part)
            modules[path] = module
        holder = modules[path] if dot else model
        tensor = None if holder is None else getattr(holder, holding).get(leaf)
        if tensor is None:  # not there, or under a name of its wrapper's or its own making
            return dict(getattr(model, f"named_{kind}")(remove_duplicate=False))
        found[name] = tensor
    return found


def target(
    held: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Find the tensor `name`, refused unless the delta's bits can be written straight into it."""
    if name not in held:
        near = difflib.get_close_matches(name, held, 1)
        raise UnmaskError(
            f"the delta changes {name!r}, which this model doesn't have"
            f"{f' (it has {near[0]!r})' if near else ''}; apply it to the unwrapped architecture "
            "that it was made on"
        )
    tensor = held[name]
    plain = type(tensor) in (nn.Parameter, Tensor) and not tensor.is_meta
    if plain and tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous():
        return tensor  # almost always
    if is_lazy(tensor) or tensor.is_meta:
        raise UnmaskError(f"{name!r} holds no data yet; load the weights before the delta")
    plain = plain and not (dtype.is_floating_point and not tensor.is_floating_point())
    if not plain:
        remedy = "it is quantised or sharded: apply the delta to the plain model first"
    elif tuple(tensor.shape) != shape:
        remedy = "apply the delta to a model of its base's sizes (vocabulary, classes)"
    elif tensor.dtype != dtype:
        remedy = f"load the base in {dtype}, apply the delta, then cast"
    elif any(size > 1 and not step for size, step in zip(shape, tensor.stride(), strict=True)):
        remedy = "it is an expanded view, one scalar seen many times: clone it first"
    else:
        return tensor
    asked = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
    raise UnmaskError(f"{name!r} is {asked} in the delta, {describe(tensor)} here; {remedy}")
