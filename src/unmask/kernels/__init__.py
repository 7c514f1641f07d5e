"""The inner loops, each in plain torch (`reference`) and compiled for the CPU (`cpu`).

`scan` is a filter, not a judge: it returns every scalar that could reach the threshold and perhaps
a few that can't. The heuristic's own formula, in torch, then decides, so that the selection is the
same whichever kernel ran.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType

from torch import Tensor

from unmask.errors import UnmaskWarning
from unmask.kernels import reference

__all__ = ["Scan", "scan_for"]


# (theta, grad, start, stop, (exp, eps), threshold, taken, offset, capacity) to (candidates, where
# it ended, whether all was finite): see reference.scan
Scan = Callable[
    [Tensor, Tensor, int, int, tuple[float, float], float, Tensor, int, int],
    tuple[Tensor, int, bool],
]


def scan_for(theta: Tensor, grad: Tensor) -> Scan:
    """The fastest scan for these tensors (1-D, contiguous)."""
    compiled = _compiled() if theta.device.type == "cpu" and grad.device.type == "cpu" else None
    if compiled is not None and theta.dtype in compiled.SHIFTS and grad.dtype in compiled.SHIFTS:
        return compiled.scan  # type: ignore[no-any-return]
    return reference.scan


@cache
def _compiled() -> ModuleType | None:
    """The module of compiled CPU kernels, or None (said once) where numba can't be imported."""
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
