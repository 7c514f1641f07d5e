"""One step's choice in the making: from the model's gradients to a new table and its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from unmask.heuristics import Heuristic, Whole
from unmask.kernels import Run, gather, scatter
from unmask.methods import Method
from unmask.rows import Rows
from unmask.scopes import Selector
from unmask.select import NonFinite, Piece, TopK, others
from unmask.slots import Change, Slots
from unmask.strategies import Quota


class Draft:
    """One step's choice in the making: give it gradients with `take`, then `finish`.

    seen      what the heuristic keeps of the tensors, by position
    step      the optimiser step that this is about
    watching  whether the heuristic is to `observe` its gradients, also if nothing is chosen
    notes     what it keeps instead, once the step takes place
    """

    def __init__(
        self,
        slots: Slots,
        method: Method,
        quota: Quota,
        seen: dict[int, Tensor],
        step: int,
        watching: bool,
    ) -> None:
        self.slots, self.method, self.quota, self.seen = slots, method, quota, seen
        self.step, self.watching = step, watching
        self.notes: dict[int, Tensor | None] = {}
        self.change: Change | None = None
        self.best: Selector | None = None
        self._gathers = False  # whether the selector gathers as it goes
        self._surveys = type(method.heuristic).survey is not Heuristic.survey
        self._taken = [False] * len(slots.eligible.names)
        self._keep(_kept(slots, method, quota.drop))
        masked = slots.eligible.total - len(self.kept)
        count = min(quota.grow, masked)
        if count and count == masked:
            self._enter(others(slots.eligible.total, self.kept))
        elif count:
            self.best = method.scope.selector(count, method.heuristic, slots.eligible, self.kept)
            if not method.heuristic.uses_gradient:  # so the choice is made before any is seen
                self.best.offer(self._pieces(dict.fromkeys(range(len(self._taken)))))
                chosen, _ = self._chosen()
                self._enter(chosen)
                self.best = None
        elif quota.drop:
            self.change = slots.replace(self.kept, method.strategy.rewinds)
        if self.change is not None:
            self._keep(self.change.index)
        # To -0.0 anything adds up to itself, also -0.0, which 0.0 would turn into 0.0.
        self.gradient = slots.base.new_full((len(self.kept),), -0.0)
        self._gathers = isinstance(self.best, TopK) and slots.base.dtype == torch.float32

    def _keep(self, kept: Tensor) -> None:
        """Set the sorted global indices whose gradients are gathered, and their runs by tensor."""
        slots = self.slots
        spans = slots.spans if kept is slots.index else slots.eligible.split(kept)
        self.kept = kept
        self.runs = {k: (start, stop) for k, start, stop in spans}

    @property
    def needs_sums(self) -> bool:
        """Whether it must get each tensor's gradient at once, summed over the step's passes."""
        return self.best is not None or self.watching

    @property
    def settled(self) -> bool:
        """Whether the step leaves the choice as it is, and needs no other gradients."""
        return not self.needs_sums and self.change is None

    def take(self, gradients: Mapping[int, Tensor]) -> None:
        """Score and gather these tensors' gradients, by position; they aren't needed afterwards."""
        whole, rows = dict(gradients), {}
        for k, gradient in gradients.items():
            self._taken[k] = True
            if gradient.is_sparse and self._divides(k, gradient):
                rows[k] = Rows.of(whole.pop(k))
            elif gradient.is_sparse:
                whole[k] = gradient.to_dense()
        if not self._gathers:
            offsets, runs = self.slots.eligible.offsets, self.runs
            taken = [Run(g, offsets[k], *runs[k]) for k, g in whole.items() if k in runs]
            gather(taken, self.kept, self.gradient, add=True)
        if self.watching:
            for k, gradient in whole.items():
                self._observe(k, gradient)
        if self.best is not None:
            self.best.offer(self._pieces(whole))
        for k, few in rows.items():  # at the end, when there is a threshold that zeros don't reach
            self._take_rows(k, few)

    def _divides(self, k: int, gradient: Tensor) -> bool:
        """Whether the k-th tensor can be looked at in parts."""
        apart = self.best is None or isinstance(self.best, TopK)
        flat = self.slots.eligible.tensors[k].is_contiguous() and gradient.sparse_dim() == 1
        return apart and flat and not (self.watching or self._surveys)

    def _take_rows(self, k: int, gradient: Rows) -> None:
        """As `take`, of a gradient that has only some of the k-th tensor's rows."""
        of, (start, stop) = self.slots.eligible, self.runs.get(k, (0, 0))
        name, offset, theta = of.names[k], of.offsets[k], of.tensors[k].detach()
        flat = self.kept[start:stop].to(theta.device) - offset
        there, at = gradient.within(flat)
        found = gradient.values.new_zeros(len(flat))
        found[there] = gradient.values.flatten()[at]
        self.gradient[start:stop] += found.to(self.gradient)
        if not isinstance(self.best, TopK):
            return
        if self.best.passes_over_zeros(theta, gradient.values, offset):
            for some, taken in gradient.split(at.to(flat)):
                places = partial(some.of_tensor, offset)
                weights = theta[some.rows]
                piece = Piece(name, 0, weights, some.values, taken, 0, len(taken), places=places)
                self.best.offer([piece])
            return
        seen = self._remembered(k, None)
        for first, block in gradient.blocks():
            part = slice(first, first + block.numel())
            low, high = torch.searchsorted(flat, flat.new_tensor([part.start, part.stop])).tolist()
            weights, noted = theta.view(-1)[part], None if seen is None else seen[part]
            where = offset + first, weights.view_as(block), block
            piece = Piece(name, *where, self.kept, start + low, start + high, None, noted)
            self.best.offer([piece])

    def add(self, k: int, gradient: Tensor) -> None:
        """Add to the k-th tensor's kept scalars this part of their gradient."""
        self._taken[k] = True
        start, stop = self.runs[k]
        self.gradient[start:stop] += gradient.to(self.gradient)

    def finish(self, out: Tensor) -> Change | None:
        """The new table, if the choice changes; into `out`, the gradient of `values` under it."""
        # A finite sum tells as much in one pass and without a copy.
        if not (torch.isfinite(self.gradient.sum()) or torch.isfinite(self.gradient).all()):
            raise NonFinite("the unmasked scalars")
        out.zero_()
        missing = [k for k, taken in enumerate(self._taken) if not taken]
        unseen = [self.gradient[slice(*self.runs[k])] for k in missing if k in self.runs]
        for part in unseen:
            part.fill_(0.0)  # what optimisers leave alone
        if self.watching:
            for k in missing:
                self._observe(k, None)
        if self.best is not None:
            self.best.offer(self._pieces(dict.fromkeys(missing)))
            chosen, gradient = self._chosen()
            change = self._enter(chosen)
            out[change.at(chosen)] = gradient.to(out.dtype)
        if not self.quota.drop and self.kept is self.slots.index:
            run = Run(out, 0, 0, len(self.kept))
            scatter([run], self.slots.position, self.gradient)  # positions stay when others enter
        elif self.change is not None:
            out[self.change.at(self.kept)] = self.gradient
        for part in unseen:
            part.fill_(-0.0)  # more may come
        return self.change

    def _chosen(self) -> tuple[Tensor, Tensor]:
        """The selector's best, and their gradients; if too few have a score that is a number,
        the first of the others make up the rest."""
        assert self.best is not None
        chosen, gradient = self.best.best()
        if lacking := self.best.count - len(chosen):
            taken = torch.cat([self.kept, chosen]).sort().values
            rest = others(self.slots.eligible.total, taken)[:lacking]
            chosen, order = torch.cat([chosen, rest]).sort()
            gradient = torch.cat([gradient, gradient.new_zeros(len(rest))])[order]
        return chosen, gradient

    def _enter(self, chosen: Tensor) -> Change:
        """Let the chosen join those kept."""
        if self.quota.drop:
            index = torch.cat([self.kept, chosen]).sort().values if len(self.kept) else chosen
            self.change = self.slots.replace(index, self.method.strategy.rewinds)
        else:
            self.change = self.slots.extend(chosen)
        return self.change

    def _pieces(self, gradients: Mapping[int, Tensor | None]) -> Iterator[Piece]:
        """These tensors as a selector wants them. Written for thousands of small ones."""
        of, kept, runs = self.slots.eligible, self.kept, self.runs
        names, offsets, tensors = of.names, of.offsets, of.tensors
        into = self.gradient if self._gathers else None
        remembers = self._surveys or bool(self.notes or self.seen)
        for k, gradient in gradients.items():
            start, stop = runs.get(k, (0, 0))
            seen = self._remembered(k, gradient) if remembers else None
            yield Piece(names[k], offsets[k], tensors[k], gradient, kept, start, stop, into, seen)

    def _remembered(self, k: int, gradient: Tensor | None) -> Tensor | None:
        """What the heuristic keeps of a tensor, as a vector."""
        seen = self.notes[k] if k in self.notes else self.seen.get(k)
        if self._surveys:
            seen = self.method.heuristic.survey(seen, self._whole(k, gradient))
        return None if seen is None else seen.reshape(-1)

    def _observe(self, k: int, gradient: Tensor | None) -> None:
        """Let the heuristic note what it wants of a tensor's gradient."""
        if gradient is not None and not torch.isfinite(gradient).all():
            raise NonFinite(self.slots.eligible.names[k])
        whole = self._whole(k, gradient)
        self.notes[k] = self.method.heuristic.observe(self.seen.get(k), whole)

    def _whole(self, k: int, gradient: Tensor | None) -> Whole:
        eligible = self.slots.eligible
        theta = eligible.tensors[k].detach()
        if gradient is None:
            gradient = theta.new_zeros(()).expand(theta.shape)  # takes no memory
        share = len(self.slots.values) / eligible.total
        name, offset = eligible.names[k], eligible.offsets[k]
        return Whole(theta, gradient.detach(), name, self.step, share, offset)


def _kept(slots: Slots, method: Method, drop: int) -> Tensor:
    """The current scalars less the `drop` of least worth, as the scope understands it."""
    if not drop:
        return slots.index
    if drop >= len(slots):
        return slots.index[:0]
    worth = method.strategy.worth(slots.values.detach(), slots.base)[slots.position]
    stay = method.scope.staying(slots.index, worth, len(slots) - drop, slots.eligible)
    return slots.index[stay.sort().values]
