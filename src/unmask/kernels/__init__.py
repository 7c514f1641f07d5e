"""The inner loops, each in plain torch (`reference`) and compiled for CPUs (`cpu`), GPUs (`cuda`).

`Sweep` is a filter, not a judge: it finds every scalar that could reach a threshold and perhaps a
few that can't. The heuristic's own formula, in torch, then decides, so that a selection is the same
whichever kernel ran. `gather` and `scatter` move single scalars between many tensors and a vector.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from subprocess import SubprocessError
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.errors import UnmaskWarning
from unmask.kernels import reference

__all__ = ["Run", "compiled_for", "gather", "insert", "merge", "scatter", "search"]


class Run(NamedTuple):
    """index[start:stop] are scalars of `tensor`, whose first has the global index `offset`."""

    tensor: Tensor
    offset: int
    start: int
    stop: int


def gather(runs: list[Run], index: Tensor, out: Tensor, add: bool = False) -> None:
    """out[i] = (or +=) the scalar with the sorted global index[i], for all i of the runs."""
    for module, share in _shared_out(runs, index, out):
        module.gather(share, index, out, add)


def scatter(runs: list[Run], index: Tensor, values: Tensor, where: Tensor | None = None) -> None:
    """The scalar with the sorted global index[i] = values[where[i]], cast, for all i of the runs.

    Without `where`, values[i].
    """
    for module, share in _shared_out(runs, index, values):
        module.scatter(share, index, values, where)


def merge(
    index: Tensor, more: Tensor, belongs: Tensor, more_belongs: Tensor
) -> tuple[Tensor, Tensor]:
    """Two sorted vectors without a common entry as one, and what belongs to each entry: O(both)."""
    room = index.new_empty(len(index) + len(more)), belongs.new_empty(len(index) + len(more))
    for into, given in zip(room, (index, belongs), strict=True):
        into[: len(given)] = given
    insert(room[0], more, room[1], more_belongs)
    return room


def insert(index: Tensor, more: Tensor, belongs: Tensor, more_belongs: Tensor) -> None:
    """The same in place: `index` and `belongs` end with as much room as there is more."""
    parts = index, more, belongs, more_belongs
    module = compiled_for(*parts)
    getattr(module, "insert", reference.insert)(*parts)


def search(index: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of the sorted `wanted` is in the sorted `index`, int64; and whether it is there:
    else where another stands, or 0."""
    if not len(index):
        return wanted.new_zeros(len(wanted), dtype=torch.int64), torch.zeros_like(
            wanted, dtype=torch.bool
        )
    module = compiled_for(index, wanted)
    place = getattr(module, "search", reference.search)(index, wanted).clamp_(max=len(index) - 1)
    return place, index[place] == wanted


def _shared_out(runs: list[Run], *vectors: Tensor) -> Iterator[tuple[ModuleType, list[Run]]]:
    """Which module's kernels take which of the runs."""
    if (compiled := compiled_for(*vectors)) is None or vectors[-1].dtype != torch.float32:
        yield reference, runs
        return
    able, home = compiled.handles, vectors[0].device
    shares: dict[ModuleType, list[Run]] = {compiled: [], reference: []}
    for run in runs:
        shares[compiled if able(run.tensor, home) else reference].append(run)
    yield from ((module, share) for module, share in shares.items() if share)


def compiled_for(*tensors: Tensor) -> ModuleType | None:
    """The module of compiled kernels that can work on these tensors where they lie, if any; on
    several GPUs at once none can."""
    home = tensors[0].device
    module = _cpu() if home.type == "cpu" else _cuda() if home.type == "cuda" else None
    if module is not None:
        able = module.handles
        for tensor in tensors:  # a loop, as this is asked of every tensor at every step
            if not able(tensor, home):
                return None
    return module


@cache
def _cpu() -> ModuleType | None:
    """The CPU's kernels, or None (said once) where numba can't be imported."""
    try:
        from unmask.kernels import cpu
    except ImportError as problem:
        warnings.warn(
            f"numba can't be imported ({problem}), so selection runs in plain torch: the same "
            "result, slower; `pip install numba` brings the compiled kernels back",
            UnmaskWarning,
            stacklevel=2,
        )
        return None
    return cpu


@cache
def _cuda() -> ModuleType | None:
    """The GPU's kernels, or None (said once) where Triton can't be imported or can't compile."""
    try:
        from unmask.kernels import cuda

        cuda.try_out("cuda")
    except (ImportError, OSError, RuntimeError, SubprocessError) as problem:
        warnings.warn(
            f"Triton can't be used ({problem}), so selection on GPUs runs in plain torch: the same "
            "result, slower; `pip install triton` and a C compiler bring the compiled kernels back",
            UnmaskWarning,
            stacklevel=2,
        )
        return None
    return cuda
