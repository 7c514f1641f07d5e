"""What a method is made of: frozen dataclasses that refuse fields of another kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from numbers import Integral, Real

from unmask.errors import UnmaskError

__all__ = ["Part", "is_whole"]


def is_whole(x: object) -> bool:
    """Whether it is a whole number, Python's or numpy's; True and False aren't."""
    return isinstance(x, Integral) and not isinstance(x, bool)


# By annotation: what a field may hold, and that in words. Fields of other kinds aren't checked.
KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "float": (lambda x: isinstance(x, Real) and not isinstance(x, bool), "a number"),
    "int": (is_whole, "a whole number"),
    # "bool_" is numpy's, which isn't imported here
    "bool": (lambda x: type(x).__name__ in ("bool", "bool_"), "True or False"),
    "str": (lambda x: isinstance(x, str), "text"),
    "Callable": (callable, "a function"),
    "None": (lambda x: x is None, "None"),
}


class Part:
    """A heuristic, a strategy, a schedule or a scope; one with a `__post_init__` of its own calls
    this one first."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # whose subclasses are dataclasses
            kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            names = [name.partition("[")[0] for name in kind.split(" | ")]
            if any(name not in KINDS for name in names):
                continue
            value = getattr(self, field.name)
            if not any(KINDS[name][0](value) for name in names):
                wanted = " or ".join(KINDS[name][1] for name in names)
                raise UnmaskError(
                    f"{type(self).__name__} was asked for {field.name}={value!r}; it is {wanted}"
                )
