"""Exact global top-k over a stream of tensors, without ever holding all scores.

The best `count` so far are kept; the worst of them is a threshold that only rises, so almost every
block of a later tensor is passed over by a bound. Ties go to the smaller global index (tensor
order, then flat index), whatever order tensors come in and however many threads look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.heuristics import Heuristic, Scalars
from unmask.kernels import scan_for

SEGMENT = 1 << 19  # scalars looked at in one go by one thread
BATCH = 64  # most segments looked at before the threshold is raised again
ROOM = 1 << 14  # candidates gathered before they are thinned out, at the least


class NonFinite(Exception):
    """A gradient holds NaN or infinity; carries the parameter's name."""


class Piece(NamedTuple):
    """One tensor's part in a selection; theta and grad 1-D, `taken` sorted global indices of its
    scalars that are out of the question."""

    name: str
    offset: int
    theta: Tensor
    grad: Tensor | None
    taken: Tensor
    seen: Tensor | None = None


class TopK:
    """The `count` highest scores of what was offered so far."""

    def __init__(self, count: int, heuristic: Heuristic, home: torch.device) -> None:
        self.count = count
        self.heuristic = heuristic
        self.home = home  # where candidates are kept, whatever devices the tensors are on
        self.threshold = -math.inf  # the count-th best score so far; below it nothing matters
        self.last = -1  # the largest index among those kept that score exactly the threshold
        # Candidates as (scores, indices, gradients); threads append to it.
        none = torch.empty(0, device=home)
        self._found: list[tuple[Tensor, Tensor, Tensor]] = [(none, none.long(), none)]

    def offer(self, pieces: Iterable[Piece]) -> None:
        """Look at these tensors. Raises NonFinite, after which this object is of no more use."""
        segments = _segments(pieces)
        size = 1  # the first segments raise the threshold for all others, so begin with few
        while batch := list(islice(segments, size)):
            while batch:
                batch = [rest for rest in _map(self._look, batch) if rest is not None]
                self._thin(max(2 * self.count, ROOM))
            size = min(2 * size, BATCH)

    def best(self) -> tuple[Tensor, Tensor]:
        """The chosen scalars' global indices, sorted, int64, and their gradients."""
        self._thin(self.count)
        _, index, gradient = (torch.cat(parts) for parts in zip(*self._found, strict=True))
        index, order = index.sort()
        return index, gradient[order]

    def _look(self, segment: tuple[Piece, int, int]) -> tuple[Piece, int, int] | None:
        """Add one segment's candidates; what is left of it if there were too many at once."""
        piece, start, stop = segment
        law = self.heuristic.power_law()
        if law is None:
            self._add(piece, range(start, stop))
            return None
        if piece.grad is None:
            if self._could_win(0.0, piece.offset + start):
                self._add(piece, range(start, stop))
            return None
        threshold = self.threshold
        if threshold == 0.0 and piece.offset + start > self.last:
            threshold = math.ulp(0.0)  # a tie with a larger index loses: only more than 0 will do
        theta, grad, taken, offset = piece.theta, piece.grad, piece.taken, piece.offset
        scan = scan_for(theta, grad)
        flat, end, finite = scan(theta, grad, start, stop, law, threshold, taken, offset, 4 * ROOM)
        if not finite:
            raise NonFinite(piece.name)
        if len(flat):
            self._add(piece, flat)
        return (piece, end, stop) if end < stop else None

    def _add(self, piece: Piece, flat: range | Tensor) -> None:
        """Score these scalars exactly and keep those that could win."""
        where = slice(flat.start, flat.stop) if isinstance(flat, range) else flat
        theta = piece.theta[where].float()
        given = self.heuristic.uses_gradient and piece.grad is not None
        grad = piece.grad[where] if given else torch.zeros_like(theta)  # type: ignore[index]
        if given and isinstance(flat, range) and not torch.isfinite(grad).all():
            raise NonFinite(piece.name)
        seen = None if piece.seen is None else piece.seen[where]
        scalars = Scalars(theta, grad.float(), piece.name, piece.offset, flat, seen)
        score, index = self.heuristic.score(scalars).float(), scalars.index
        keep = (score > self.threshold) | ((score == self.threshold) & (index < self.last))
        if isinstance(flat, range):  # the kernels leave out what is taken; a whole run has it still
            bounds = piece.taken.new_tensor([piece.offset + flat.start, piece.offset + flat.stop])
            low, high = torch.searchsorted(piece.taken, bounds).tolist()
            keep[piece.taken[low:high].long() - (piece.offset + flat.start)] = False
        grad = grad if grad.dtype == torch.float64 else grad.float()
        score, index, grad = (x[keep].to(self.home) for x in (score, index, grad))
        self._found.append((score, index, grad))

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


def others(total: int, taken: Tensor) -> Tensor:
    """All global indices that aren't in `taken`."""
    free = torch.ones(total, dtype=torch.bool, device=taken.device)
    free[taken.long()] = False
    return free.nonzero().squeeze(1)


def _segments(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, int, int]]:
    for piece in pieces:
        for start in range(0, len(piece.theta), SEGMENT):
            yield piece, start, min(start + SEGMENT, len(piece.theta))


Segment = tuple[Piece, int, int]


def _map(look: Callable[[Segment], Segment | None], batch: list[Segment]) -> list[Segment | None]:
    """`look` at each of a batch, shared out among as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(batch))
    if threads == 1:
        return [look(segment) for segment in batch]
    shares = [batch[i::threads] for i in range(threads)]
    results = _pool(torch.get_num_threads()).map(lambda share: [look(s) for s in share], shares)
    return [result for share in results for result in share]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="unmask")
