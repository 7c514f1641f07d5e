"""The kernels for tensors in CPU memory, each over many tensors at once and on several threads."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.kernels.cpu_base import HALF
from unmask.kernels.cpu_moves import gather, insert, scatter, search
from unmask.kernels.cpu_sweep import LAST, PACKED, SIZE, looker
from unmask.kernels.laws import STEEP, bounds, raising
from unmask.kernels.threads import SHARE, at_once, shares

__all__ = ["Sweep", "gather", "handles", "insert", "scatter", "search"]

GLANCE = 1 << 19  # least scalars of a thread's share where almost all are passed over
GROWTH = 4096  # of what is looked at, from round to round at the most
HANDLED = frozenset([*HALF, torch.int32, torch.int64])
NONE = torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0)
_own = threading.local()


def handles(tensor: Tensor, home: torch.device) -> bool:
    """Whether these kernels can work on the tensor where it lies, with others on that device."""
    return tensor.is_cpu and tensor.dtype in HANDLED and tensor.is_contiguous()


class Sweep:
    """A pass over many tensors for scalars that could reach a threshold, in pieces of any size.

    offsets  global index of each tensor's first scalar, ascending
    kept     sorted global indices that are out of the question
    runs     (start, stop) of each tensor's among them
    into     None or float32, an entry for each of `kept`: where to add their gradients on the way,
             done for a range once it was run
    law      (exp, eps) of the score |g| / (|θ| + eps)^exp
    """

    def __init__(
        self,
        thetas: Sequence[Tensor],
        grads: Sequence[Tensor],
        offsets: Sequence[int],
        kept: Tensor,
        runs: Sequence[tuple[int, int]],
        into: Tensor | None,
        law: tuple[float, float],
    ) -> None:
        self._keep = thetas, grads, kept, into  # alive as long as their addresses are used
        self._law, self._offsets = law, offsets
        self._starts = [0, *accumulate(map(Tensor.numel, thetas))]
        self.total = self._starts[-1]
        each = zip(self._starts[:-1], offsets, grads, thetas, runs, strict=True)
        rows = [
            (start, offset, g.data_ptr(), HALF[g.dtype], t.data_ptr(), HALF[t.dtype], *run)
            for start, offset, g, t, run in each
        ]
        self._table = np.array([*rows, (self.total, *[0] * LAST)], dtype=np.int64)
        at = 0 if into is None else into.data_ptr()
        held = kept.data_ptr(), kept.dtype == torch.int64, len(kept)
        self._where = _address(self._table), len(thetas), *held, at

    def first(self, place: int) -> int:
        """The least global index from this place of the sweep on."""
        k = bisect_right(self._starts, place) - 1
        return place - self._starts[k] + self._offsets[k]

    def run(
        self,
        start: int,
        stop: int,
        threshold: float,
        capacity: int,
        every: int = 1,
        but: int = 0,
        wanted: int = 0,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], list[tuple[int, int]], int]:
        """Look at scalars [start, stop) of the tensors laid end to end, or rather at each block of
        them whose number is a multiple of `every` and none of `but`. Of candidates that `wanted`
        others outdo, if that isn't 0, some are left out.

        Returns candidates as (indices (int64), weights, gradients (float32)), the ranges left
        unseen because more than `capacity` turned up on a thread, and the position of a tensor with
        a gradient that isn't finite, or -1.
        """
        parts = len(shares(start, stop, (SHARE if threshold <= 0 else GLANCE) * every))
        threads = min(torch.get_num_threads(), parts)
        words = SIZE + threads + 3 * parts
        room, notes, rooms, at = _room(threads * capacity, words)
        found = at + 8 * SIZE
        what = *self._where, *rooms, capacity, start, stop, every, but, wanted
        how = _constants(*self._law, threshold)
        taken = 0, 0, parts, threads, found, found + 8 * threads
        PACKED.pack_into(notes, 0, *taken, *what, *how)
        notes[SIZE : SIZE + threads] = 0
        at_once(looker()[0], at, threads)
        said = notes[SIZE:words].tolist()
        counts, bad = said[:threads], max(said[threads + 2 :: 3])
        left: list[tuple[int, int]] = []
        for end, b in zip(said[threads::3], said[threads + 1 :: 3], strict=True):
            if end < b:  # right after another, they are one
                first = left.pop()[0] if left and left[-1][1] == end else end
                left.append((first, b))
        seats = [slice(i * capacity, i * capacity + n) for i, n in enumerate(counts) if n]
        if not seats:
            return NONE, left, bad
        index, theta, grad = (np.concatenate([x[seat] for seat in seats]) for x in room)
        return (torch.from_numpy(index), torch.from_numpy(theta), torch.from_numpy(grad)), left, bad


def _address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


@lru_cache  # a threshold soon stands, and then this would be a tenth of a short look
def _constants(exp: float, eps: float, threshold: float) -> tuple[float, ...]:
    """(law, low, exp, eps, cut, scale, less, above, below), as `laws` has them."""
    law, low, cut = bounds(exp, eps, threshold)
    how = raising(law, exp, eps)
    if abs(exp) > STEEP:
        exp = 0.0  # the weight has no say, nor may it overflow
    eps = float(torch.tensor(eps, dtype=torch.float32))  # numpy would warn that it is infinite
    return law, low, exp, eps, cut, *how


def _room(capacity: int, words: int) -> tuple[Any, ...]:
    """This thread's room for so many candidates and a task of so many words, and where it lies.

    It is kept: to ask for it anew takes as long as a look at a million scalars.
    """
    found: tuple[Any, ...] | None = getattr(_own, "room", None)
    if found is None or len(found[0][0]) < capacity or len(found[1]) < words:
        room = np.empty(capacity, np.int64), *np.empty((2, capacity), np.float32)
        notes = np.zeros(words, np.int64)
        found = _own.room = room, notes, tuple(map(_address, room)), _address(notes)
    return found
