"""Which sparse adapters are in force in a model's own weights: their values written in, or out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unmask.integrations.peft_storage import Storage, write


class Hidden(NamedTuple):
    """An adapter just taken out of force: version counters of the weights and of its vector."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    vector: int


class Weights:
    """The weights that the adapters of `storage` are about.

    shown  whose values are in them
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.shown: tuple[str, ...] = ()
        self._hidden: Hidden | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """All weights that some adapter may choose from."""
        every = {id(t): t for each in self._storage.eligible.values() for t in each.tensors}
        return tuple(every.values())

    def forget(self, name: str) -> None:
        """An adapter isn't shown after all: it had no scalar."""
        self.shown = tuple(shown for shown in self.shown if shown != name)

    def show(self, names: tuple[str, ...]) -> None:
        """Have exactly these adapters in the weights: their values, or the sum of their changes."""
        if names == self.shown:
            return
        held, vectors = self._storage, self._storage.unmask_values
        before, hidden, was = self._versions(), self._hidden, self.shown
        for name in was:
            content = held.content(name)
            write(held.eligible[name], content.index, content.base)
        self.shown, self._hidden = names, None
        if len(names) == 1:
            content = held.content(names[0])
            write(held.eligible[names[0]], content.index, content.values)
        elif names:
            index, changes, base = held.changes(names)
            write(held.eligible[names[0]], index, base + torch.stack(changes).sum(0))
        if len(was) == 1 and not names:
            self._hidden = Hidden(was[0], before, self._versions(), vectors[was[0]]._version)
        elif len(names) == 1 and hidden is not None:
            now = names[0], before, vectors[names[0]]._version
            if now == (hidden.name, hidden.after, hidden.vector):
                # The bits of before it was disabled: what was computed then can be differentiated.
                torch._C._autograd._unsafe_set_version_counter(self.tensors(), hidden.before)

    def _versions(self) -> tuple[int, ...]:
        return tuple(tensor._version for tensor in self.tensors())

    def __getstate__(self) -> dict[str, Any]:
        """A copy's weights have version counters of their own."""
        return {**self.__dict__, "_hidden": None}
