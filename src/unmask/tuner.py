"""attach(model, method): train a chosen few of a model's own scalars, with any optimiser."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask import heap, products
from unmask.course import Course
from unmask.delta import Delta, Sparse, fingerprint
from unmask.draft import Draft
from unmask.driver import Driver
from unmask.eligible import Eligible, Patterns, find
from unmask.errors import UnmaskError
from unmask.fresh import random_parts
from unmask.hooks import Hook
from unmask.intake import Intake
from unmask.methods import Method
from unmask.processes import check_alike, check_unwrapped, check_whole
from unmask.sampled import Sampler
from unmask.slots import Slots
from unmask.slots import Values as Values
from unmask.states import check_run
from unmask.whole import WholeTensors

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tuner]] = weakref.WeakKeyDictionary()


def attach(
    model: nn.Module,
    method: Method,
    steps: int | None = None,
    include: Patterns = "*",
    exclude: Patterns = (),
    train_fully: Patterns = (),
    calibration: Iterable[Any] | None = None,
    *,
    gradients: str = "dense",
    accumulation: int = 1,
) -> Tuner:
    """Let `method` choose which of the model's scalars are trained; its modules stay as they are.

    steps         optimiser steps T of the schedule; may be set later as `tuner.steps`
    include, exclude  shell patterns on the names of parameters that may be chosen from
    train_fully   patterns of parameters trained whole, outside the budget (a new head, say)
    calibration   batches for methods that need data before training
    gradients     "dense": the loop leaves full `.grad`s, read at the step; "streaming": each is
                  consumed during backward, so memory holds one at a time and none is left;
                  "sampled": as streaming where something is chosen, and between selections weight
                  gradients are computed at the unmasked scalars only
    accumulation  backward passes a step, which streaming has to know

    Parameters that are neither eligible nor trained fully are frozen until `detach()`.

    >>> import unmask
    >>> model = nn.Linear(4, 2)
    >>> tuner = unmask.attach(model, unmask.id3(budget=3), steps=3)
    >>> optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    >>> tuner.active
    1
    """
    if not isinstance(model, nn.Module):
        raise UnmaskError(f"attach() was given {model!r} for its model; give a torch.nn.Module")
    if not isinstance(method, Method):
        raise UnmaskError(
            f"attach() was given {method!r} for its method; give unmask.id3(budget=...), say"
        )
    model = getattr(model, "_orig_mod", model)  # what torch.compile() wraps; names are the model's
    check_unwrapped(model)
    eligible, full = find(model, include, exclude, train_fully)
    if method.include != ("*",):
        eligible = eligible.within(
            find(model, method.include)[0], f"the method's include={method.include}"
        )
    _check_free(model)
    return Tuner(model, method, steps, eligible, full, calibration, gradients, accumulation)


class Tuner:
    """One selective fine-tuning of one model: the choice, the vector, and the way back.

    model, method  as given to `attach`
    budget  the method's budget in scalars
    values  the vector, where an integration hosts the run: its optimiser is then made elsewhere,
            and the integration says which weights require a gradient and when
    chosen  whether the choice is made already, for good, and comes by `load_state_dict`
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        steps: int | None,
        eligible: Eligible,
        full: Mapping[str, nn.Parameter],
        calibration: Iterable[Any] | None,
        gradients: str,
        accumulation: int | None,
        values: Values | None = None,
        chosen: bool = False,
    ) -> None:
        self.model, self.method, self.eligible, self.full = model, method, eligible, full
        self.gradients = gradients
        self.budget = method.resolve(eligible.total, len(eligible.names))
        self.slots = Slots(eligible, self.budget, values)
        others = dict(full)  # what the optimiser trains besides
        intake = Intake(self._draft, eligible, self.slots.values, others, gradients, accumulation)
        self._driver = Driver(self.slots, intake, others)
        self._course = Course(method, self.budget)
        self.steps = steps
        self._seen: dict[int, Tensor] = {}  # what the heuristic keeps of whole tensors, if anything
        self._whole = WholeTensors(model, full, random_parts(model) if values is None else {})
        self._on_optimizer: list[Callable[[torch.optim.Optimizer], None]] = []
        hosted = self._driver.listen() if values is not None else [self._freezing()]
        kept = [heap.keep(self)] if eligible.tensors[0].is_cpu else []
        # What detach() takes back, last first.
        self._undo: list[Callable[[], object]] = [*kept, *hosted, *intake.watch()]
        if intake.streaming:
            settles = self._settled if intake.sampled else None
            self._undo += Sampler(self.slots, intake, settles).watch(model)
            self._undo += products.watch(model, eligible.tensors)
        try:
            if not chosen:
                self._calibrate(calibration)
        except BaseException:  # the model can be given to attach() again
            self.release()
            raise
        if values is None:
            # Dense gradients are the same in all, and so is what is chosen from those alone.
            agreed = gradients == "dense" and not len(self.slots) and not self._seen
            hook = Hook(self._with_others, [agreed])
            # Ahead of others, which may put something else in the place of parameters.
            self._undo.append(model.register_forward_pre_hook(hook, prepend=True).remove)
        _attached[model] = weakref.ref(self)

    def __repr__(self) -> str:
        steps = f"step {self.step}" + (f" of {self.steps}" if self.steps else "")
        return f"Tuner({self.method}, {self.active:,} scalars unmasked, {steps})"

    @property
    def steps(self) -> int | None:
        """Optimiser steps T of the schedule; settable until the first is taken."""
        return self._course.steps

    @steps.setter
    def steps(self, steps: int | None) -> None:
        self._course.lead(steps, self.step)

    @property
    def step(self) -> int:
        """Optimiser steps taken; one skipped because of a gradient that isn't finite isn't."""
        return self._driver.step

    @property
    def updates(self) -> int:
        """Scalar updates made so far, the paper's U; fully trained parameters don't count."""
        return self._driver.updates

    @property
    def active(self) -> int:
        """How many scalars were unmasked so far; fully trained parameters don't count."""
        return len(self.slots) + len(self.slots.retired)

    def selected(self) -> dict[str, Tensor]:
        """Parameter name -> sorted flat indices (int64) unmasked so far; only names with any."""
        index, _ = self.slots.touched()
        return {
            self.eligible.names[k]: index[start:stop].long() - self.eligible.offsets[k]
            for k, start, stop in self.eligible.split(index)
        }

    def optimizer(self, optimizer_class: type[torch.optim.Optimizer], **options: Any) -> Any:
        """An instance of the class over the vector of unmasked scalars and what is trained fully.

        Its state is O(budget). Any element-wise torch optimiser will do; others are refused with
        the reason.
        """
        if _tuner_of(self.model) is not self:
            raise UnmaskError(
                "this tuner is off its model, which an optimiser of it wouldn't train any more; "
                "attach() another"
            )
        if self.step and self._driver.optimizer is not None:
            raise UnmaskError(
                f"the run has an optimiser, which took {self.step} steps; go on with that one"
            )
        optimizer = self._driver.drive(optimizer_class, options)
        for callback in self._on_optimizer:
            callback(optimizer)
        return optimizer

    def report(self, loss: float) -> None:
        """Tell the strategy the training loss of a step; those that adapt to it go by this."""
        try:
            number = float(loss)
        except (TypeError, ValueError, RuntimeError):  # the last of a tensor of several
            raise UnmaskError(f"report() was given {loss!r}; give a loss, one number") from None
        self._course.report(number)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on: O(budget) and what is trained fully.

        Tensors and plain numbers only, so `torch.load(weights_only=True)` reads it.
        """
        return {
            **self._identity(),
            "steps": self.steps,
            "step": self.step,
            "updates": self.updates,
            "slots": self.slots.state_dict(),
            "seen": {self.eligible.names[k]: seen.clone() for k, seen in self._seen.items()},
            "heard": list(self._course.heard),
            **self._whole.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the tuner that gave `state`: the choice, the counts, the model's weights.

        The model may be a fresh copy of the base or hold the checkpoint's weights already; any
        other is refused, and so is a state that is damaged, with nothing changed.
        """
        steps = {} if self.steps is None else {"steps": self.steps}
        check_run(state, {**self._identity(), **steps}, self.eligible.names)
        self._whole.check(state)
        with self._whole.drawn_as(state):
            self.slots.load_state_dict(state["slots"])
        self._whole.load_state_dict(state)
        self._seen.clear()
        for k, name in enumerate(self.eligible.names):
            if name in state["seen"]:
                self._seen[k] = state["seen"][name].to(self.eligible.tensors[k].device, copy=True)
        self._course.heard, self._course.steps = tuple(state["heard"]), state["steps"]
        self._driver.step, self._driver.updates = state["step"], state["updates"]
        self._driver.intake.forget()

    def delta(self) -> Delta:
        """What the run has changed so far, O(budget): the trained scalars, the fully trained
        parameters and the normalisation statistics.

        Over fresh modules (LoRA, adapters) what was drawn at random is in it whole, trained or not,
        since a later process would draw it differently; what began as a constant isn't.
        """
        index, base = self.slots.touched()
        now = self.slots.read(index)
        sparse, before = {}, {}
        for k, start, stop in self.eligible.split(index):
            name, tensor = self.eligible.names[k], self.eligible.tensors[k]
            if name in self._whole.random:
                continue
            flat = index[start:stop].long() - self.eligible.offsets[k]
            shape = tuple(tensor.shape)
            sparse[name] = Sparse(shape, flat, now[start:stop].to(tensor.dtype))
            before[name] = Sparse(shape, flat, base[start:stop].to(tensor.dtype))
        return Delta(
            sparse=sparse,
            full={**self.full, **self._whole.random},
            buffers=self._whole.statistics(),
            base=fingerprint(before),
            info={
                "method": self.method.to_dict(),
                "budget": self.budget,
                "steps": self.steps,
                "step": self.step,
                "updates": self.updates,
                "eligible": self.eligible.total,
                "base_model_name_or_path": getattr(self.model, "name_or_path", None),
            },
        )

    def adopt(self, delta: Delta) -> None:
        """Make the delta's choice and weights the run's own, as if training had just come to them.

        The delta must be of this base and change what is eligible here; otherwise it is refused,
        with the model back at its base. The optimiser's state is no part of a delta.
        """
        if unknown := delta.sparse.keys() - set(self.eligible.names):
            raise UnmaskError(f"the delta changes {min(unknown)!r}, which isn't eligible here")
        self._revert()
        self.slots.clear()
        undo = delta.apply(self.model)
        whole = delta.full.keys() & self.eligible.parameters.keys()
        moved = {name: delta.full[name] != undo.full[name] for name in whole}
        undo.apply(self.model)
        starts = dict(zip(self.eligible.names, self.eligible.offsets, strict=False))
        chosen = [part.indices + starts[name] for name, part in delta.sparse.items()]
        chosen += [m.flatten().nonzero().flatten() + starts[n] for n, m in moved.items()]
        index = torch.cat([*chosen, torch.empty(0, dtype=torch.int64)]).sort().values
        # One share, unless the strategy lets go of scalars: then the last is current.
        for share in index.to(self.slots.index.device).split(self.budget):
            self.slots.commit(self.slots.replace(share))
        delta.apply(self.model)
        self.slots.reread()
        self._driver.intake.forget()

    def detach(self) -> Delta:
        """Take every trace of the tuner off the model, restore the base bit for bit.

        The base is what the tuner trained, as it was before; what other code has changed besides
        stays. Returns the Delta of what training had changed.
        """
        if _tuner_of(self.model) is not self:
            raise UnmaskError(
                "this tuner is off its model already; what it had changed is in the delta that its "
                "detach() returned"
            )
        delta = self.delta()
        self._revert()
        self.release()
        return delta

    # For integrations.

    def reread(self) -> None:
        """Take over what the weights are now: someone else has written to them since the step."""
        self.slots.reread()

    def release(self) -> None:
        """Take every trace of the tuner off the model but what it trained, which stays."""
        while self._undo:
            self._undo.pop()()
        self.slots.values.collect = self.slots.values.assign = None
        if _tuner_of(self.model) is self:
            del _attached[self.model]

    def trained(self) -> tuple[nn.Parameter, ...]:
        """All parameters that it may change."""
        return (*self.eligible.tensors, *self.full.values())

    def last_pass(self, last: bool) -> None:
        """Say whether the backward pass to come is the step's last (with accumulation=None)."""
        self._driver.intake.last = last

    def on_optimizer(self, callback: Callable[[torch.optim.Optimizer], None]) -> None:
        """Call back with the optimiser, now or when it is made."""
        self._on_optimizer.append(callback)
        if self._driver.optimizer is not None:
            callback(self._driver.optimizer)

    def on_detach(self, callback: Callable[[], None]) -> None:
        """Call back when the tuner is taken off the model; the last one first."""
        self._undo.append(callback)

    def _draft(self) -> Draft:
        """A draft of the step to come."""
        step, active = self.step + 1, len(self.slots)
        quota, watching = self._course.at(step, active)
        if self._course.final(active):
            self._seen.clear()  # nothing will be scored again
        return Draft(self.slots, self.method, quota, self._seen, step, watching)

    def _settled(self) -> bool:
        """Whether the step to come leaves the choice as it is, and needs no other gradients."""
        return self._course.settled(self.step + 1, len(self.slots))

    def _with_others(self, _: nn.Module, agreed: list[bool]) -> None:
        """Before a forward pass: of several processes, all must be about to train the same, and
        have it whole."""

        def state() -> list[Tensor]:
            seen = [self._seen[k] for k in sorted(self._seen)]
            return [self.slots.index, self.slots.values, *seen]

        check_whole(self.model, self.trained())
        agreed[0] = agreed[0] or check_alike(self.gradients, state)

    def _calibrate(self, batches: Iterable[Any] | None) -> None:
        """Let the heuristic look at data; choose at once where training gradients have no say."""
        heuristic, names = self.method.heuristic, self.eligible.names
        seen = heuristic.calibrate(self.model, self.eligible.parameters, batches)
        self._seen |= {k: seen[name] for k, name in enumerate(names) if name in seen}
        if not (heuristic.uses_gradient or self.method.strategy.needs_steps):
            self._driver.intake.change = self._draft().change
            self._driver.commit()
            if self.method.strategy.once:
                self._seen.clear()

    def _freezing(self) -> Callable[[], None]:
        """Freeze what isn't trained; returns what takes that back, gradients included."""
        trained = {id(p) for p in self.trained()}
        before = [(p, p.requires_grad) for p in self.model.parameters() if p.is_floating_point()]
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in trained)

        def restore() -> None:
            for parameter, flag in before:
                parameter.requires_grad_(flag)
                parameter.grad = None

        return restore

    def _revert(self) -> None:
        """Give the model the weights it had before training."""
        self.slots.write(*self.slots.touched())
        self._whole.revert()

    def _identity(self) -> dict[str, Any]:
        """What two runs must have in common for one to go on with the other's state."""
        method = json.dumps(self.method.to_dict(), sort_keys=True)
        return {"scalars": self.eligible.total, "budget": self.budget, "method": method}


def _tuner_of(model: nn.Module) -> Tuner | None:
    held = _attached.get(model)
    return None if held is None else held()


def _check_free(model: nn.Module) -> None:
    """Refuse a model that another tuner has already, or a part of it."""
    own = {id(parameter) for parameter in model.parameters()}
    for other in map(_tuner_of, list(_attached)):
        if other is not None and any(id(p) in own for p in other.trained()):
            where = "model" if other.model is model else "model shares parameters with one that"
            raise UnmaskError(f"this {where} has a tuner already; call that tuner's detach() first")
