"""Compiled kernels for work that a process may do once or often: loaded when they pay."""

from __future__ import annotations

import sys
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

from unmask.errors import UnmaskWarning

PATIENCE = 1_500_000  # scalars that plain code may work on before the compiler's start-up pays

_worked = 0


def compiled(name: str, count: int) -> ModuleType | None:
    """The module of kernels `name` for work on `count` scalars; None: do it in plain code.

    To import numba takes as long as swapping dozens of deltas in plain torch. So a process that
    applies one and exits never does; from the second large one on, or where training has brought
    numba in anyway, the compiled kernels run.
    """
    global _worked
    if "numba" not in sys.modules and _worked < PATIENCE:
        _worked += count
        return None
    return _load(name)


@cache
def _load(name: str) -> ModuleType | None:
    try:
        return import_module(f"unmask.kernels.{name}")
    except ImportError as problem:
        warnings.warn(
            f"numba can't be imported ({problem}), so deltas are read and swapped in plain torch: "
            "the same result, slower; `pip install numba` brings the compiled kernels back",
            UnmaskWarning,
            stacklevel=2,
        )
        return None
