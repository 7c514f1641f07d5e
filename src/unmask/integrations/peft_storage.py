"""What a model holds of its sparse adapters, in the form in which PEFT saves and loads them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from unmask.delta import Delta, Sparse, fingerprint
from unmask.eligible import Eligible
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.states import increasing
from unmask.tuner import Values

EMPTY = -1  # the index of a slot that isn't filled


@dataclass(frozen=True, eq=False)
class Content:
    """An adapter's scalars, sorted, with their values and those of the base."""

    index: Tensor
    values: Tensor
    base: Tensor


class Storage(nn.Module):
    """Adapters by name.

    unmask_values    the trainable vector, one float32 entry a slot
    unmask_indices   flat indices into the eligible scalars, in the order of the slots and -1 where
                     a slot is empty; after them those that were trained once and aren't any more
    unmask_retired   the values of the latter
    unmask_progress  optimiser steps, scalar updates, slots ever used: what resuming needs
    unmask_digest    SHA-256 over the base's values at the indices, to recognise a wrong base
    base             the base's values there; in no adapter file, but in a whole model's state dict
    """

    def __init__(self) -> None:
        super().__init__()
        self.unmask_values = nn.ParameterDict()
        self.unmask_indices = BufferDict(persistent=True)
        self.unmask_retired = BufferDict(persistent=True)
        self.unmask_progress = BufferDict(persistent=True)
        self.unmask_digest = BufferDict(persistent=True)
        self.base = BufferDict(persistent=False)
        self.eligible: dict[str, Eligible] = {}
        self.configs: dict[str, Any] = {}

    def refresh(self) -> None:
        """Bring what is stored up to date with training."""

    def content(self, name: str) -> Content:
        """What an adapter holds by now."""
        self.refresh()
        index, vector = self.unmask_indices[name].to(torch.int64), self.unmask_values[name].detach()
        if vector.is_meta:  # low_cpu_mem_usage: about to be loaded
            return Content(index[:0], self.base[name][:0], self.base[name][:0])
        values = torch.cat([vector, self.unmask_retired[name]])
        if len(index) and index[0] >= 0 and bool((index[1:] > index[:-1]).all()):
            return Content(index, values, self.base[name])  # chosen all at once, so in order
        index, order = index.sort()
        filled = index != EMPTY
        return Content(index[filled], values[order[filled]], self.base[name][order[filled]])

    def changes(self, names: Sequence[str]) -> tuple[Tensor, list[Tensor], Tensor]:
        """(the union of the adapters' scalars, each one's change of them, the base there)."""
        first = self.eligible[names[0]]
        for name in names:
            if [id(t) for t in self.eligible[name].tensors] != [id(t) for t in first.tensors]:
                raise UnmaskError(
                    f"adapters {names[0]!r} and {name!r} have different targets, so they can't be "
                    "put together; give both the same target_modules"
                )
        contents = [self.content(name) for name in names]
        union = torch.cat([content.index for content in contents]).unique()
        base = torch.zeros(len(union), dtype=contents[0].values.dtype, device=union.device)
        changes = [torch.zeros_like(base) for _ in names]
        for change, content in zip(changes, contents, strict=True):
            place = torch.searchsorted(union, content.index)
            base[place], change[place] = content.base, content.values - content.base
        return union, changes, base

    def delta(self, name: str) -> Delta:
        """The adapter as an `unmask.Delta`, which needs no PEFT to be applied."""
        eligible, content, config = self.eligible[name], self.content(name), self.configs[name]
        after: dict[str, Sparse] = {}
        before: dict[str, Sparse] = {}
        for k, start, stop in eligible.split(content.index):
            tensor, flat = eligible.tensors[k], content.index[start:stop] - eligible.offsets[k]
            for sparse, scalars in ((after, content.values), (before, content.base)):
                values = scalars[start:stop].to(tensor.dtype)
                sparse[eligible.names[k]] = Sparse(tuple(tensor.shape), flat, values)
        steps, updates, _ = self.unmask_progress[name].tolist()
        info = {
            "method": config.build().to_dict(),
            "step": steps,
            "updates": updates,
            "eligible": eligible.total,
            "base_model_name_or_path": config.base_model_name_or_path,
        }
        return Delta(after, base=fingerprint(before), info=info)

    def create(self, name: str, config: Any, eligible: Eligible, trainable: bool) -> None:
        """Room for a new adapter, in which no scalar is chosen yet."""
        budget = config.build().resolve(eligible.total, len(eligible.names))
        wide = any(t.dtype == torch.float64 for t in eligible.tensors)
        self.eligible[name], self.configs[name] = eligible, config
        vector = torch.zeros(budget, dtype=torch.float64 if wide else torch.float32)
        self.unmask_values[name] = Values(vector.to(self.device(name)), requires_grad=trainable)
        index = torch.full((budget + config.retired,), EMPTY)
        base = torch.zeros(len(index), dtype=vector.dtype)
        self.fill(name, index, base, vector.new_zeros(config.retired), torch.zeros(3).long())
        self.unmask_digest[name] = torch.zeros(32, dtype=torch.uint8)

    def fill(
        self, name: str, index: Tensor, base: Tensor, retired: Tensor, progress: Tensor
    ) -> None:
        """Store all of an adapter but its vector."""
        small = self.eligible[name].total <= torch.iinfo(torch.int32).max
        index = index.to(self.device(name), torch.int32 if small else torch.int64, copy=True)
        index.taken = True  # type: ignore[attr-defined]  # see `loaded`
        self.unmask_indices[name], self.base[name] = index, base.to(index.device, copy=True)
        self.unmask_retired[name] = retired.to(index.device, copy=True)  # no view of more
        self.unmask_progress[name] = progress
        self.configs[name].retired = len(retired)

    def loaded(self, name: str) -> bool:
        """Whether someone has put other indices in place, as transformers' load_adapter does."""
        return not hasattr(self.unmask_indices[name], "taken")

    def accept(self, name: str, base: Tensor | None) -> None:
        """Make what was loaded the adapter's own. No adapter is in force; or the base is given."""
        self._check(name)
        device, vector = self.device(name), self.vector(name)
        vector.data = vector.data.to(device)
        parts = self.unmask_indices[name], self.unmask_retired[name], self.unmask_progress[name]
        base = self._read_base(name) if base is None else base.to(device, vector.dtype)
        self.fill(name, parts[0], base, parts[1], parts[2])
        if self.unmask_digest[name].any() and not self.recognises(name):
            warnings.warn(
                f"adapter {name!r} was trained on another base: at its scalars this model's "
                "weights differ from those it was trained from (another model or revision, another "
                "dtype, or trained further); its values replace them all the same",
                UnmaskWarning,
                stacklevel=2,
            )

    def vector(self, name: str) -> Values:
        """The adapter's vector, of the class and width that it may have lost on the way."""
        vector = self.unmask_values[name]
        if type(vector) is not Values:
            vector.__class__ = Values
        if vector.dtype not in (torch.float32, torch.float64):
            vector.data = vector.data.float()
        assert isinstance(vector, Values)
        return vector

    def device(self, name: str) -> torch.device:
        """Where an adapter lives: where its first weight does."""
        return self.eligible[name].tensors[0].device

    def _check(self, name: str) -> None:
        """Refuse what was loaded if its indices can't be this model's, or anyone's."""
        total, index = self.eligible[name].total, self.unmask_indices[name]
        filled = index[index != EMPTY].sort().values
        if len(filled) and int(filled[-1]) >= total:
            raise UnmaskError(
                f"adapter {name!r} was made for another model: it changes scalar "
                f"{int(filled[-1]):,} of the eligible, and there are {total:,}; load it on "
                "its own base with its own target_modules"
            )
        if not increasing(filled, total):
            raise UnmaskError(
                f"adapter {name!r} is damaged: its indices, of which {int(filled[0]):,} is the "
                "least, aren't different numbers from 0 on; copy or download it again"
            )

    def _read_base(self, name: str) -> Tensor:
        eligible = self.eligible[name]
        index, order = self.unmask_indices[name].to(self.device(name), torch.int64).sort()
        base = torch.zeros(len(index), dtype=self.unmask_values[name].dtype, device=index.device)
        filled = index != EMPTY
        base[order[filled]] = read(eligible, index[filled], base.dtype)
        return base

    def recognises(self, name: str) -> bool:
        """Whether the base is the one that the adapter was trained on."""
        return torch.equal(self.unmask_digest[name].cpu(), self._digest(name))

    def _digest(self, name: str) -> Tensor:
        shapes, content = [tuple(t.shape) for t in self.eligible[name].tensors], self.content(name)
        sha = hashlib.sha256(str(shapes).encode())
        for part in (content.index, content.base):
            sha.update(part.cpu().numpy().tobytes())
        return torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.refresh()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.eligible:
            if not self.loaded(name) and bool((self.unmask_indices[name] != EMPTY).any()):
                self.unmask_digest[name] = self._digest(name)
                destination[f"{prefix}base.{name}"] = self.base[name]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Storage:
        """Move with the model, but keep the width of what must be exact."""
        exact = {
            name: (self.unmask_values[name].detach(), self.base[name]) for name in self.eligible
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, (values, base) in exact.items():
            vector, index = self.unmask_values[name], self.unmask_indices[name]
            index.taken = True
            if not vector.is_meta:
                vector.data = values.to(vector.device)
                self.base[name] = base.to(index.device)
        return self


def read(eligible: Eligible, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights at sorted scalars."""
    out = torch.empty(len(index), dtype=dtype, device=index.device)
    for k, start, stop in eligible.split(index):
        flat = (index[start:stop] - eligible.offsets[k]).to(eligible.tensors[k].device)
        out[start:stop] = eligible.tensors[k].detach().reshape(-1)[flat].to(out.device, dtype)
    return out


@torch.no_grad()
def write(eligible: Eligible, index: Tensor, values: Tensor) -> None:
    """Set the weights at sorted scalars, cast to their own dtypes."""
    for k, start, stop in eligible.split(index):
        tensor = eligible.tensors[k]
        flat = (index[start:stop] - eligible.offsets[k]).to(tensor.device)
        part = values[start:stop].to(tensor.device, tensor.dtype)
        if tensor.is_contiguous():
            tensor.view(-1).index_copy_(0, flat, part)
        else:
            tensor[torch.unravel_index(flat, tensor.shape)] = part
