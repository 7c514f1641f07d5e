"""Exact global top-k over a stream of tensors, without ever holding all scores.

The best `count` so far are kept; the worst of them is a threshold that only rises, so almost every
block of a later tensor is passed over by a bound. Ties go to the smaller global index (tensor
order, then flat index), whatever order tensors come in and however many threads look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unmask.heuristics import Heuristic, Scalars
from unmask.kernels import Run, compiled_for, gather

RUN = 1 << 20  # scalars scored at once in plain torch
FEW = 1 << 16  # candidates that one thread of a sweep may hold, at the least
MANY = 1 << 18  # and at the most
CROWD = 1 << 12  # so many to choose are foretold well by how many a sample has
SAMPLE = 33  # one block of so many; odd, as rows' lengths are even


class NonFinite(Exception):
    """A gradient holds NaN or infinity; carries the parameter's name."""


class Piece(NamedTuple):
    """One tensor's part in a selection.

    theta, grad  in the tensor's own shape
    kept  sorted global indices of scalars that are out of the question, this tensor's in
          kept[start:stop]
    into  an entry for each of `kept`: where a `TopK` is to add their gradients, as it has them in
          hand
    seen  what the heuristic keeps of it, 1-D
    places  None, or of a tensor put together from parts of the model's: given flat indices, the
            global ones of those scalars, as rising as they are; `kept` then has flat ones, too
    """

    name: str
    offset: int
    theta: Tensor
    grad: Tensor | None
    kept: Tensor
    start: int
    stop: int
    into: Tensor | None = None
    seen: Tensor | None = None
    places: Callable[[Tensor], Tensor] | None = None

    @property
    def taken(self) -> Tensor:
        """The flat indices, int64, of what is out of the question, on the tensor's device."""
        return self.kept[self.start : self.stop].to(self.theta.device, torch.int64) - self.offset


