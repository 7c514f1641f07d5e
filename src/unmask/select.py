"""Exact global top-k over a stream of tensors, without ever holding all scores.

The best `count` so far are kept; the worst of them is a threshold that only rises, so almost every
block of a later tensor is passed over by a bound. Ties go to the smaller global index (tensor
order, then flat index), whatever order tensors come in and however many threads look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.heuristics import Heuristic, Scalars
from unmask.kernels import compiled_for

RUN = 1 << 20  # scalars scored at once in plain torch
FEW = 1 << 16  # candidates that one thread of a sweep may hold, at the least
MANY = 1 << 20  # and at the most


class NonFinite(Exception):
    """A gradient holds NaN or infinity; carries the parameter's name."""


class Piece(NamedTuple):
    """One tensor's part in a selection, all of it 1-D.

    taken  sorted global indices of its scalars that are out of the question
    seen   what the heuristic keeps of it
    into   where to add the gradients of `taken`, if the selector `gathers`: it has them in hand
    """

    name: str
    offset: int
    theta: Tensor
    grad: Tensor | None
    taken: Tensor
    seen: Tensor | None = None
    into: Tensor | None = None


class TopK:
    """The `count` highest scores of what was offered so far."""

    gathers = True  # see Piece.into

    def __init__(self, count: int, heuristic: Heuristic, home: torch.device) -> None:
        self.count = count
        self.heuristic = heuristic
        self.home = home  # where candidates are kept, whatever devices the tensors are on
        self.threshold = -math.inf  # the count-th best score so far; below it nothing matters
        self.last = -1  # the largest index among those kept that score exactly the threshold
        # Candidates as (scores, indices, gradients).
        none = torch.empty(0, device=home)
        self._found: list[tuple[Tensor, ...]] = [(none, none.long(), none)]

    def offer(self, pieces: Iterable[Piece]) -> None:
        """Look at these tensors. Raises NonFinite, after which this object is of no more use."""
        law = self.heuristic.power_law()
        by_device: dict[torch.device, list[Piece]] = {}
        for piece in pieces:
            if law and piece.grad is not None and compiled_for(piece.theta, piece.grad):
                by_device.setdefault(piece.theta.device, []).append(piece)
            elif law is None or piece.grad is not None or self._could_win(0.0, piece.offset):
                self._walk(piece)
        for swept in by_device.values():
            assert law is not None
            self._sweep(sorted(swept, key=lambda piece: piece.offset), law)

    def best(self) -> tuple[Tensor, Tensor]:
        """The chosen scalars' global indices, sorted, int64, and their gradients."""
        _, index, gradient = self.scored()
        index, order = index.sort()
        return index, gradient[order]

    def scored(self) -> tuple[Tensor, ...]:
        """Their scores, global indices and gradients, in no order."""
        self._thin(self.count)
        return tuple(torch.cat(parts) for parts in zip(*self._found, strict=True))

    def _sweep(self, pieces: list[Piece], law: tuple[float, float]) -> None:
        """Let compiled code find what could win, then score only that."""
        thetas, grads = ([getattr(p, name) for p in pieces] for name in ("theta", "grad"))
        offsets, taken, into = ([p[i] for p in pieces] for i in (1, 4, 6))
        module = compiled_for(*thetas, *grads)
        assert module is not None
        sweep = module.Sweep(thetas, grads, offsets, taken, into, law)
        capacity = max(FEW, min(2 * self.count, MANY))
        for every, but in self._rounds(sweep.total):
            ranges = [(0, sweep.total)]
            while ranges:
                first, last = ranges.pop()
                threshold = self.threshold
                if threshold == 0.0 and sweep.first(first) > self.last:
                    threshold = math.ulp(0.0)  # a later tie loses: only more than 0 will do
                found, left, bad = sweep.run(first, last, threshold, capacity, every, but)
                if bad >= 0:
                    raise NonFinite(pieces[bad].name)
                if found:
                    index, theta, grad = (torch.cat(parts) for parts in zip(*found, strict=True))
                    self._keep(Scalars(theta, grad, "", 0, index), index, grad)
                self._thin(2 * self.count)
                ranges += left

    def _rounds(self, total: int) -> Iterator[tuple[int, int]]:
        """(every, but) of each round of a sweep: blocks whose number is a multiple of `every` and
        none of `but`.

        Where there is no threshold yet, blocks from all over the model make one, so that few of the
        others' scalars reach it, whatever the tensors' order.
        """
        every = 1
        if self.threshold == -math.inf:
            growth = 64 if self.count < FEW // 64 else 8
            while total // (every * growth) >= max(FEW // 4, 4 * self.count):
                every *= growth
        but = 0
        while every > 1:
            yield every, but
            every, but = every // growth, every
        yield 1, but

    def _walk(self, piece: Piece) -> None:
        """Score a tensor whole, a run of it at a time."""
        given = self.heuristic.uses_gradient and piece.grad is not None
        if piece.into is not None and piece.grad is not None:
            more = piece.grad[piece.taken - piece.offset].to(piece.into.device)
            piece.into.copy_((piece.into + more).to(more.dtype))
        for start in range(0, len(piece.theta), RUN):
            flat = range(start, min(start + RUN, len(piece.theta)))
            run = slice(flat.start, flat.stop)
            theta = piece.theta[run].float()
            grad = piece.grad[run] if given else torch.zeros_like(theta)  # type: ignore[index]
            if given and not torch.isfinite(grad).all():
                raise NonFinite(piece.name)
            seen = None if piece.seen is None else piece.seen[run]
            scalars = Scalars(theta, grad.float(), piece.name, piece.offset, flat, seen)
            free = torch.ones(len(theta), dtype=torch.bool, device=theta.device)
            bounds = piece.taken.new_tensor([piece.offset + flat.start, piece.offset + flat.stop])
            low, high = torch.searchsorted(piece.taken, bounds).tolist()
            free[piece.taken[low:high] - (piece.offset + flat.start)] = False
            self._keep(scalars, scalars.index, grad, free)
            self._thin(2 * self.count)

    def _keep(
        self, scalars: Scalars, index: Tensor, grad: Tensor, free: Tensor | None = None
    ) -> None:
        """Score these scalars and keep those that could win."""
        score = self.heuristic.score(scalars).float()
        keep = (score > self.threshold) | ((score == self.threshold) & (index < self.last))
        if free is not None:
            keep &= free
        where = keep.nonzero().squeeze(1)
        grad = grad if grad.dtype == torch.float64 else grad.float()
        self._found.append(tuple(x[where].to(self.home) for x in (score, index, grad)))

    def _could_win(self, score: float, index: int) -> bool:
        return score > self.threshold or (score == self.threshold and index < self.last)

    def _thin(self, room: int) -> None:
        """If more than `room` candidates are held, keep the best `count`, raise the threshold."""
        if sum(len(index) for _, index, _ in self._found) <= room:
            return
        score, index, grad = (torch.cat(parts) for parts in zip(*self._found, strict=True))
        threshold = torch.topk(score, self.count, sorted=False).values.min()
        above, tied = score > threshold, score == threshold
        last = index[tied].sort().values[self.count - int(above.sum()) - 1]
        keep = above | (tied & (index <= last))
        self._found = [(score[keep], index[keep], grad[keep])]
        self.threshold, self.last = float(threshold), int(last)


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
