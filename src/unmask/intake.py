"""From the model's gradients to the gradient of `values`: one step's choice, and what it trains.

A gradient gets here in one of three ways with equal results. *Dense*: the training loop leaves
full `.grad`s in the model, read when the step needs them. *Streaming*: each tensor's gradient is
scored, gathered and freed soon after backward has produced it, so that a few MB of them wait at a
time. *Sampled*: on steps that choose nothing, gradients come at the unmasked scalars alone, from
`sampled`; other steps, and what that can't do, stream.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.eligible import Eligible
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.heuristics import Heuristic, Whole
from unmask.kernels import Run, gather, scatter
from unmask.methods import Method
from unmask.scopes import Selector
from unmask.select import NonFinite, Piece, others
from unmask.slots import Change, Slots
from unmask.strategies import Quota

MODES = ("dense", "streaming", "sampled")
TOGETHER = 1 << 21  # scalars; streamed gradients wait for each other, as each look has its cost
LATE = (
    "this backward pass belongs to a forward pass made before the last optimizer step, or goes on "
    "after a selection was made; with gradients='sampled', run forward after optimizer.step() "
    "and all backward passes before it, or give attach(..., gradients='streaming')"
)


class Draft:
    """One step's choice in the making: give it gradients with `take`, then `finish`.

    seen      what the heuristic keeps of the tensors, by position
    step      the optimiser step that this is about
    watching  whether the heuristic is to `observe` its gradients, also if nothing is chosen
    notes     what it keeps instead, once the step takes place
    """

    def __init__(
        self,
        slots: Slots,
        method: Method,
        quota: Quota,
        seen: dict[int, Tensor],
        step: int,
        watching: bool,
    ) -> None:
        self.slots, self.method, self.quota, self.seen = slots, method, quota, seen
        self.step, self.watching = step, watching
        self.notes: dict[int, Tensor | None] = {}
        self.change: Change | None = None
        self.best: Selector | None = None
        self._gathers = False  # whether the selector gathers as it goes
        self._surveys = type(method.heuristic).survey is not Heuristic.survey
        self._taken = [False] * len(slots.eligible.names)
        self._keep(_kept(slots, method, quota.drop))
        masked = slots.eligible.total - len(self.kept)
        count = min(quota.grow, masked)
        if count and count == masked:
            self._enter(others(slots.eligible.total, self.kept))
        elif count:
            self.best = method.scope.selector(count, method.heuristic, slots.eligible, self.kept)
            if not method.heuristic.uses_gradient:  # so the choice is made before any is seen
                self.best.offer(self._piece(k, None) for k in range(len(self._taken)))
                chosen, _ = self._chosen()
                self._enter(chosen)
                self.best = None
        elif quota.drop:
            self.change = slots.replace(self.kept, method.strategy.rewinds)
        if self.change is not None:
            self._keep(self.change.index)
        self.gradient = slots.base.new_zeros(len(self.kept))
        self._gathers = getattr(self.best, "gathers", False) and slots.base.dtype == torch.float32

    def _keep(self, kept: Tensor) -> None:
        """Set the sorted global indices whose gradients are gathered, and their runs by tensor."""
        self.kept = kept
        self.runs = {k: (start, stop) for k, start, stop in self.slots.eligible.split(kept)}

    @property
    def needs_sums(self) -> bool:
        """Whether it must get each tensor's gradient at once, summed over the step's passes."""
        return self.best is not None or self.watching

    @property
    def settled(self) -> bool:
        """Whether the step leaves the choice as it is, and needs no other gradients."""
        return not self.needs_sums and self.change is None

    def take(self, gradients: Mapping[int, Tensor]) -> None:
        """Score and gather these tensors' gradients, by position; they aren't needed afterwards."""
        gradients = {k: g.to_dense() if g.is_sparse else g for k, g in gradients.items()}
        for k in gradients:
            self._taken[k] = True
        if not self._gathers:
            offsets, runs = self.slots.eligible.offsets, self.runs
            taken = [Run(g, offsets[k], *runs[k]) for k, g in gradients.items() if k in runs]
            gather(taken, self.kept, self.gradient, add=True)
        if self.watching:
            for k, gradient in gradients.items():
                self._observe(k, gradient)
        if self.best is not None:
            self.best.offer(self._piece(k, gradient) for k, gradient in gradients.items())

    def add(self, k: int, gradient: Tensor) -> None:
        """Add to the k-th tensor's kept scalars this part of their gradient."""
        start, stop = self.runs[k]
        self.gradient[start:stop] += gradient.to(self.gradient)

    def finish(self, out: Tensor) -> Change | None:
        """The new table, if the choice changes; into `out`, the gradient of `values` under it."""
        # A finite sum tells as much in one pass and without a copy.
        if not (torch.isfinite(self.gradient.sum()) or torch.isfinite(self.gradient).all()):
            raise NonFinite("the unmasked scalars")
        out.zero_()
        missing = [k for k, taken in enumerate(self._taken) if not taken]
        if self.watching:
            for k in missing:
                self._observe(k, None)
        if self.best is not None:
            self.best.offer(self._piece(k, None) for k in missing)
            chosen, gradient = self._chosen()
            change = self._enter(chosen)
            out[change.at(chosen)] = gradient.to(out.dtype)
        if not self.quota.drop and self.kept is self.slots.index:
            run = Run(out, 0, 0, len(self.kept))
            scatter([run], self.slots.position, self.gradient)  # positions stay when others enter
        elif self.change is not None:
            out[self.change.at(self.kept)] = self.gradient
        return self.change

    def _chosen(self) -> tuple[Tensor, Tensor]:
        """The selector's best, and their gradients; if too few have a score that is a number,
        the first of the others make up the rest."""
        assert self.best is not None
        chosen, gradient = self.best.best()
        if lacking := self.best.count - len(chosen):
            taken = torch.cat([self.kept, chosen]).sort().values
            rest = others(self.slots.eligible.total, taken)[:lacking]
            chosen, order = torch.cat([chosen, rest]).sort()
            gradient = torch.cat([gradient, gradient.new_zeros(len(rest))])[order]
        return chosen, gradient

    def _enter(self, chosen: Tensor) -> Change:
        """Let the chosen join those kept."""
        if self.quota.drop:
            index = torch.cat([self.kept, chosen]).sort().values
            self.change = self.slots.replace(index, self.method.strategy.rewinds)
        else:
            self.change = self.slots.extend(chosen)
        return self.change

    def _piece(self, k: int, gradient: Tensor | None) -> Piece:
        eligible = self.slots.eligible
        theta = eligible.tensors[k].detach().reshape(-1)
        grad = None if gradient is None else gradient.detach().reshape(-1)
        seen = self.notes[k] if k in self.notes else self.seen.get(k)
        if self._surveys:
            seen = self.method.heuristic.survey(seen, self._whole(k, gradient))
        seen = None if seen is None else seen.reshape(-1)
        start, stop = self.runs.get(k, (0, 0))
        taken = self.kept[start:stop].to(theta.device)
        into = self.gradient[start:stop] if grad is not None and self._gathers else None
        return Piece(eligible.names[k], eligible.offsets[k], theta, grad, taken, seen, into)

    def _observe(self, k: int, gradient: Tensor | None) -> None:
        """Let the heuristic note what it wants of a tensor's gradient."""
        if gradient is not None and not torch.isfinite(gradient).all():
            raise NonFinite(self.slots.eligible.names[k])
        whole = self._whole(k, gradient)
        self.notes[k] = self.method.heuristic.observe(self.seen.get(k), whole)

    def _whole(self, k: int, gradient: Tensor | None) -> Whole:
        eligible = self.slots.eligible
        theta = eligible.tensors[k].detach()
        if gradient is None:
            gradient = theta.new_zeros(()).expand(theta.shape)  # takes no memory
        share = len(self.slots.values) / eligible.total
        return Whole(theta, gradient.detach(), eligible.names[k], self.step, share)


