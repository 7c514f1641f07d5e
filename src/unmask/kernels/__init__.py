"""The inner loops, each in plain torch (`reference`) and compiled for the CPU (`cpu`).

`Sweep` is a filter, not a judge: it finds every scalar that could reach a threshold and perhaps a
few that can't. The heuristic's own formula, in torch, then decides, so that a selection is the same
whichever kernel ran. `gather` and `scatter` move single scalars between many tensors and a vector.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.errors import UnmaskWarning
from unmask.kernels import reference

__all__ = ["Run", "compiled_for", "gather", "scatter"]


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


def _shared_out(runs: list[Run], *vectors: Tensor) -> Iterator[tuple[ModuleType, list[Run]]]:
    """Which module's kernels take which of the runs."""
    if (compiled := compiled_for(*vectors)) is None or vectors[-1].dtype != torch.float32:
        yield reference, runs
        return
    for module in (compiled, reference):
        share = [
            run for run in runs if (compiled_for(run.tensor) is compiled) == (module is compiled)
        ]
        if share:
            yield module, share


def compiled_for(*tensors: Tensor) -> ModuleType | None:
    """The module of compiled kernels that can work on these tensors where they lie, if any."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    module = _cpu()
    return module if module is not None and all(map(module.handles, tensors)) else None


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
