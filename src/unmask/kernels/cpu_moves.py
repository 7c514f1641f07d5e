"""Single scalars between many tensors and a vector, and the merge of sorted runs, compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from unmask.kernels.cpu_base import (
    add,
    addresses,
    as_bits,
    as_float,
    entry,
    halves,
    pointer,
    read,
    rounded,
    shift,
)
from unmask.kernels.reference import written
from unmask.kernels.threads import in_threads, shares

if TYPE_CHECKING:
    from unmask.kernels import Run


def gather(runs: list[Run], index: Tensor, out: Tensor, more: bool) -> None:
    """As `reference.gather`."""
    table = _table(runs)

    def work(a: int, b: int) -> None:
        _gather(*table, index.numpy(), a, b, out.numpy(), more)

    in_threads(work, shares(0, len(index)))


def scatter(runs: list[Run], index: Tensor, values: Tensor, where: Tensor | None) -> None:
    """As `reference.scatter`."""
    table = _table(runs)
    places = index.numpy() if where is None else where.numpy()

    def work(a: int, b: int) -> None:
        _scatter(*table, index.numpy(), a, b, values.numpy(), places, where is not None)

    in_threads(work, shares(0, len(index)))
    written(run.tensor for run in runs)


def insert(index: Tensor, more: Tensor, belongs: Tensor, more_belongs: Tensor) -> None:
    """As `reference.insert`."""
    _insert(*(part.numpy() for part in (index, more, belongs, more_belongs)))


def search(index: Tensor, wanted: Tensor) -> Tensor:
    """As `reference.search`."""
    out = torch.empty(len(wanted), dtype=torch.int64)

    def work(a: int, b: int) -> None:
        _search(index.numpy(), wanted.numpy(), a, b, out.numpy())

    in_threads(work, shares(0, len(wanted)))
    return out


def _table(runs: list[Run]) -> tuple[np.ndarray[Any, Any], ...]:
    numbers = np.array([run[1:] for run in runs], dtype=np.int64).reshape(-1, 3)
    tensors = [run.tensor for run in runs]
    return numbers, addresses(tensors), halves(tensors)


@entry
def _gather(runs, address, half, index, first, last, out, more):  # type: ignore[no-untyped-def]
    for k in range(len(runs)):
        offset, start, stop = runs[k]
        for i in range(max(start, first), min(stop, last)):
            bits = read(address[k], half[k], index[i] - offset)
            out[i] = add(out[i], bits, half[k]) if more else as_float(bits)


@entry
def _scatter(runs, address, half, index, first, last, values, where, jump):  # type: ignore[no-untyped-def]
    for k in range(len(runs)):
        offset, start, stop = runs[k]
        for i in range(max(start, first), min(stop, last)):
            flat = index[i] - offset
            bits = np.uint32(as_bits(values[where[i] if jump else i]))
            if not half[k]:
                carray(pointer(address[k]), (flat + 1,), dtype=np.uint32)[flat] = bits
                continue
            carray(pointer(address[k]), (flat + 1,), dtype=np.uint16)[flat] = rounded(bits)


@entry
def _search(index, wanted, first, last, out):  # type: ignore[no-untyped-def]
    place = 0
    for i in range(first, last):
        far = 1  # in ever longer steps, since the next is near where the two are as dense
        while place + far <= len(index) and index[place + far - 1] < wanted[i]:
            place, far = place + far, 2 * far
        stop = min(place + far - 1, len(index))
        place += np.searchsorted(index[place:stop], wanted[i])
        out[i] = place


@entry
def _insert(index, more, belongs, more_belongs):  # type: ignore[no-untyped-def]
    stop = len(index) - len(more)
    for j in range(len(more) - 1, -1, -1):  # from the end, as that is where there is room
        start, far = stop, 1
        while start >= far and index[start - far] > more[j]:
            start, far = start - far, 2 * far
        low = max(start - far + 1, 0)
        start = low + np.searchsorted(index[low:start], more[j])
        shift(index, start, stop - start, j + 1)
        shift(belongs, start, stop - start, j + 1)
        index[start + j], belongs[start + j] = more[j], more_belongs[j]
        stop = start
