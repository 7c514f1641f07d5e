"""Several deltas of one base: as one delta, one less another, what they share, how far apart.

A delta holds what the weights became, not by how much they moved. So whatever adds needs the base:
the model itself, which every delta is verified against.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from unmask.allot import down
from unmask.delta import Delta
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.places import fingerprint
from unmask.sparse import Sparse

__all__ = ["Overlap", "compose", "distance", "intersect", "overlap", "subtract"]


def compose(
    deltas: Iterable[Delta],
    model: nn.Module,
    *,
    weights: Sequence[float] | None = None,
    conflicts: str = "sum",
    keep: float = 1.0,
) -> Delta:
    """One delta that does what several do: base + Σ weight · (fine-tuned - base), in O(B).

    `model` is their base, unchanged here. Where several change one scalar, `sum` adds the changes,
    `last` takes the last delta's, and `ties` (TIES-Merging, Yadav et al. 2023) keeps the `keep`
    largest changes of each delta, elects the sign with the larger total, and takes the mean of the
    changes that have it. What only one delta changes, at weight 1, keeps its very bits. Tensors
    stored whole have no base to add to: the last delta's stays.
    """
    deltas = _checked(deltas)
    if not deltas:
        raise UnmaskError("compose() was given no delta; give it one or more")
    try:
        factors = [1.0] * len(deltas) if weights is None else [float(w) for w in weights]
    except (TypeError, ValueError):
        factors = []
    if len(factors) != len(deltas) or not all(map(math.isfinite, factors)):
        raise UnmaskError(f"{len(deltas)} deltas need as many finite weights, not {weights!r}")
    if conflicts not in _MERGES:
        raise UnmaskError(f"conflicts={conflicts!r} doesn't exist; there are {', '.join(_MERGES)}")
    if not 0 < keep <= 1 or (keep < 1 and conflicts != "ties"):
        raise UnmaskError(f"keep={keep} is a share in (0, 1], for conflicts='ties' alone")
    bases = [delta.verify(model) for delta in deltas]
    cuts = [_cut(delta, base, keep) for delta, base in zip(deltas, bases, strict=True)]
    sparse, before = {}, {}
    for name in dict.fromkeys(name for delta in deltas for name in delta.sparse):
        pile = _Pile.of(name, deltas, bases, cuts)
        if not len(pile.at):
            continue  # nothing of it was kept
        changed, alone = _MERGES[conflicts](pile, torch.tensor(factors, dtype=torch.float64))
        values = (pile.base.double() + changed).to(pile.base.dtype)
        own = pile.values.gather(0, alone.clamp(min=0)[None])[0]
        bits = torch.where(alone >= 0, _bits(own), _bits(values))
        before[name] = Sparse(pile.shape, pile.at, pile.base)
        sparse[name] = Sparse(pile.shape, pile.at, bits.view(pile.base.dtype))
    settings = {"weights": factors, "conflicts": conflicts, "keep": keep}
    return Delta(
        sparse,
        _last("full", deltas, sparse),
        _last("buffers", deltas, sparse),
        base=fingerprint(before),
        info=_shared(deltas) | {"composed": [dict(d.info) for d in deltas], **settings},
    )


def subtract(delta: Delta, other: Delta, model: nn.Module) -> Delta:
    """The delta without what the other learned: base + (delta - base) - (other - base)."""
    _checked([delta, other])
    whole = Delta(other.sparse, base=other.base, info=other.info)
    return compose([delta, whole], model, weights=(1, -1))


def intersect(delta: Delta, *others: Delta, model: nn.Module) -> Delta:
    """The delta at those positions alone that all the others change as well."""
    _checked([delta, *others])
    before, sparse = {}, {}
    for other in others:
        other.verify(model)
    for name, base in delta.verify(model).items():
        keep = torch.ones(len(base.indices), dtype=torch.bool)
        for other in others:
            there = other.sparse.get(name)
            keep &= torch.isin(base.indices, base.indices[:0] if there is None else there.indices)
        if keep.any():
            at, part = base.indices[keep], delta.sparse[name]
            before[name] = Sparse(base.shape, at, base.values[keep])
            sparse[name] = Sparse(base.shape, at, part.values[keep])
    return Delta(sparse, delta.full, delta.buffers, base=fingerprint(before), info=delta.info)


class Overlap(NamedTuple):
    """How many scalars both deltas change, and either alone; `jaccard` is shared / all of them."""

    shared: int
    first: int
    second: int
    jaccard: float


def overlap(first: Delta, second: Delta) -> Overlap:
    """How far two deltas change the same scalars, whatever they change them to."""
    _checked([first, second])
    shared = 0
    for name in first.sparse.keys() & second.sparse.keys():
        a, b = first.sparse[name], second.sparse[name]
        if a.shape != b.shape:
            raise UnmaskError(f"{name!r} has different shapes: the deltas are of different bases")
        shared += int(torch.isin(a.indices, b.indices, assume_unique=True).sum())
    alone = first.active - shared, second.active - shared
    union = shared + sum(alone)
    return Overlap(shared, *alone, shared / union if union else 1.0)


def distance(first: Delta, second: Delta, model: nn.Module) -> float:
    """The Euclidean distance between the two fine-tuned models, over what is stored sparsely."""
    deltas = _checked([first, second])
    bases = [delta.verify(model) for delta in deltas]
    total = 0.0
    for name in dict.fromkeys((*first.sparse, *second.sparse)):
        one, other = _Pile.of(name, deltas, bases, cuts=(0.0, 0.0)).change
        total += float((one - other).square().sum())
    return math.sqrt(total)


def _checked(deltas: Iterable[Delta]) -> list[Delta]:
    """The deltas, or an UnmaskError that says what isn't one."""
    if not isinstance(deltas, Iterable):
        raise UnmaskError(f"compose() was given {deltas!r}; give it a list of deltas")
    found = list(deltas)
    for one in found:
        if not isinstance(one, Delta):
            raise UnmaskError(f"{one!r} is no delta; give unmask.Delta.load(path), say")
    return found


