"""Over what the best scalars are the best: selector(count, heuristic, eligible, kept)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from unmask.allot import allot, up
from unmask.eligible import Eligible, listed
from unmask.errors import UnmaskError
from unmask.heuristics import Heuristic
from unmask.part import Part
from unmask.select import TopK, ranked
from unmask.selectors import Grouped, Within
from unmask.selectors import Selector as Selector

__all__ = ["Bounded", "Global", "PerLayer", "PerTensor", "Scope", "Selector"]


class Scope(Part, ABC):
    """Where a budget is spent."""

    @abstractmethod
    def selector(
        self, count: int, heuristic: Heuristic, eligible: Eligible, kept: Tensor
    ) -> Selector:
        """Something that chooses `count` scalars outside `kept` (sorted global indices)."""

    def staying(self, index: Tensor, worth: Tensor, count: int, eligible: Eligible) -> Tensor:
        """Which `count` of the current scalars (sorted global indices) stay where some must go, as
        positions in `index`; those of most worth, and of equals the earlier."""
        return ranked(worth, index)[:count]


@dataclass(frozen=True)
class Global(Scope):
    """The best of the whole model, wherever they are (the ID3 paper's choice)."""

    def selector(
        self, count: int, heuristic: Heuristic, eligible: Eligible, kept: Tensor
    ) -> Selector:
        return TopK(count, heuristic, kept.device)


@dataclass(frozen=True)
class Bounded(Scope):
    """The best of the whole model, with at least `floor` and at most `cap` in every tensor.

    Both count scalars if they are ints and are shares of the tensor if they are floats, rounded
    up; in a tensor where the floor is above the cap, the cap holds. A budget that can't fill all
    floors fills them as far as it goes, best first; one that the caps have no room for is an error.
    Memory for the length of a choice: the floors and twice the budget.
    """

    floor: int | float = 0
    cap: int | float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = [isinstance(bound, int) for bound in (self.floor, self.cap)]
        for bound in (self.floor, self.cap):
            _measure(bound, 0)  # refuses what is neither
        if counts[0] == counts[1] and self.floor > self.cap:
            raise UnmaskError(f"floor={self.floor!r} is above cap={self.cap!r}; lower it")

    def selector(
        self, count: int, heuristic: Heuristic, eligible: Eligible, kept: Tensor
    ) -> Selector:
        sizes, taken = _sizes(eligible), _counts(kept, eligible)
        high = [max(0, _measure(self.cap, n) - t) for n, t in zip(sizes, taken, strict=True)]
        low = [max(0, _measure(self.floor, n) - t) for n, t in zip(sizes, taken, strict=True)]
        low = [min(pair) for pair in zip(low, high, strict=True)]
        return Within(count, heuristic, eligible, kept.device, low, high)


@dataclass(frozen=True)
class PerTensor(Scope):
    """Each tensor has its own part of the budget, and the best within it.

    by      what the parts go by: "size", the tensors' numbers of scalars; "sides", rows + columns,
            so that a budget of r·Σ(m + n) gives r·(m + n) to each m x n matrix; or "even"
    within  what the best of a tensor are: the best scalars unless said otherwise

    Parts are whole numbers that add up to the budget exactly (Sainte-Laguë's rounding, by which a
    growing budget never shrinks a part). A tensor too small for its part leaves the rest to the
    others; one without a claim (a vector, by "sides") gets only what no other has room for.
    """

    by: str = "size"
    within: Scope = field(default_factory=Global)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in MEASURES:
            raise UnmaskError(
                f"{type(self).__name__} was asked for by={self.by!r}; it is one of "
                f"{', '.join(MEASURES)}"
            )
        if not isinstance(self.within, Scope) or isinstance(self.within, PerTensor):
            raise UnmaskError(
                f"{type(self).__name__} was asked for within={self.within!r}; it is a scope that "
                "deals out no parts itself: unmask.Global(), Bounded(...) or Units(...)"
            )

    def groups(self, eligible: Eligible) -> list[int]:
        """Which group each tensor belongs to, counted from 0."""
        return list(range(len(eligible.names)))

    def selector(
        self, count: int, heuristic: Heuristic, eligible: Eligible, kept: Tensor
    ) -> Selector:
        owner = self.groups(eligible)
        taken = _summed(_counts(kept, eligible), owner)
        room = _summed(_sizes(eligible), owner)
        parts = allot(len(kept) + count, self._claims(eligible, owner), taken, room)
        selectors = [
            self.within.selector(part - had, heuristic, eligible, kept) if part > had else None
            for part, had in zip(parts, taken, strict=True)
        ]
        return Grouped(count, heuristic, eligible, owner, selectors)

    def staying(self, index: Tensor, worth: Tensor, count: int, eligible: Eligible) -> Tensor:
        owner = self.groups(eligible)
        counts = _counts(index, eligible)
        have = _summed(counts, owner)
        parts = allot(count, self._claims(eligible, owner), [0] * len(have), have)
        group = torch.tensor(owner, device=index.device).repeat_interleave(
            torch.tensor(counts, device=index.device)
        )
        stay = []
        for g, part in enumerate(parts):
            if part:
                mine = (group == g).nonzero().squeeze(1)
                stay.append(mine[self.within.staying(index[mine], worth[mine], part, eligible)])
        return torch.cat(stay) if stay else index[:0]

    def _claims(self, eligible: Eligible, owner: list[int]) -> list[int]:
        if self.by == "even":
            return [1] * (max(owner) + 1)
        claims = _sizes(eligible)
        if self.by == "sides":
            claims = [len(t) + n // len(t) if t.ndim > 1 and n else 0
                      for t, n in zip(eligible.tensors, claims, strict=True)]  # fmt: skip
        return _summed(claims, owner)


@dataclass(frozen=True)
class PerLayer(PerTensor):
    """Each layer has its own part of the budget, and the best within it; as `PerTensor` otherwise.

    patterns  shell patterns on parameter names: a layer is what the first fitting one matches, and
              whatever matches none is one more
    depth     without patterns: a layer is what shares the first `depth` parts of the name; 0 means
              up to the first number in it ("encoder.layer.3"), or all but the last part if there
              is none
    """

    patterns: tuple[str, ...] = ()
    depth: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "patterns", listed(self.patterns))
        if self.depth < 0:
            raise UnmaskError(f"PerLayer was asked for depth={self.depth}; depth is 0 or more")

    def groups(self, eligible: Eligible) -> list[int]:
        names = [self._layer(name) for name in eligible.names]
        order = {layer: i for i, layer in enumerate(dict.fromkeys(names))}
        return [order[layer] for layer in names]

    def _layer(self, name: str) -> str:
        if self.patterns:
            return next((p for p in self.patterns if fnmatchcase(name, p)), "")
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
        return ".".join(parts[: self.depth or number + 1])


MEASURES = ("size", "sides", "even")


def _measure(bound: int | float, size: int) -> int:
    """A floor or a cap in scalars, for a tensor of that size."""
    if not (bound >= 0 if isinstance(bound, int) else 0 <= bound <= 1):
        raise UnmaskError(
            f"{bound!r} is no floor or cap: give an int (scalars) or a float in [0, 1] (a share "
            "of the tensor)"
        )
    return min(bound, size) if isinstance(bound, int) else up(bound * size)


def _sizes(eligible: Eligible) -> list[int]:
    return [tensor.numel() for tensor in eligible.tensors]


def _counts(index: Tensor, eligible: Eligible) -> list[int]:
    """How many of these sorted global indices each tensor has."""
    counts = [0] * len(eligible.names)
    for k, start, stop in eligible.split(index):
        counts[k] = stop - start
    return counts


def _summed(values: Sequence[int], owner: Sequence[int]) -> list[int]:
    sums = [0] * (max(owner) + 1)
    for group, value in zip(owner, values, strict=True):
        sums[group] += value
    return sums
