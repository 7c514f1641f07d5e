"""Where a delta's scalars stand, apart from their values: what it shares with its undo.

A model has hundreds of tensors, and putting a delta on takes a few milliseconds: so what can be
told once isn't asked of each tensor again, and all indices are one vector, and so are all values.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unmask.kernels.swap import Moves
from unmask.sparse import Sparse, bits

__all__ = ["Group", "Places", "Values", "fingerprint"]

Values = tuple[Tensor, ...]  # a vector for each group


class Group(NamedTuple):
    """The tensors of one dtype: of names[k], entries starts[k]:starts[k + 1] of `indices`."""

    dtype: torch.dtype
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    starts: np.ndarray[Any, Any]
    indices: Tensor


class Places:
    """The positions of a delta, by name, in groups of one dtype each."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        # What a fingerprint is of: a header, then bytes start:stop of a group's values.
        self._stream: list[tuple[bytes, int, int, int]] = []
        named = ((name, g, k) for g, x in enumerate(groups) for k, name in enumerate(x.names))
        for name, g, k in sorted(named):
            dtype, starts = groups[g].dtype, groups[g].starts
            start, stop = int(starts[k]), int(starts[k + 1])
            # JSON delimits itself and the count delimits the bytes: no two contents share a stream.
            head = json.dumps([name, groups[g].shapes[k], str(dtype), stop - start]).encode()
            self._stream.append((head, g, start * dtype.itemsize, stop * dtype.itemsize))

    @classmethod
    def of(cls, sparse: Mapping[str, Sparse]) -> tuple[Places, Values]:
        """The places of these, and their values."""
        named: defaultdict[torch.dtype, dict[str, Sparse]] = defaultdict(dict)
        for name, part in sparse.items():
            named[part.values.dtype][name] = part
        groups, values = [], []
        for dtype, parts in named.items():
            shapes = tuple(part.shape for part in parts.values())
            starts = np.cumsum([0, *(part.indices.numel() for part in parts.values())])
            indices = _joined([part.indices for part in parts.values()])
            groups.append(Group(dtype, tuple(parts), shapes, starts, indices))
            values.append(_joined([part.values for part in parts.values()]))
        return cls(groups), tuple(values)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return [name for group in self.groups for name in group.names]

    def room(self) -> Values:
        """Vectors for as many values."""
        return tuple(torch.empty(len(g.indices), dtype=g.dtype) for g in self.groups)

    def moves(self, tensors: Mapping[str, Tensor], new: Values, old: Values) -> list[Moves]:
        """What is to be moved to and from `tensors`, which have these shapes and dtypes."""
        return [
            Moves([tensors[name] for name in g.names], g.starts, g.indices, ours, theirs)
            for g, ours, theirs in zip(self.groups, new, old, strict=True)
        ]

    def sparse(self, values: Values) -> dict[str, Sparse]:
        """These values by name."""
        found = {}
        for (_, names, shapes, starts, indices), vector in zip(self.groups, values, strict=True):
            counts = np.diff(starts).tolist()
            split = zip(names, shapes, indices.split(counts), vector.split(counts), strict=True)
            found.update({name: Sparse.valid(*part) for name, *part in split})
        return dict(sorted(found.items()))

    def fingerprint(self, values: Values) -> str:
        """That of these values by name; see below."""
        raw = [bits(vector).numpy().view(np.uint8).data for vector in values]
        digest = hashlib.sha256()
        for head, group, start, stop in self._stream:
            digest.update(head)
            digest.update(raw[group][start:stop])
        return digest.hexdigest()


def fingerprint(sparse: Mapping[str, Sparse]) -> str:
    """SHA-256 over names, shapes, dtypes and the raw bytes of the values, by sorted name.

    Handed a base's values at the changed positions, it identifies that base in O(B).
    """
    places, values = Places.of(sparse)
    return places.fingerprint(values)


def _joined(parts: list[Tensor]) -> Tensor:
    """The vectors as one; without a copy if they lie one after another in one storage, as those of
    a file do."""
    total, end = sum(map(torch.numel, parts)), parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end:
            return torch.cat(parts)
        end += part.nbytes
    first, storage = parts[0], parts[0].untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():
        return torch.cat(parts)
    return first.as_strided((total,), (1,))
