"""The one place where a method is added to PEFT from outside, which PEFT doesn't provide for.

PEFT (0.20 to 0.21, read and tested) dispatches everything by `PeftType`, a closed enumeration:
`register_peft_method` refuses a name that isn't one of its members, and there are no entry points.
So this module adds a member to the enumeration, and then registers in PEFT's own way.

What would make it unnecessary upstream, the smallest change first:

1. `register_peft_method` adds the missing member itself, as transformers' auto classes do with
   `register`, or `PeftType` becomes a plain registry of strings;
2. `PeftConfig.from_pretrained` imports what an installed package names under an entry point
   (`peft.methods`, say) when it meets a `peft_type` that it doesn't know. Until then a process that
   loads such an adapter has to `import unmask.integrations.peft` first;
3. `get_peft_model_state_dict` and its counterpart stay delegated to the tuner class, as since 0.21.
"""

from __future__ import annotations

from typing import Any

from unmask.errors import UnmaskError

OLDEST, BEYOND = (0, 20), (0, 30)


def register(name: str, config: type[Any], model: type[Any], prefix: str) -> Any:
    """Make `name` a PEFT method, as if PEFT had shipped it; returns its `PeftType`."""
    import peft
    from peft.utils import register_peft_method
    from peft.utils.peft_types import PeftType

    check(peft.__version__)
    try:
        if name.upper() not in PeftType.__members__:
            _add_member(PeftType, name.upper())
        register_peft_method(name=name, config_cls=config, model_cls=model, prefix=prefix)
    except (AttributeError, TypeError, ValueError) as problem:
        raise UnmaskError(
            f"peft {peft.__version__} can't be taught a new method in the way that works for "
            f"{_range()}: {problem}; install one of those, or use unmask.attach(), which needs "
            "no peft"
        ) from problem
    return PeftType[name.upper()]


def check(version: str) -> None:
    """Refuse a peft that this was never tried with."""
    found = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= found < BEYOND:
        raise UnmaskError(
            f"peft {version} is installed, unmask.integrations.peft works with {_range()}; "
            "install one of those, or use unmask.attach(), which needs no peft"
        )


def _range() -> str:
    low, high = (".".join(map(str, bound)) for bound in (OLDEST, BEYOND))
    return f"peft >= {low}, < {high}"


def _add_member(enumeration: Any, name: str) -> None:
    """Add a member to a closed enumeration of strings."""
    member = str.__new__(enumeration, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enumeration
    member._sort_order_ = len(enumeration._member_names_)
    type.__setattr__(enumeration, name, member)  # the enumeration's own refuses
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = enumeration._value2member_map_[name] = member
