"""How the model's gradients get to the draft of the step's choice, in the order they come.

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
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.draft import Draft
from unmask.eligible import Eligible
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.rows import summed
from unmask.select import NonFinite
from unmask.slots import Change

MODES = ("dense", "streaming", "sampled")
TOGETHER = 1 << 23  # bytes; streamed gradients wait for each other, as each look has its cost
LATE = (
    "this backward pass belongs to a forward pass made before the last optimizer step, or goes on "
    "after a selection was made; with gradients='sampled', run forward after optimizer.step() "
    "and all backward passes before it, or give attach(..., gradients='streaming')"
)


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
        self._arrivals = self._used_at = 0
        self.forget()

    def forget(self) -> None:
        """No gradient has arrived, none has been looked at."""
        self._draft: Draft | None = None
        self._seen: tuple[Any, ...] | None = None
        self._rounds: dict[int, int] = {}
        self._held: dict[int, Tensor] = {}  # sums that aren't complete
        self._waiting: dict[int, Tensor] = {}  # those that are, to be taken together
        self._bytes = 0  # that they take
        self._spent = False  # whether a choice has consumed gradients
        self.change = self.bad = None
        self._notes: tuple[dict[int, Tensor], dict[int, Tensor | None]] = ({}, {})
        self.used = False  # whether a step has used the collected gradient

    @property
    def in_use(self) -> bool:
        """Whether a step uses the collected gradient, and none has arrived since it began to."""
        return self.used and self._used_at == self._arrivals

    def use(self) -> None:
        """The collected gradient is being used by a step; nothing is held for it any longer."""
        self.used, self._used_at = True, self._arrivals
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
        # Python can't see what a tensor's hook holds, so never frees a cycle through one.
        intake = weakref.ref(self)
        for k, parameter in enumerate(self._eligible.tensors):

            def arrived(parameter: Tensor, k: int = k) -> None:
                this = intake()
                if this is None:
                    return
                this._arrivals += 1
                if this.streaming:
                    with this._lock:
                        this._stream(k, parameter)

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
                "backward passes a step, or gradients='dense'. (Checkpointing with "
                "use_reentrant=True passes once for each segment that uses a weight: take False)"
            )
        if k in self._held:
            held = self._held.pop(k)
            into, other = (gradient, held) if held.is_sparse else (held, gradient)
            gradient = into.add_(other)  # a dense one takes both kinds
            gradient = summed(gradient) if gradient.is_sparse else gradient
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
        self._bytes += gradient.numel() * gradient.element_size()
        if self._bytes >= TOGETHER:
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
        waiting, self._waiting, self._bytes = self._waiting, {}, 0
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
