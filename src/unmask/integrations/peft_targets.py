"""Which scalars of a model an adapter may choose from, in PEFT's terms: targeted modules."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from fnmatch import fnmatchcase
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from unmask.eligible import INSTEAD, Eligible, is_plain
from unmask.errors import UnmaskError
from unmask.processes import check_unwrapped

ORIGINAL = "original_module"  # what PEFT's modules_to_save calls the module it copied


def verdict(config: Any, key: str) -> Any:
    """What PEFT says of a module's name: targeted, excluded, or neither."""
    if config.target_modules is None:  # the whole model, less what is excluded
        config = copy(config)
        config.target_modules = ".*"
    return check_target_module_exists(config, key)


def find(config: Any, model: nn.Module, own: str) -> Eligible:
    """The plain floating-point parameters in targeted modules, less those in excluded ones."""
    check_unwrapped(model)
    targeted, excluded, copies = set(), set(), set()
    for key, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            copies |= {f"{key}.{n}" for n, _ in module.named_children() if n != ORIGINAL}
        found = verdict(config, _canonical(key)) if key else False
        if isinstance(found, _ExcludedModule):
            excluded.add(_canonical(key))
        elif found or (not key and config.target_modules is None):
            targeted.add(_canonical(key))
    names: dict[int, list[str]] = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        if not _within(raw, copies) and not raw.startswith(f"{own}."):
            names.setdefault(id(parameter), []).append(_canonical(raw))
    patterns = config.build().include

    def matches(aliases: Iterable[str]) -> bool:
        return (
            any(_within(name, targeted) for name in aliases)
            and not any(_within(name, excluded) for name in aliases)
            and any(fnmatchcase(name, pattern) for name in aliases for pattern in patterns)
        )

    chosen = {
        names[id(p)][0]: p
        for p in model.parameters()
        if id(p) in names and is_plain(p) and matches(names[id(p)])
    }
    if not chosen:
        raise UnmaskError(
            f"no parameter is eligible: target_modules={config.target_modules} reaches no "
            "floating-point parameter that the method may choose; widen target_modules=, or narrow "
            "exclude_modules= and modules_to_save="
            + ("" if all(map(is_plain, model.parameters())) else f"; {INSTEAD}")
        )
    return Eligible(chosen)


def _within(name: str, modules: set[str]) -> bool:
    """Whether a dotted name lies in, or is, one of these modules; "" is the whole model."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in modules for i in range(len(parts) + 1))


def _canonical(name: str) -> str:
    """The name that a parameter has where PEFT wraps nothing."""
    return ".".join(part for part in name.split(".") if part != ORIGINAL)
