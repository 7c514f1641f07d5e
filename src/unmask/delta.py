"""`Delta`: what fine-tuning changed, as a small file and as a patch that can be undone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unmask import sealed
from unmask.errors import UnmaskError
from unmask.kernels.swap import Exchange, gather
from unmask.layouts import LAYOUTS, Content
from unmask.places import Places, Values, fingerprint
from unmask.sparse import Sparse, bits, describe, held_by, target

__all__ = ["Delta", "Row", "Sparse", "fingerprint"]


class Row(NamedTuple):
    """One tensor's part of the budget: `changed` of its scalars, which is `share` of them."""

    name: str
    shape: tuple[int, ...]
    changed: int
    share: float


@dataclass(frozen=True, eq=False, repr=False)
class Delta:
    """What fine-tuning changed: scalars by name and position, and a few tensors whole.

    `sparse` holds absolute values, not differences, so that applying is exact. `full` (a freshly
    initialised head) and `buffers` (batch-norm statistics) are stored whole and are no part of the
    base check; they are copied, so a live module's tensors may be handed in. `base` is the
    `fingerprint` of the base's values at the changed positions. `info` is any JSON object.

    >>> at = torch.tensor([1, 3])
    >>> base = {"weight": Sparse((2, 2), at, torch.zeros(2))}
    >>> Delta({"weight": Sparse((2, 2), at, torch.ones(2))}, base=fingerprint(base))
    Delta(active=2, tensors=1, full=0, buffers=0, nbytes=16)
    """

    sparse: Mapping[str, Sparse]
    full: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    base: str = field(kw_only=True)
    info: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        names = [*self.sparse, *self.full, *self.buffers]
        if len(set(names)) != len(names):
            raise UnmaskError("a tensor is in the delta both sparsely and whole; keep it once")
        if not (isinstance(self.base, str) and re.fullmatch("[0-9a-f]{64}", self.base)):
            raise UnmaskError(f"base={self.base!r} isn't what fingerprint() returns")
        try:
            "".join(names).encode()
            info = json.loads(sealed.canonical(dict(self.info)))  # as a saved delta would have it
        except (TypeError, ValueError, RecursionError) as exc:
            raise UnmaskError(f"names and info must fit into a JSON file: {exc}") from exc
        object.__setattr__(self, "info", info)
        object.__setattr__(self, "sparse", dict(sorted(self.sparse.items())))
        for part in ("full", "buffers"):
            object.__setattr__(self, part, _copies(getattr(self, part)))

    @property
    def active(self) -> int:
        """Scalars changed; the tensors stored whole don't count."""
        return sum(row.changed for row in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of indices, values and whole tensors, as the plain layout has them."""
        return sum(tensor.nbytes for tensor in self._stored("plain")[1].values())

    @property
    def tensors(self) -> list[Row]:
        """How the budget was allotted, a row a tensor."""
        return [
            Row(name, part.shape, len(part.indices), len(part.indices) / max(part.numel, 1))
            for name, part in self.sparse.items()
        ]

    @cached_property
    def after(self) -> str:
        """Fingerprint of the delta's own values: what a model has once it is applied."""
        places, values = self._joint
        return places.fingerprint(values)

    def __repr__(self) -> str:
        counts = {
            "active": self.active,
            "tensors": len(self.sparse),
            "full": len(self.full),
            "buffers": len(self.buffers),
            "nbytes": self.nbytes,
        }
        return f"Delta({', '.join(f'{name}={count:,}' for name, count in counts.items())})"

    def __eq__(self, other: object) -> bool:
        """Whether all content is the same, bit for bit."""
        if not isinstance(other, Delta):
            return NotImplemented
        (shapes, ours), (their_shapes, theirs) = self._stored("plain"), other._stored("plain")
        if (self.base, self.info, shapes) != (other.base, other.info, their_shapes):
            return False
        return ours.keys() == theirs.keys() and all(
            describe(ours[key]) == describe(theirs[key])
            and torch.equal(bits(ours[key]), bits(theirs[key]))
            for key in ours
        )

    def save(
        self, path: str | os.PathLike[str], layout: Literal["compact", "plain"] = "compact"
    ) -> Path:
        """Write the delta into the directory `path` and return it; other files there stay.

        `compact` takes hardly more than the entropy of what it says, at usual sizes two thirds
        of `plain`, which any program that reads safetensors can use as it is. `load` reads both.
        Equal deltas give equal bytes. Cut off at any point, it leaves the delta that was there or
        this one.
        """
        if layout not in LAYOUTS:
            raise UnmaskError(f"layout={layout!r} doesn't exist; there are {', '.join(LAYOUTS)}")
        entries, tensors = self._stored(layout)
        folder = _folder(path)
        config = {"layout": layout, "base": self.base, "info": self.info, **entries}
        sealed.write(folder, config, tensors)
        return folder

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Delta:
        """Read the delta in the directory `path`, refused if a single bit isn't as it was saved.

        Nothing in it is trusted: checksums first, then every name, dtype, shape and index.
        """
        config, tensors = sealed.read(_folder(path))
        layout, base, info = map(config.get, ("layout", "base", "info"))
        if not isinstance(layout, str) or layout not in LAYOUTS:
            raise UnmaskError(
                f"'{path}' has layout {layout!r}, this unmask reads {' and '.join(LAYOUTS)}; "
                "upgrade unmask, or save the delta again in one of these"
            )
        try:
            if not (isinstance(base, str) and isinstance(info, dict)):
                raise UnmaskError("'base' or 'info' is missing or of another type")
            return cls(*LAYOUTS[layout].decode(config, tensors), base=base, info=info)
        except UnmaskError as exc:
            raise UnmaskError(f"'{path}' isn't a delta: {exc}; save or download it again") from exc

    def apply(self, model: nn.Module, instead_of: Delta | None = None) -> Delta:
        """Write the delta into `model`, in place, and return the Delta that undoes it bit for bit.

        All or nothing: whatever is refused or interrupted leaves the model as it was, bit for bit.
        (Compiled code writes as it reads, and takes it back if the base proves wrong: for that
        instant another thread could see it.) Applying the undo returns this very delta again.
        `instead_of` is the undo of another delta, which goes as this one comes; if this one is
        refused, that one stays.
        """
        if instead_of is not None:
            if not isinstance(instead_of, Delta):
                raise UnmaskError(f"instead_of={instead_of!r}; give what another apply() returned")
            other = instead_of.apply(model)
            try:
                return self.apply(model)
            except BaseException:
                other.apply(model)
                raise
        with torch.no_grad():
            return self._swap(self._targets(model), vars(self).get("_undoes"))

    def _swap(self, targets: Mapping[str, Tensor], known: Values | None = None) -> Delta:
        """As `apply`. An undo has `known`: what it takes away, there unless someone moved it."""
        places, values = self._joint
        before = known or places.room()
        full = {name: targets[name] for name in self.full}
        buffers = {name: targets[name] for name in self.buffers}
        undo = copy(self)  # as valid as this one, so that it needs no checks
        vars(undo).pop("sparse", None)
        vars(undo).update(_joint=(places, before), full=_copies(full), buffers=_copies(buffers))
        vars(undo).update(base=self.after, info=deepcopy(self.info))
        vars(undo).update(after=self.base, _undoes=values)  # as is known already
        with ExitStack() as rollback:
            exchange = Exchange(places.moves(targets, values, before), bool(known))
            rollback.callback(exchange.revert)  # also after an interrupt, or out of memory
            if not exchange.start():  # the fingerprint says what is wrong
                rollback.close()
                return self._swap(targets)
            if not known:
                self._check(before)
            rollback.callback(undo._write_whole, targets)
            self._write_whole(targets)
            exchange.finish()
            rollback.pop_all()
        vars(self)["_undoes"] = before  # as it found it, to be compared with the next time
        return undo

    def verify(self, model: nn.Module) -> dict[str, Sparse]:
        """Return what `model` holds at the changed positions, refused unless it is the base.

        Nothing is written. The tensors stored whole are no part of it.
        """
        scalars = Delta(self.sparse, base=self.base, info=self.info)
        with torch.no_grad():
            places, _ = scalars._joint
            found = places.room()
            gather(places.moves(scalars._targets(model), found, found))
            scalars._check(found)
            return places.sparse(found)

    def _check(self, found: Values) -> None:
        if (other := self._joint[0].fingerprint(found)) != self.base:
            raise UnmaskError(self._wrong_base(other))

    def _write_whole(self, targets: Mapping[str, Tensor]) -> None:
        for name, tensor in {**self.full, **self.buffers}.items():
            bits(targets[name]).copy_(bits(tensor))

    def _targets(self, model: nn.Module) -> dict[str, Tensor]:
        """Find the tensors of `model` that the delta changes; all are fit to be written to."""
        if not isinstance(model, nn.Module):
            raise UnmaskError(f"a delta is of a torch.nn.Module, not of {model!r}; give its base")
        places, _ = self._joint
        parameters = held_by(model, "parameters", [*places.names, *self.full])
        targets = {
            name: target(parameters, name, shape, group.dtype)
            for group in places.groups
            for name, shape in zip(group.names, group.shapes, strict=True)
        }
        buffers = held_by(model, "buffers", self.buffers)
        for held, whole in ((parameters, self.full), (buffers, self.buffers)):
            for name, tensor in whole.items():
                targets[name] = target(held, name, tuple(tensor.shape), tensor.dtype)
        if len({tensor.data_ptr() for tensor in targets.values()}) < len(targets):
            _refuse_ties(targets)
        return targets

    def _wrong_base(self, found: str) -> str:
        if found == self.after:
            return "the delta is already applied to this model; undo it, or load a fresh base"
        name = self.info.get("base_model_name_or_path")
        return (
            f"wrong base: the delta was made on {repr(name) if name else 'a model'} with "
            f"fingerprint {self.base[:12]} at the {self.active:,} changed positions, here it is "
            f"{found[:12]}: another model or revision, or one that was trained further, went "
            "through another dtype or has another delta applied; load the base afresh"
        )

    @cached_property
    def _joint(self) -> tuple[Places, Values]:
        """The scalars as few vectors, of which `sparse` then has parts."""
        places, values = Places.of(self.sparse)
        object.__setattr__(self, "sparse", places.sparse(values))
        return places, values

    def __getattr__(self, name: str) -> Any:
        if name == "sparse" and "_joint" in vars(self):  # an undo's, made when someone asks for it
            places, values = self._joint
            return vars(self).setdefault(name, places.sparse(values))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _stored(self, layout: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return LAYOUTS[layout].encode(Content(self.sparse, self.full, self.buffers))


def _folder(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise UnmaskError(f"{path!r} is no path of a directory; give a str or a Path") from None


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for tensor in tensors.values():
        bits(tensor)  # refuses what can't be compared and written bit for bit
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in sorted(tensors.items())
    }


def _refuse_ties(targets: Mapping[str, Tensor]) -> None:
    owners: dict[tuple[torch.device, int], str] = {}
    for name, tensor in targets.items():
        owner = owners.setdefault((tensor.device, tensor.data_ptr()), name)
        if owner != name and tensor.numel():
            raise UnmaskError(
                f"the delta changes {owner!r} and {name!r} separately, but they are one tied "
                "tensor in this model; untie them as in the model that the delta was made on"
            )
