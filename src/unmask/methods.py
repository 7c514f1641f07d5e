"""A method is a composition: heuristic + strategy + budget. Named methods are only that."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from unmask.errors import UnmaskError
from unmask.heuristics import D3, Gradient, Heuristic, Magnitude, Random
from unmask.schedules import Schedule, Uniform
from unmask.scopes import Global, Scope
from unmask.strategies import Increment, Repeat, Static, Strategy

__all__ = ["bitfit", "full", "id3", "pafi", "random_mask", "repeat_d3", "static_d3"]

Budget = int | float


@dataclass(frozen=True)
class Method:
    """Train the `budget` scalars that `heuristic` ranks highest, chosen as `strategy` says.

    budget   an int counts scalars; a float in (0, 1] is a share of the eligible scalars
    include  shell patterns on parameter names that narrow what is eligible (biases only, say)
    scope    over what "highest" is meant: the whole model unless said otherwise

    >>> method = id3(budget=1000)
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
        object.__setattr__(self, "include", tuple(self.include))

    def resolve(self, eligible: int, tensors: int) -> int:
        """The budget in scalars, given how many are eligible."""
        if isinstance(self.budget, int):
            if self.budget > eligible:
                raise UnmaskError(
                    f"budget={self.budget:,} exceeds the {eligible:,} scalars in {tensors} eligible "
                    "tensors; lower the budget or widen include="
                )
            return self.budget
        return max(1, round(self.budget * eligible))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, read back by `from_dict`."""
        return {
            "heuristic": _encode(self.heuristic),
            "strategy": _encode(self.strategy),
            "budget": self.budget,
            "include": list(self.include),
            "scope": _encode(self.scope),
        }

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Method:
        """The method that `to_dict` described; classes of your own are found once imported."""
        try:
            return cls(
                heuristic=_decode(described["heuristic"], Heuristic),
                strategy=_decode(described["strategy"], Strategy),
                budget=described["budget"],
                include=tuple(described["include"]),
                scope=_decode(described["scope"], Scope),
            )
        except (KeyError, TypeError) as problem:
            raise UnmaskError(
                f"{dict(described)!r} doesn't describe a method ({problem}); "
                "give what Method.to_dict() returned"
            ) from problem


def id3(
    budget: Budget, exp: float = 2.0, eps: float = 1.0, schedule: Schedule | None = None
) -> Method:
    """ID3: increment-S with D3. Λ_{t+1} = Λ_t ∪ top-u_t of |∇θ| / (|θ| + ε)^exp over masked scalars.

    Source: Agarwal et al., "Step-by-Step Unmasking", TACL 2025, arXiv 2408.14470, Algorithm 1.
    """
    return Method(D3(exp, eps), Increment(Uniform() if schedule is None else schedule), budget)


def static_d3(budget: Budget, exp: float = 2.0, eps: float = 1.0) -> Method:
    """static-S with D3: the top-B at the first step, kept. ID3 with T = 1 step of selection.

    Source: the ID3 paper's Figure 2 (top), arXiv 2408.14470.
    """
    return Method(D3(exp, eps), Static(), budget)


def repeat_d3(budget: Budget, exp: float = 2.0, eps: float = 1.0) -> Method:
    """repeat-S with D3: the top-B anew at every step; the scalars ever touched exceed B.

    Source: the ID3 paper's Figure 2 (middle) and Section 6, arXiv 2408.14470.
    """
    return Method(D3(exp, eps), Repeat(), budget)


def pafi(budget: Budget) -> Method:
    """PaFi: the B weights of smallest magnitude, chosen once; needs no data.

    Source: Liao et al., ACL 2023, arXiv 2305.16742.
    """
    return Method(Magnitude(largest=False), Static(), budget)


def bitfit(budget: Budget = 1.0) -> Method:
    """BitFit: every bias (parameters named `*bias`); with a smaller budget, those of largest |∇θ|.

    Source: Ben Zaken et al., ACL 2022, arXiv 2106.10199.
    """
    return Method(Gradient(), Static(), budget, include=("*bias",))


def random_mask(budget: Budget, seed: int = 0) -> Method:
    """R-Mask: B scalars drawn at random, once; the baseline every heuristic must beat.

    Source: the ID3 paper's Table 1 (R-Mask), arXiv 2408.14470.
    """
    return Method(Random(seed), Static(), budget)


def full(budget: Budget = 1.0) -> Method:
    """Full fine-tuning: budget = all eligible scalars, which is the base optimiser itself."""
    return Method(Gradient(), Static(), budget)


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


def _encode(part: Any) -> Any:
    """A frozen dataclass as {"kind": class name, field: value, ...}, parts within parts too."""
    if not is_dataclass(part):
        return list(part) if isinstance(part, tuple) else part
    return {"kind": type(part).__name__} | {
        f.name: _encode(getattr(part, f.name)) for f in fields(part)
    }


def _decode(described: Any, base: type[Any]) -> Any:
    if not isinstance(described, Mapping) or "kind" not in described:
        return tuple(described) if isinstance(described, list) else described
    kinds = {kind.__name__: kind for kind in _subclasses(base)}
    if described["kind"] not in kinds:
        raise UnmaskError(
            f"no {base.__name__.lower()} is called {described['kind']!r}; there are {', '.join(sorted(kinds))} "
            "(import the module that defines your own first)"
        )
    values = {k: _decode(v, Schedule) for k, v in described.items() if k != "kind"}
    return kinds[described["kind"]](**values)


def _subclasses(base: type[Any]) -> list[type[Any]]:
    direct = base.__subclasses__()
    return direct + [deeper for kind in direct for deeper in _subclasses(kind)]
