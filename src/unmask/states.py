"""A state that is to be taken over, from wherever it comes: refused before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unmask.errors import UnmaskError
from unmask.part import is_whole

__all__ = ["check_run", "check_table", "increasing"]

INTEGERS = (torch.int32, torch.int64)
# Parts of a table, and what each has as many entries as.
LIKE = {
    "position": "index",
    "values": "values",
    "base": "values",
    "retired_base": "retired",
    "retired_values": "retired",
}


def check_run(state: Mapping[str, Any], same: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Refuse what isn't a tuner's state, one of a run that isn't the `same`, counts that are none,
    and what should be tensors by name; `names` are eligible."""
    keys = {*same, "steps", "step", "updates", "slots", "seen", "heard", "whole", "whole_base"}
    if missing := keys - (state.keys() if isinstance(state, Mapping) else set()):
        raise UnmaskError(
            f"this is no state of a tuner, {', '.join(sorted(missing))} missing; "
            "give what tuner.state_dict() returned"
        )
    for key, ours in same.items():
        if state[key] != ours:
            raise UnmaskError(
                f"the state is of a run with {key}={state[key]}, this one has {ours}; "
                "attach() with the same method, steps=, include= and exclude="
            )
    for key in ("step", "updates"):
        _demand(_is_count(state[key]), f"{key}={state[key]!r} is no count")
    steps, heard = state["steps"], state["heard"]
    _demand(steps is None or (_is_count(steps) and steps > 0), f"steps={steps!r} is no count")
    numbers = isinstance(heard, list | tuple) and all(isinstance(x, int | float) for x in heard)
    _demand(numbers, f"heard={heard!r} isn't a list of numbers")
    for key in ("slots", "seen", "whole", "whole_base"):
        part = state[key]
        held = isinstance(part, Mapping) and all(isinstance(t, Tensor) for t in part.values())
        _demand(held, f"{key!r} isn't tensors by name")
    _demand(state["seen"].keys() <= set(names), "'seen' is of parameters that aren't eligible")


def check_table(table: Mapping[str, Tensor], total: int, values: Tensor) -> None:
    """Refuse a table of slots that can't be of `total` scalars and a vector like `values`."""
    missing = {"index", "retired", "handed_out", *LIKE} - table.keys()
    _demand(not missing, f"its slots lack {', '.join(sorted(missing))}")
    index, position, retired, used = (
        table[name] for name in ("index", "position", "retired", "handed_out")
    )
    for name in ("index", "position", "retired"):
        part = table[name]
        _demand(part.ndim == 1 and part.dtype in INTEGERS, f"{name!r} isn't a vector of integers")
    for name, like in LIKE.items():
        size = len(values if like == "values" else table[like])
        _demand(table[name].shape == (size,), f"{name!r} isn't a vector of {size:,} entries")
        kind = table[name].dtype
        _demand(name == "position" or kind == values.dtype, f"{name!r} is of {kind}")
    for name in ("index", "retired"):
        _demand(increasing(table[name], total), f"{name!r} isn't sorted, from 0 to {total - 1:,}")
    both = torch.cat([index, retired.to(index.device)]).sort().values
    _demand(increasing(both, total), "a scalar is in 'index' and in 'retired'")
    count = int(used) if used.numel() == 1 and used.dtype in INTEGERS else -1
    _demand(0 <= count <= len(values), f"handed_out={used} isn't from 0 to {len(values):,}")
    places = position.sort().values
    _demand(increasing(places, count), f"'position' isn't different places below {count:,}")


def increasing(index: Tensor, stop: int) -> bool:
    """Whether these are different numbers from 0 to below `stop`, in order."""
    if not len(index):
        return True
    return bool(index[0] >= 0 and index[-1] < stop and (index[1:] > index[:-1]).all())


def _is_count(x: object) -> bool:
    return is_whole(x) and x >= 0  # type: ignore[operator]


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise UnmaskError(f"the state is damaged: {what}; load an earlier checkpoint")