def _kept(slots: Slots, method: Method, drop: int) -> Tensor:
    """The current scalars less the `drop` of least worth, as the scope understands it."""
    if not drop:
        return slots.index
    if drop >= len(slots):
        return slots.index[:0]
    worth = method.strategy.worth(slots.values.detach(), slots.base)[slots.position]
    stay = method.scope.staying(slots.index, worth, len(slots) - drop, slots.eligible)
    return slots.index[stay.sort().values]


class Intake:
    """Drafts each step's choice from gradients as they come, dense or streaming.

    draft       begins the draft of the step to come
    full        fully trained parameters, whose gradients must be finite as well
    gradients   one of MODES: whether they are read at the step or consumed during backward
    accumulation  backward passes a step; streaming must know it, as scores need their sum. None
                  is for whoever says before each pass whether it is the step's `last`: until then
                  gradients of a step that chooses are held, out of sight
    """

    def __init__(
        self,
        draft: Callable[[], Draft],
        eligible: Eligible,
        values: Tensor,
        full: Mapping[str, nn.Parameter],
        gradients: str,
        accumulation: int | None,
    ) -> None:
        if gradients not in MODES:
            raise UnmaskError(f"gradients={gradients!r}; it is one of {', '.join(MODES)}")
        passes = 1 if accumulation is None else accumulation
        if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
            raise UnmaskError(
                f"accumulation={accumulation!r}; it is the number of backward passes a step, "
                "1 or more"
            )
        self._begin, self._eligible, self._full = draft, eligible, full
        self.streaming, self.sampled = gradients != "dense", gradients == "sampled"
        self._whole: set[int] = set()  # tensors whose gradient wasn't sampled though it could be
        self._told = False
        self.accumulation = math.inf if accumulation is None else accumulation
        self.last = False  # whether the pass under way is known to be the step's last
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
        self._held: dict[int, Tensor] = {}  # sums that aren't complete
        self._waiting: dict[int, Tensor] = {}  # those that are, to be taken together
        self._spent = False  # whether a choice has consumed gradients
        self.change = self.bad = None
        self._notes: tuple[dict[int, Tensor], dict[int, Tensor | None]] = ({}, {})
        self.used = False  # whether a step has used the collected gradient

    def use(self) -> None:
        """The collected gradient is being used by a step; nothing is held for it any longer."""
        self.used = True
        self._held.clear()
        if self._whole and not self._told:
            self._told = True
            names = [self._eligible.names[k] for k in sorted(self._whole)]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            warnings.warn(
                f"the gradients of {', '.join(names[:5])}{more} can't be sampled where the model "
                "uses them, so they stream: the same result, slower",
                UnmaskWarning,
                stacklevel=2,
            )

    def settle(self) -> Change | None:
        """Hand over the collected choice, once; what the heuristic noted with it is in force."""
        change, self.change = self.change, None
        (seen, notes), self._notes = self._notes, ({}, {})
        for k, note in notes.items():
            if note is None:
                seen.pop(k, None)
            else:
                seen[k] = note
        return change

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
        parameter.grad = None
        if self.used:
            self.forget()
        self._rounds[k] = self._rounds.get(k, 0) + 1
        gone = self._spent and self._draft is None and self.bad is None
        if gone or self._rounds[k] > self.accumulation:
            raise UnmaskError(
                f"backward pass {self._rounds[k]} since the last step, but this run streams with "
                f"accumulation={self.accumulation}; give attach(..., accumulation=) the number of "
                "backward passes a step, or gradients='dense'"
            )
        if k in self._held:
            gradient = self._held.pop(k).add_(gradient)
        if self._draft is None and self.bad is None:
            self._draft = self._begin()
        choosing = self._draft is not None and self._draft.needs_sums
        if choosing and not self.last and self._rounds[k] < self.accumulation:
            self._held[k] = gradient  # scores need the sum
            return
        self._spent |= choosing
        if k in self._waiting:
            self._take_waiting()
        self._waiting[k] = gradient
        if sum(map(torch.numel, self._waiting.values())) >= TOGETHER:
            self._take_waiting()
        if self.sampled and gradient.dim() > 1 and self._draft is not None and self._draft.settled:
            self._whole.add(k)  # of one dimension it costs nothing, so that goes without saying

    def sampling(self) -> Draft | None:
        """The draft for gradients at its own scalars; None if the step's gradient is spoilt."""
        with self._lock:
            if self.used:
                self.forget()
            if self._draft is None and self.bad is None and not self._spent:
                self._draft = self._begin()
            if self.bad is None and (self._draft is None or self._draft.best is not None):
                raise UnmaskError(LATE)
            return self._draft

    def add(self, k: int, gradient: Tensor | None) -> None:
        """A part of the k-th tensor's gradient at the scalars of `sampling()`, if it has any."""
        with self._lock:
            self._arrivals += 1
            self._rounds.setdefault(k, 0)
            if gradient is not None and self._draft is not None:
                self._draft.add(k, gradient)

    def _take_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        self._take(waiting)

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
        left = {k: p.grad for k, p in enumerate(tensors) if p.grad is not None} | self._held
        whole = [p.grad for p in self._full.values()]
        if not left and not self._rounds and all(g is None for g in whole):
            return None
        news = () if self.streaming else ((id(g), g._version) for g in left.values())
        seen = (self._arrivals, *news)
        if seen == self._seen:
            return self.gradient
        if not self._rounds or self.used:
            self.forget()
        if self._draft is None and self.bad is None:
            self._draft = self._begin()
        self._take_waiting()
        self._take(left)
        self._seen = seen
        self._finish()
        for name, gradient in zip(self._full, whole, strict=True):
            if gradient is not None and not torch.isfinite(gradient).all():
                self.bad = name
        return self.gradient

    def _finish(self) -> None:
        draft = self._draft
        if draft is not None and draft.needs_sums:
            self._draft = None  # what doesn't choose can take more, and be finished again
        try:
            if draft is not None:
                self.change = draft.finish(self.gradient)
                self._notes = draft.seen, draft.notes
        except NonFinite as problem:
            self.bad = str(problem)
        if self.bad is not None:
            self.gradient.fill_(torch.nan)  # so that clipping and a gradient scaler see it too
