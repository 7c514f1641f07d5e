"""The one trainable vector and its slots: which entry of `values` stands for which scalar.

A scalar is named by its global index (see `eligible`). The table is sorted by scalar, so that
gathering and writing back walk the model's memory once, in order; an entry's position in `values`
is handed out when its scalar is unmasked and stays, so that optimiser state never moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmask.eligible import Eligible
from unmask.errors import UnmaskError
from unmask.kernels import Run, gather, insert, merge, scatter, search
from unmask.states import check_table

TABLE = ("index", "position", "base", "retired", "retired_base")


class Values(nn.Parameter):
    """The master copies of the unmasked scalars: all that an optimiser ever sees of them.

    Reading `.grad` brings the gradient in from the model, at the latest moment that still serves
    whoever asks: clipping, a gradient scaler, or the optimiser's step.
    """

    collect: Callable[[], Tensor | None] | None = None
    assign: Callable[[Tensor | None], None] | None = None

    @property
    def grad(self) -> Tensor | None:
        return None if self.collect is None else self.collect()

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if self.assign is not None:
            self.assign(value)


@dataclass(frozen=True, eq=False)
class Change:
    """What enters the table and what leaves it, not yet in force."""

    slots: Slots
    fresh: Tensor  # scalars that enter, sorted
    entered: Tensor  # their positions
    stays: Tensor | None = None  # which of the current scalars stay, if not all
    rewind: bool = False  # whether those that leave get their base values back

    @property
    def index(self) -> Tensor:
        """The sorted scalars of the table to come."""
        index, position = self.slots.where(self.stays)
        return merge(index, self.fresh, position, self.entered)[0]

    def at(self, index: Tensor) -> Tensor:
        """The positions of these scalars, all in the table to come."""
        place, enters = search(self.fresh, index.to(self.fresh))
        if not enters.any():
            return self.slots.at(index)
        entered = self.entered[place]
        return entered if enters.all() else torch.where(enters, entered, self.slots.at(index))


class Slots:
    """`values` of fixed length `budget`; its filled slots, their base values, and the retired.

    index     sorted global indices of the current scalars, int32 if the model has no more than
              that can count, or int64
    position  their places in `values` and `base`, int32
    base      what the weights were before training, for every filled slot
    retired   sorted global indices of scalars that were trained once and aren't now, with
    retired_base  their base values, so that undoing everything stays exact
    """

    def __init__(self, eligible: Eligible, budget: int, values: Values | None = None) -> None:
        self.eligible = eligible
        wide = any(t.dtype == torch.float64 for t in eligible.tensors)
        device = eligible.tensors[0].device
        if values is None:
            dtype = torch.float64 if wide else torch.float32
            values = Values(torch.zeros(budget, dtype=dtype, device=device))
        self.values = values
        self._split: Tensor | None = None  # the index that `_spans` are of
        self._spans: list[tuple[int, int, int]] = []
        self.clear()

    def __len__(self) -> int:
        return len(self.index)

    def clear(self) -> None:
        """No slot is filled, nothing was ever trained."""
        with torch.no_grad():
            self.values.zero_()
        self.base = torch.zeros_like(self.values.data)
        small = self.eligible.total <= torch.iinfo(torch.int32).max
        dtype = torch.int32 if small else torch.int64
        # Room for all there will ever be, so that a table grows where it is.
        self._room = tuple(torch.empty_like(self.base, dtype=d) for d in (dtype, torch.int32))
        self._hold(0)
        self.retired = self.index.clone()
        self.retired_base = self.base[:0].clone()
        self.handed_out = 0  # positions below it have held a scalar at some time

    def at(self, index: Tensor) -> Tensor:
        """The positions of these scalars; any, of one that isn't current."""
        return self.position[search(self.index, index.to(self.index))[0]]

    def where(self, which: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scalars that a mask says, and their positions; all without one."""
        if which is None:
            return self.index, self.position
        return self.index[which], self.position[which]

    def extend(self, fresh: Tensor) -> Change:
        """Let these scalars (sorted, none of them current) enter, in the next free slots."""
        fresh = fresh.to(self.index)
        return Change(self, fresh, self._places(len(fresh), self.position))

    def replace(self, chosen: Tensor, rewind: bool = False) -> Change:
        """Let exactly these scalars (sorted) be current; those that stay keep their positions."""
        chosen = chosen.to(self.index)
        place, there = search(self.index, chosen)
        stays = torch.zeros_like(self.index, dtype=torch.bool)
        stays[place[there]] = True
        fresh = chosen[~there]
        return Change(self, fresh, self._places(len(fresh), self.position[stays]), stays, rewind)

    def _places(self, count: int, occupied: Tensor) -> Tensor:
        """That many free positions, vacated ones first."""
        unused = torch.arange(self.handed_out, self.handed_out + count).to(occupied)
        if len(occupied) == self.handed_out:
            return unused
        vacant = torch.ones(self.handed_out, dtype=torch.bool, device=occupied.device)
        vacant[occupied] = False
        return torch.cat([vacant.nonzero().squeeze(1).to(unused), unused])[:count]

    def commit(self, change: Change) -> Tensor:
        """Put a change into force: read the weights of what enters; give what leaves its base value
        back, or keep that.

        Returns the positions now in use that held another scalar before.
        """
        if change.stays is not None:
            left, vacated = self.where(~change.stays)
            if change.rewind:
                self.write(left, self.base[vacated])
            elif len(left):
                old = self.base[vacated]
                self.retired, self.retired_base = merge(self.retired, left, self.retired_base, old)
            self._set(*self.where(change.stays))
        if len(change.fresh):
            weights = self.read(change.fresh)
            base = weights.clone()
            place, again = search(self.retired, change.fresh)
            if again.any():  # trained before: its base is older than its weight
                place = place[again]
                base[again] = self.retired_base[place]
                keep = torch.ones_like(self.retired, dtype=torch.bool)
                keep[place] = False
                self.retired, self.retired_base = self.retired[keep], self.retired_base[keep]
            with torch.no_grad():
                self.values[change.entered] = weights
            self.base[change.entered] = base
        self._hold(len(self.index) + len(change.fresh))
        insert(self.index, change.fresh, self.position, change.entered)
        reused = change.entered[change.entered < self.handed_out]
        self.handed_out += len(change.entered) - len(reused)
        return reused

    def _hold(self, count: int) -> None:
        """Let the table be that long, whatever its memory holds."""
        self.index, self.position = (room[:count] for room in self._room)

    def _set(self, index: Tensor, position: Tensor) -> None:
        """Let the table be this one."""
        self._hold(len(index))
        self.index.copy_(index)
        self.position.copy_(position)

    def touched(self) -> tuple[Tensor, Tensor]:
        """(sorted global indices, base values) of every scalar ever trained."""
        return merge(self.index, self.retired, self.base[self.position], self.retired_base)

    def read(self, index: Tensor) -> Tensor:
        """The weights at sorted global indices, in the dtype of `values`."""
        out = torch.empty(len(index), dtype=self.values.dtype, device=self.values.device)
        gather(self.runs(index), index, out)
        return out

    def write(self, index: Tensor, values: Tensor, where: Tensor | None = None) -> None:
        """Set the weights at sorted global indices to `values` (or values[where]), cast."""
        scatter(self.runs(index), index, values.detach(), where)

    def runs(self, index: Tensor) -> list[Run]:
        """The runs of sorted global indices in the model's weights."""
        tensors, offsets = self.eligible.tensors, self.eligible.offsets
        spans = self.spans if index is self.index else self.eligible.split(index)
        return [Run(tensors[k], offsets[k], a, b) for k, a, b in spans]

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """(tensor position, start, stop) of each tensor's run in `index`."""
        if self._split is not self.index:
            self._split, self._spans = self.index, list(self.eligible.split(self.index))
        return self._spans

    def original(self, index: Tensor) -> Tensor:
        """What the weights at sorted global indices were before this table first touched them."""
        weights, (touched, base) = self.read(index), self.touched()
        place, known = search(touched, index)
        weights[known] = base[place[known]]
        return weights

    def state_dict(self) -> dict[str, Tensor]:
        """The table, the values and the base: all that `load_state_dict` needs."""
        return {
            "values": self.values.detach().clone(),
            "retired_values": self.read(self.retired),
            "handed_out": torch.tensor(self.handed_out),
            **{name: getattr(self, name).clone() for name in TABLE},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, and write its values into the model.

        Refused, with nothing changed, if it is damaged, or if the model's weights before this table
        touched them are neither the base of the given state nor what it made of them.
        """
        check_table(state, self.eligible.total, self.values)
        other = Slots(self.eligible, len(self.values))
        for name in TABLE:
            setattr(other, name, state[name].to(getattr(self, name), copy=True))
        index, base = other.touched()
        found = self.original(index)
        values, retired = (state[n].to(base.device) for n in ("values", "retired_values"))
        _, now = merge(other.index, other.retired, values[other.position], retired)
        if not bool(((found == base) | (found == self._rounded(index, now))).all()):
            raise UnmaskError(
                "the state is of a run on another base: the model's weights at the unmasked "
                "scalars are neither what they were before that run nor what it made of them; "
                "load the same base"
            )
        self.write(*self.touched())
        self._set(other.index, other.position)
        for name in TABLE[2:]:
            setattr(self, name, getattr(other, name))
        self.handed_out = int(state["handed_out"])
        self.values.copy_(values)
        self.write(index, now)

    @torch.no_grad()
    def reread(self) -> None:
        """Set the values to what the model's weights are now."""
        self.values[self.position] = self.read(self.index)

    def _rounded(self, index: Tensor, values: Tensor) -> Tensor:
        """Values at sorted global indices, as the weights' own dtypes hold them."""
        out = values.clone()
        for k, start, stop in self.eligible.split(index):
            out[start:stop] = values[start:stop].to(self.eligible.tensors[k].dtype)
        return out

    def write_back(self) -> None:
        """Put the current values into the model's own weights."""
        self.write(self.index, self.values, self.position)