class TopK:
    """The `count` highest scores of what was offered so far."""

    def __init__(self, count: int, heuristic: Heuristic, home: torch.device) -> None:
        self.count = count
        self.heuristic = heuristic
        self.home = home  # where candidates are kept, whatever devices the tensors are on
        self.threshold = -math.inf  # the count-th best score so far; below it nothing matters
        self.last = -1  # of a power law's scores, if the threshold is 0: the last of those kept
        self._clear()

    def _clear(self) -> None:
        """No candidates."""
        # As (scores, indices, gradients), and some as (weights, indices, gradients), as a sweep
        # finds few and scoring any takes its time; how many of both, and of the latter.
        none = torch.empty(0, device=self.home)
        self._found: list[tuple[Tensor, ...]] = [(none, none.long(), none)]
        self._swept: list[tuple[Tensor, ...]] = []
        self._held = self._unscored = 0

    def offer(self, pieces: Iterable[Piece]) -> None:
        """Look at these tensors. Raises NonFinite, after which this object is of no more use."""
        law = self.heuristic.power_law()
        swept: dict[torch.device, list[Piece]] = {}
        for piece in pieces:
            if piece.places is not None and law is not None:
                self._sweep([piece], law)
            elif law and piece.grad is not None and compiled_for(piece.theta, piece.grad):
                swept.setdefault(piece.theta.device, []).append(piece)
            elif law is None or piece.grad is not None or self._zero_could_win(piece.offset):
                self._walk(piece)
        for some in swept.values():
            assert law is not None
            self._sweep(sorted(some, key=lambda piece: piece.offset), law)

    def passes_over_zeros(self, theta: Tensor, grad: Tensor, index: int) -> bool:
        """Whether a tensor with this global index may be offered without the scalars whose
        gradient is 0, as `places` of the others."""
        if not (self.heuristic.power_law() and compiled_for(theta, grad)):
            return False
        if self.threshold == -math.inf:
            self._thin(self.count)
        return not self._zero_could_win(index)

    def best(self) -> tuple[Tensor, Tensor]:
        """The chosen scalars' global indices, sorted, int64, and their gradients."""
        _, index, gradient = self.scored()
        index, order = index.sort()
        return index, gradient[order]

    def scored(self) -> tuple[Tensor, ...]:
        """Their scores, global indices and gradients, in no order."""
        self._thin(self.count)
        return self._all()

    def _all(self) -> tuple[Tensor, ...]:
        """The candidates, as one."""
        self._score()
        found = [parts for parts in self._found if len(parts[0])] or self._found[:1]
        columns, joined = list(zip(*found, strict=True)), []
        self._found, found = [], []
        while columns:  # a column's parts go when they are joined: there may be millions
            parts = columns.pop(0)
            joined.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        self._found = [tuple(joined)]
        return self._found[0]

    def _sweep(self, pieces: list[Piece], law: tuple[float, float]) -> None:
        """Let compiled code find what could win, then score only that."""
        thetas, offsets = [p.theta for p in pieces], [p.offset for p in pieces]
        grads = [p.grad for p in pieces if p.grad is not None]
        kept, into, runs = pieces[0].kept, pieces[0].into, [(p.start, p.stop) for p in pieces]
        if kept.device != thetas[0].device:
            for piece in pieces:
                _gather(piece)
            kept, into = kept.to(thetas[0].device), None
        module = compiled_for(thetas[0])
        assert module is not None
        made = partial(module.Sweep, thetas, grads, offsets, kept, runs)
        sweep = made(into, law)
        if self.threshold == -math.inf and not self._held and self.count >= CROWD:
            again = made(None, law)  # what is looked at twice is added up once
            if (hope := self._foretold(again, pieces)) > 0.0:
                self.threshold = hope
                self._look(sweep, pieces)
                if int((self._all()[0] >= hope).sum()) >= self.count:
                    return
                self.threshold, sweep = -math.inf, again
                self._clear()
        for every, but in self._rounds(sweep.total, module.GROWTH):
            self._look(sweep, pieces, every, but)

    def _foretold(self, sweep: Any, pieces: list[Piece]) -> float:
        """A threshold that half as many again as are wanted should reach; -inf if there are few."""
        least = self.count / SAMPLE
        sample = TopK(math.ceil(1.5 * least + 3 * least**0.5), self.heuristic, self.home)
        sample._look(sweep, pieces, SAMPLE)
        sample._thin(sample.count)
        return sample.threshold

    def _look(self, sweep: Any, pieces: list[Piece], every: int = 1, but: int = 0) -> None:
        """Find what could win in each block whose number is a multiple of `every` and none of
        `but`."""
        places = pieces[0].places
        capacity = max(FEW, min(2 * self.count, MANY))
        ranges = [(0, sweep.total)]
        while ranges:
            first, last = ranges.pop()
            threshold = self.threshold
            if threshold == 0.0:
                could = places is None and self._zero_could_win(sweep.first(first))
                threshold = 0.0 if could else math.ulp(0.0)
            how = threshold, capacity, every, but, self.count
            found, left, bad = sweep.run(first, last, *how)
            if bad >= 0:
                raise NonFinite(pieces[bad].name)
            index, theta, grad = found
            if len(index):
                index = index if places is None else places(index)
                self._swept.append((theta, index, grad))
                self._held += len(index)
                self._unscored += len(index)
                if self._unscored > FEW:  # so that scores take no room to speak of
                    self._score()
                self._thin(2 * self.count)
            ranges += left

    def _zero_could_win(self, index: int) -> bool:
        """Whether a score of 0 may be among the best, at this global index or a later one."""
        return self.threshold < 0.0 or (self.threshold == 0.0 and index < self.last)

    def _rounds(self, total: int, growth: int) -> Iterator[tuple[int, int]]:
        """(every, but) of each round of a sweep: blocks whose number is a multiple of `every` and
        none of `but`.

        Where there is no threshold yet, blocks from all over the model make one, so that few of the
        others' scalars reach it, whatever the tensors' order: `count` times the growth a round, or
        hardly more than `count` if the threshold rises meanwhile. `growth` is the most.
        """
        left_out = total // (4 * max(FEW, self.count))
        rounds = 0
        if self.threshold == -math.inf and left_out > 1:
            most = max(8, min(growth, 16 * MANY // self.count))
            rounds = math.ceil(math.log(left_out, most))
        growth = int(left_out ** (1 / max(1, rounds))) | 1  # odd, as rows' lengths are even
        but = 0
        for power in range(rounds, -1, -1):
            yield growth**power, but
            but = growth**power

    def _walk(self, piece: Piece) -> None:
        """Score a tensor whole, a run of it at a time."""
        _gather(piece)
        taken = piece.taken
        weights = piece.theta.detach().reshape(-1)
        given = self.heuristic.uses_gradient and piece.grad is not None
        gradients = piece.grad.detach().reshape(-1) if given else None  # type: ignore[union-attr]
        for start in range(0, len(weights), RUN):
            flat = range(start, min(start + RUN, len(weights)))
            run = slice(flat.start, flat.stop)
            theta = weights[run].float()
            grad = torch.zeros_like(theta) if gradients is None else gradients[run]
            if gradients is not None and not torch.isfinite(grad).all():
                raise NonFinite(piece.name)
            seen = None if piece.seen is None else piece.seen[run]
            scalars = Scalars(theta, grad.float(), piece.name, piece.offset, flat, seen)
            free = torch.ones(len(theta), dtype=torch.bool, device=theta.device)
            low, high = torch.searchsorted(taken, taken.new_tensor([run.start, run.stop])).tolist()
            free[taken[low:high] - flat.start] = False
            self._keep(scalars, scalars.index, grad, free)
            self._thin(2 * self.count)

    def _score(self) -> None:
        """Score what sweeps found."""
        swept, self._swept = self._swept, []
        self._held, self._unscored = self._held - self._unscored, 0
        for device in {theta.device for theta, _, _ in swept}:
            some = [parts for parts in swept if parts[0].device == device]
            theta, index, grad = (torch.cat(parts) for parts in zip(*some, strict=True))
            self._keep(Scalars(theta, grad, "", 0, index), index, grad)

    def _keep(
        self, scalars: Scalars, index: Tensor, grad: Tensor, free: Tensor | None = None
    ) -> None:
        """Score these scalars and keep those that could win."""
        score = self.heuristic.score(scalars).float()
        grad = grad if grad.dtype == torch.float64 else grad.float()
        found: tuple[Tensor, ...] = score, index.long(), grad
        if free is not None or score.sum().isnan():  # a sweep's candidates reach the threshold
            keep = score >= self.threshold  # and are numbers
            where = (keep if free is None else keep & free).nonzero().squeeze(1)
            found = tuple(x.index_select(0, where) for x in found)
        self._found.append(tuple(x.to(self.home) for x in found))
        self._held += len(found[1])

    def _thin(self, room: int) -> None:
        """If more than `room` candidates are held, keep the best `count`, raise the threshold."""
        if self._held <= room:
            return
        columns = [*self._all()]
        if len(columns[0]) <= room:  # some scores were no numbers
            return
        self._found, (score, index, _) = [], columns
        self.threshold = _highest(score, self.count)
        best = (score >= self.threshold).nonzero().squeeze(1)
        if len(best) > self.count:
            equal = best[score[best] == self.threshold]
            best = best[score[best] > self.threshold]
            equal = equal[index[equal].argsort()[: self.count - len(best)]]  # of equals, the first
            if self.threshold == 0.0:
                self.last = int(index[equal].max())
            best = torch.cat([best, equal])
        del score, index
        for i, column in enumerate(columns):
            columns[i] = column.index_select(0, best)
            del column
        self._found, self._held = [tuple(columns)], self.count


def _highest(score: Tensor, count: int) -> float:
    """The `count`-th highest."""
    place = len(score) - count
    if score.is_cpu:  # in a third of the memory that torch takes
        return float(np.partition(score.numpy(), place)[place])
    return float(score.kthvalue(place + 1).values)


def _gather(piece: Piece) -> None:
    """Add the tensor's gradients of what is out of the question to where they are wanted."""
    if piece.into is not None and piece.grad is not None:
        run = Run(piece.grad, piece.offset, piece.start, piece.stop)
        gather([run], piece.kept, piece.into, add=True)


def ranked(score: Tensor, index: Tensor) -> Tensor:
    """The order from the best score down; of equals the smaller index first, and NaN last."""
    order = index.argsort()
    score = torch.where(score.isnan(), -torch.inf, score)
    return order[score[order].argsort(descending=True, stable=True)]


def others(total: int, taken: Tensor) -> Tensor:
    """All global indices that aren't in `taken`."""
    free = torch.ones(total, dtype=torch.bool, device=taken.device)
    free[taken.long()] = False
    return free.nonzero().squeeze(1)
