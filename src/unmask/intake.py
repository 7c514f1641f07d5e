"""From the model's gradients to the gradient of `values`: one step's choice, and what it trains.

A gradient gets here in one of two ways with equal results. *Dense*: the training loop leaves full
`.grad`s in the model, read when the step needs them. *Streaming*: each tensor's gradient is scored,
gathered and freed the moment backward has produced it, so that no two need exist at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.eligible import Eligible
from unmask.errors import UnmaskError
from unmask.kernels import Run, gather
from unmask.methods import Method
from unmask.scopes import Selector
from unmask.select import NonFinite, Piece, others
from unmask.slots import Change, Slots
from unmask.strategies import Quota

MODES = ("dense", "streaming")


class Draft:
    """One step's choice in the making: give it gradients with `take`, then `finish`."""

    def __init__(self, slots: Slots, method: Method, quota: Quota, seen: dict[int, Tensor]) -> None:
        self.slots, self.method, self.quota, self.seen = slots, method, quota, seen
        self.change: Change | None = None
        self.best: Selector | None = None
        kept = _kept(slots, method, quota.drop)
        count = min(quota.grow, slots.eligible.total - len(kept))
        if count == slots.eligible.total - len(kept):
            self.change = self._entering(kept, others(slots.eligible.total, kept))
        elif count:
            self.best = method.scope.selector(count, method.heuristic, slots.eligible, kept)
            if not method.heuristic.uses_gradient:  # so the choice is made before any is seen
                self.best.offer(
                    self._piece(k, None, kept) for k in range(len(slots.eligible.names))
                )
                self.change, self.best = self._entering(kept, self._chosen(kept)[0]), None
        elif quota.drop:
            self.change = slots.replace(kept)
        self.kept = kept if self.change is None else self.change.index
        self.runs = {k: (start, stop) for k, start, stop in slots.eligible.split(self.kept)}
        self.gradient = torch.zeros(len(self.kept), dtype=slots.values.dtype, device=kept.device)
        self._taken = [False] * len(slots.eligible.names)

    def take(self, gradients: Mapping[int, Tensor]) -> None:
        """Score and gather these tensors' gradients, by position; they aren't needed afterwards."""
        gradients = {k: g.to_dense() if g.is_sparse else g for k, g in gradients.items()}
        for k in gradients:
            self._taken[k] = True
        offsets = self.slots.eligible.offsets
        runs = [Run(g, offsets[k], *self.runs[k]) for k, g in gradients.items() if k in self.runs]
        gather(runs, self.kept, self.gradient, add=True)
        if self.best is not None:
            self.best.offer(
                [self._piece(k, gradient, self.kept) for k, gradient in gradients.items()]
            )

    def finish(self, out: Tensor) -> Change | None:
        """The new table, if the choice changes; into `out`, the gradient of `values` under it."""
        if not torch.isfinite(self.gradient).all():
            raise NonFinite("the unmasked scalars")
        out.zero_()
        if self.best is not None:
            missing = [k for k, taken in enumerate(self._taken) if not taken]
            self.best.offer([self._piece(k, None, self.kept) for k in missing])
            chosen, gradient = self._chosen(self.kept)
            self.change = self._entering(self.kept, chosen)
            out[self.change.at(chosen)] = gradient.to(out.dtype)
        if not self.quota.drop and self.kept is self.slots.index:
            out[self.slots.position] = self.gradient  # positions stay when others enter
        elif self.change is not None:
            out[self.change.at(self.kept)] = self.gradient
        return self.change

    def _chosen(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The selector's best, and their gradients; if too few have a score that is a number,
        the first of the others make up the rest."""
        assert self.best is not None
        chosen, gradient = self.best.best()
        if lacking := self.best.count - len(chosen):
            taken = torch.cat([kept, chosen]).sort().values
            rest = others(self.slots.eligible.total, taken)[:lacking]
            chosen, order = torch.cat([chosen, rest]).sort()
            gradient = torch.cat([gradient, gradient.new_zeros(len(rest))])[order]
        return chosen, gradient

    def _entering(self, kept: Tensor, chosen: Tensor) -> Change:
        if not self.quota.drop:
            return self.slots.extend(chosen)
        return self.slots.replace(torch.cat([kept, chosen]).sort().values)

    def _piece(self, k: int, gradient: Tensor | None, kept: Tensor) -> Piece:
        eligible = self.slots.eligible
        theta = eligible.tensors[k].detach().reshape(-1)
        grad = None if gradient is None else gradient.detach().reshape(-1)
        if grad is not None:
            seen = self.method.heuristic.observe(self.seen.get(k), theta, grad)
            if seen is not None:
                self.seen[k] = seen
        start, stop = torch.searchsorted(
            kept, kept.new_tensor(eligible.offsets[k : k + 2])
        ).tolist()
        taken = kept[start:stop].to(theta.device)
        return Piece(eligible.names[k], eligible.offsets[k], theta, grad, taken, self.seen.get(k))


def _kept(slots: Slots, method: Method, drop: int) -> Tensor:
    """The current scalars less the `drop` of least worth; of equals, the later ones go."""
    if not drop:
        return slots.index
    if drop >= len(slots):
        return slots.index[:0]
    worth = method.strategy.worth(slots.values.detach(), slots.base)[slots.position]
    stay = worth.argsort(descending=True, stable=True)[: len(slots) - drop]
    return slots.index[stay.sort().values]


class Intake:
    """Drafts each step's choice from gradients as they come, dense or streaming.

    draft       begins the draft of the step to come
    full        fully trained parameters, whose gradients must be finite as well
    gradients   one of MODES: whether they are read at the step or consumed during backward
    accumulation  backward passes a step; streaming must know it, since scores need their sum
    """

    def __init__(
        self,
        draft: Callable[[], Draft],
        eligible: Eligible,
        values: Tensor,
        full: Mapping[str, nn.Parameter],
        gradients: str,
        accumulation: int,
    ) -> None:
        if gradients not in MODES:
            raise UnmaskError(f"gradients={gradients!r}; it is one of {', '.join(MODES)}")
        if isinstance(accumulation, bool) or not isinstance(accumulation, int) or accumulation < 1:
            raise UnmaskError(
                f"accumulation={accumulation!r}; it is the number of backward passes a step, "
                "1 or more"
            )
        self._begin, self._eligible, self._full = draft, eligible, full
        self.streaming, self.accumulation = gradients != "dense", accumulation
        self.gradient = torch.zeros_like(values.detach())
        self.bad: str | None = None  # whose gradient isn't finite
        self.change: Change | None = None  # the choice of a collected gradient, not yet in force
        self._lock = threading.Lock()  # backward may run a thread a device
        self._arrivals = 0
        self.forget()

    def forget(self) -> None:
        """No gradient has arrived, none has been looked at."""
        self._draft: Draft | None = None
        self._seen: tuple[Any, ...] | None = None
        self._rounds: dict[int, int] = {}
        self.change = self.bad = None
        self.used = False  # whether a step has used the collected gradient

    def watch(self) -> list[Callable[[], None]]:
        """Hear of every gradient that backward produces; returns what ends that."""
        handles = []
        for k, parameter in enumerate(self._eligible.tensors):

            def arrived(parameter: Tensor, k: int = k) -> None:
                self._arrivals += 1
                if self.streaming:
                    with self._lock:
                        self._stream(k, parameter)

            handles.append(parameter.register_post_accumulate_grad_hook(arrived))
        return [handle.remove for handle in handles]

    def _stream(self, k: int, parameter: Tensor) -> None:
        """Consume the gradient that has just arrived, unless its sum isn't complete."""
        gradient = parameter.grad
        if gradient is None:
            return
        if self.used:
            self.forget()
        if self._draft is None and self.bad is None:
            self._draft = self._begin()
        self._rounds[k] = self._rounds.get(k, 0) + 1
        if self._rounds[k] > self.accumulation or self._seen is not None:
            raise UnmaskError(
                f"backward pass {self._rounds[k]} since the last step, but this run streams with "
                f"accumulation={self.accumulation}; give attach(..., accumulation=) the number of "
                "backward passes a step, or gradients='dense'"
            )
        choosing = self._draft is not None and self._draft.best is not None
        if choosing and self._rounds[k] < self.accumulation:
            return  # scores need the sum
        self._take({k: gradient})
        parameter.grad = None

    def _take(self, gradients: Mapping[int, Tensor]) -> None:
        if self._draft is None:
            return
        try:
            self._draft.take(gradients)
        except NonFinite as problem:
            self.bad, self._draft = str(problem), None

    def collect(self) -> Tensor | None:
        """The gradient of `values` for what the model holds or has streamed; None if there is none.

        Makes the step's choice (`change`); reading again without news gives the same again.
        """
        tensors = self._eligible.tensors
        left = {k: p.grad for k, p in enumerate(tensors) if p.grad is not None}
        whole = [p.grad for p in self._full.values()]
        if not left and not self._rounds and all(g is None for g in whole):
            return None
        seen = (self._arrivals, *((id(g), g._version) for g in left.values()))
        if seen == self._seen:
            return self.gradient
        if not self._rounds or self.used:
            self.forget()
        if self._draft is None and self.bad is None:
            self._draft = self._begin()
        self._take(left)
        if self.streaming:
            for k in left:
                tensors[k].grad = None
            seen = seen[:1]
        self._seen = seen
        self._finish()
        for name, gradient in zip(self._full, whole, strict=True):
            if gradient is not None and not torch.isfinite(gradient).all():
                self.bad = name
        return self.gradient

    def _finish(self) -> None:
        draft, self._draft = self._draft, None
        try:
            if draft is not None:
                self.change = draft.finish(self.gradient)
        except NonFinite as problem:
            self.bad = str(problem)
        if self.bad is not None:
            self.gradient.fill_(torch.nan)  # so that clipping and a gradient scaler see it too
