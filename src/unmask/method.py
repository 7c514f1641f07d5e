"""A method is a composition: heuristic + strategy + budget + scope; and how to write one down."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import FunctionType
from typing import Any

from unmask.eligible import listed
from unmask.errors import UnmaskError
from unmask.heuristics import Heuristic
from unmask.schedules import Schedule
from unmask.scopes import Global, Scope
from unmask.strategies import Strategy
from unmask.units import Units as Units  # a scope that `from_dict` has to know of

__all__ = ["Budget", "Method"]

Budget = int | float
INNER = (Heuristic, Schedule, Scope)  # what parts of a method hold


@dataclass(frozen=True)
class Method:
    """Train the `budget` scalars that `heuristic` ranks highest, chosen as `strategy` says.

    budget   an int counts scalars; a float in (0, 1] is a share of the eligible scalars
    include  shell patterns on parameter names that narrow what is eligible (biases only, say)
    scope    over what "highest" is meant: the whole model unless said otherwise

    >>> from unmask import Magnitude, Static
    >>> method = Method(Magnitude(), Static(), budget=1000)
    >>> Method.from_dict(method.to_dict()) == method
    True
    """

    heuristic: Heuristic
    strategy: Strategy
    budget: Budget
    include: tuple[str, ...] = ("*",)
    scope: Scope = field(default_factory=Global)

    def __post_init__(self) -> None:
        parts = ((self.heuristic, Heuristic), (self.strategy, Strategy), (self.scope, Scope))
        for value, kind in parts:
            if not isinstance(value, kind):
                raise UnmaskError(
                    f"Method was given {value!r} for its {kind.__name__.lower()}; "
                    f"give an instance of unmask.{kind.__name__}"
                )
        object.__setattr__(self, "budget", _checked(self.budget))
        object.__setattr__(self, "include", listed(self.include))

    def resolve(self, eligible: int, tensors: int) -> int:
        """The budget in scalars, given how many are eligible."""
        if isinstance(self.budget, int):
            if self.budget > eligible:
                raise UnmaskError(
                    f"budget={self.budget:,} exceeds the {eligible:,} scalars in {tensors} "
                    "eligible tensors; lower the budget or widen include="
                )
            return self.budget
        return max(1, round(self.budget * eligible))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, read back by `from_dict`."""
        return {
            "heuristic": encode(self.heuristic),
            "strategy": encode(self.strategy),
            "budget": self.budget,
            "include": list(self.include),
            "scope": encode(self.scope),
        }

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Method:
        """The method that `to_dict` described; classes of your own are found once imported."""
        try:
            return cls(
                heuristic=decode(described["heuristic"], Heuristic),
                strategy=decode(described["strategy"], Strategy),
                budget=described["budget"],
                include=described["include"],
                scope=decode(described["scope"], Scope),
            )
        except (KeyError, TypeError) as problem:
            raise UnmaskError(
                f"{described!r} doesn't describe a method ({problem}); "
                "give what Method.to_dict() returned"
            ) from problem


def _checked(budget: Budget) -> Budget:
    """The budget as a plain int or float, or an UnmaskError that says what is allowed."""
    allowed = "a budget is an int above 0 (scalars) or a float in (0, 1] (share of the eligible)"
    if isinstance(budget, bool | str):
        raise UnmaskError(f"budget={budget!r}; {allowed}")
    try:
        count = operator.index(budget)  # type: ignore[arg-type]  # ints of numpy, too
    except TypeError:
        try:
            share = float(budget)
        except (TypeError, ValueError):
            raise UnmaskError(f"budget={budget!r}; {allowed}") from None
        if not 0 < share <= 1:
            raise UnmaskError(f"budget={budget!r}; {allowed}") from None
        return share
    if count < 1:
        raise UnmaskError(f"budget={budget!r}; {allowed}")
    return count


def encode(part: Any) -> Any:
    """A frozen dataclass as {"kind": class name, field: value, ...}, parts within parts too."""
    if isinstance(part, FunctionType):
        name = f"{part.__module__}:{part.__qualname__}"
        if _function(name) is not part:
            raise UnmaskError(
                f"the function {name} can't be written down: it has no name in its module; define "
                "it with `def` at the top of a module"
            )
        return {"function": name}
    if not is_dataclass(part):
        if hasattr(part, "item"):  # a number of numpy's or torch's
            return part.item()
        return list(part) if isinstance(part, tuple) else part
    described = {f.name: encode(getattr(part, f.name)) for f in fields(part)}
    return {"kind": _kind(type(part)), **described}


def decode(described: Any, *bases: type[Any]) -> Any:
    """The inverse of `encode`, for a part of a method that is one of these."""
    if isinstance(described, Mapping) and "function" in described:
        found = _function(str(described["function"]))
        if found is None:
            raise UnmaskError(
                f"no function is called {described['function']!r} in an imported module; import "
                "the module that defines it first"
            )
        return found
    if not isinstance(described, Mapping) or "kind" not in described:
        return tuple(described) if isinstance(described, list) else described
    kinds = {_kind(kind): kind for base in bases for kind in _subclasses(base)}
    if described["kind"] not in kinds:
        sort = " or ".join(base.__name__.lower() for base in bases)
        raise UnmaskError(
            f"no {sort} is called {described['kind']!r}; there are {', '.join(sorted(kinds))} "
            "(import the module that defines your own first)"
        )
    values = {k: decode(v, *INNER) for k, v in described.items() if k != "kind"}
    return kinds[described["kind"]](**values)


def _kind(part: type[Any]) -> str:
    """A class of ours by its name, another by its module's too."""
    ours = part.__module__.partition(".")[0] == __name__.partition(".")[0]
    return part.__name__ if ours else f"{part.__module__}.{part.__qualname__}"


def _function(name: str) -> FunctionType | None:
    """The function of this name, if its module is imported: reading a description runs no code."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, FunctionType) else None


def _subclasses(base: type[Any]) -> list[type[Any]]:
    direct = base.__subclasses__()
    return direct + [deeper for kind in direct for deeper in _subclasses(kind)]