class _Pile(NamedTuple):
    """One tensor's part of all deltas: a row a delta, a column a scalar that some delta changes."""

    shape: tuple[int, ...]
    at: Tensor
    base: Tensor
    values: Tensor
    change: Tensor  # float64, 0 where a delta leaves the scalar alone
    there: Tensor  # bool

    @classmethod
    def of(
        cls,
        name: str,
        deltas: Sequence[Delta],
        bases: Sequence[Mapping[str, Sparse]],
        cuts: Sequence[float],
    ) -> _Pile:
        parts = {i: d.sparse[name] for i, d in enumerate(deltas) if name in d.sparse}
        union = torch.cat([part.indices for part in parts.values()]).unique()
        some = next(iter(parts.values()))
        base = torch.empty(len(union), dtype=some.values.dtype)
        values = base.new_zeros(len(deltas), len(union))
        change = values.double()
        there = values.bool()
        for i, part in parts.items():
            place, before = torch.searchsorted(union, part.indices), bases[i][name].values
            base[place], values[i, place] = before, part.values
            moved = part.values.double() - before.double()
            there[i, place] = kept = ~(moved.abs() < cuts[i])
            change[i, place] = moved * kept
        kept = there.any(0)
        columns = (values[:, kept], change[:, kept], there[:, kept])
        return cls(some.shape, union[kept], base[kept], *columns)


# Each gives the change of every scalar and, where that is one delta's own, which one's (or -1).
_Merge = Callable[[_Pile, Tensor], tuple[Tensor, Tensor]]


def _sum(pile: _Pile, weights: Tensor) -> tuple[Tensor, Tensor]:
    changed = (pile.change * weights[:, None]).sum(0)
    return changed, _only(pile.there, weights)


def _lasting(pile: _Pile, weights: Tensor) -> tuple[Tensor, Tensor]:
    count = len(weights)
    last = count - 1 - pile.there.flip(0).int().argmax(0)
    changed = pile.change.gather(0, last[None])[0] * weights[last]
    return changed, torch.where(weights[last] == 1, last, -1)


def _ties(pile: _Pile, weights: Tensor) -> tuple[Tensor, Tensor]:
    elected = torch.where(pile.change.sum(0) >= 0, 1.0, -1.0)
    agree = pile.there & (pile.change.sign() == elected)
    total = (pile.change * weights[:, None] * agree).sum(0)
    return total / agree.sum(0).clamp(min=1), _only(agree, weights)


_MERGES: dict[str, _Merge] = {"sum": _sum, "last": _lasting, "ties": _ties}


def _only(there: Tensor, weights: Tensor) -> Tensor:
    """The only delta that has a say in a scalar, if its weight is 1."""
    first = there.int().argmax(0)
    return torch.where((there.sum(0) == 1) & (weights[first] == 1), first, -1)


def _cut(delta: Delta, base: Mapping[str, Sparse], keep: float) -> float:
    """The least change among the `keep` largest; ties with it are kept too."""
    if keep == 1 or not delta.active:
        return 0.0
    moved = [
        (part.values.double() - base[name].values.double()).abs()
        for name, part in delta.sparse.items()
    ]
    count = max(1, down(keep * delta.active))
    return float(torch.cat(moved).topk(count, sorted=False).values.min())


def _last(
    group: Literal["full", "buffers"], deltas: Sequence[Delta], sparse: Mapping[str, Sparse]
) -> dict[str, Tensor]:
    """The tensors stored whole, the last delta's each, and a word on it where that is a choice."""
    held: dict[str, Tensor] = {}
    for delta in deltas:
        for name, tensor in getattr(delta, group).items():
            if name in sparse:
                raise UnmaskError(
                    f"{name!r} is stored whole in one delta, by its changes in another; "
                    "compose only deltas that train it in the same way"
                )
            if name in held and not torch.equal(held[name], tensor):
                warnings.warn(
                    f"{name!r} is stored whole in several deltas and can't be composed: "
                    "the last one's is kept",
                    UnmaskWarning,
                    stacklevel=3,
                )
            held[name] = tensor
    return held


def _shared(deltas: Sequence[Delta]) -> dict[str, object]:
    """What all deltas' infos say alike: the base's name, for one; of the head, what is kept."""
    first, last = deltas[0].info, deltas[-1].info
    alike = {k: v for k, v in first.items() if all(d.info.get(k) == v for d in deltas)}
    return alike | ({"head": last["head"]} if "head" in last else {})


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
