"""An optimiser of the user's class, driven over the vector of values: choose, step, write back."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from unmask import elementwise
from unmask.errors import UnmaskWarning
from unmask.intake import Intake
from unmask.slots import Slots


class Driver:
    """Ties `slots` and `intake` to one optimiser.

    step     optimiser steps taken; one that was skipped doesn't count
    updates  scalar updates made so far, the paper's U
    """

    def __init__(self, slots: Slots, intake: Intake, full: dict[str, nn.Parameter]) -> None:
        self.slots, self.intake, self.full = slots, intake, full
        self.step = self.updates = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self._empty_state: dict[str, float] = {}  # what the optimiser keeps of an empty slot
        self._stepping = False  # within the optimiser's step
        self._skipped = False  # whether that step was refused
        slots.values.collect, slots.values.assign = self._read_gradient, self._write_gradient

    def drive(self, optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]) -> Any:
        """An instance of the class whose `step` and `zero_grad` mean the model's own weights."""
        self._empty_state = elementwise.check(optimizer_class, options)
        optimizer = optimizer_class([self.slots.values, *self.full.values()], **options)
        step = type(optimizer).step

        # Step hooks would not do: they never hear of a step that failed.
        def stepping(this: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self._step(step, this, *args, **kwargs)

        optimizer.step = MethodType(stepping, optimizer)  # type: ignore[method-assign]
        optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]
        self.optimizer = optimizer
        return optimizer

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Drive an optimiser made elsewhere; what else it trains counts as trained fully."""
        known = inspect.signature(type(optimizer)).parameters
        options = {k: v for k, v in optimizer.defaults.items() if k in known}
        self._empty_state = elementwise.check(type(optimizer), options)
        others = [p for p in _trained(optimizer) if p is not self.slots.values]
        self.full.clear()
        self.full.update({f"parameter {i} of the optimiser": p for i, p in enumerate(others)})
        self.optimizer = optimizer

    def listen(self) -> list[Callable[[], None]]:
        """Adopt whichever optimiser steps the vector, whoever made it; returns what ends that."""
        driver = weakref.ref(self)  # the hooks are global, and must not keep a model alive

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            this = driver()
            if this is not None and any(p is this.slots.values for p in _trained(optimizer)):
                if optimizer is not this.optimizer:
                    this.adopt(optimizer)
                this._before_step()
                if len(args) < 2 and kwargs.get("closure") is None:
                    _ = this.slots.values.grad  # should the step be skipped, then for all it trains

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            this = driver()
            if this is not None and optimizer is this.optimizer:
                this._stepping = False
                this._after_step()

        return [
            register_optimizer_step_pre_hook(before).remove,
            register_optimizer_step_post_hook(after).remove,
        ]

    def commit(self) -> None:
        """Put the step's choice into force."""
        change = self.intake.settle()
        if change is not None:
            reused = self.slots.commit(change)
            for key, state in self._state().items():  # a reused slot starts as a new one
                state[reused] = self._empty_state.get(key, 0.0)

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._before_step()
        try:
            result = step(*args, **kwargs)
        finally:
            self._stepping = False
        self._after_step()
        return result

    def _before_step(self) -> None:
        if self.intake.used:  # as with any optimiser, stepping again means the same gradients again
            self.intake.forget()
        self._stepping, self._skipped = True, False

    def _after_step(self) -> None:
        if self.intake.used:
            self.slots.write_back()
            self.step += 1
            self.updates += len(self.slots)

    def _read_gradient(self) -> Tensor | None:
        """What `values.grad` is: collected from the model, and in force once the optimiser asks."""
        if self._stepping and self.intake.in_use:
            return self.intake.gradient
        gradient = self.intake.collect()
        if gradient is None or not self._stepping:
            return gradient
        if self.intake.bad is not None:
            self._skip()
            return None
        self.commit()
        self.intake.use()
        return gradient

    def _skip(self) -> None:
        """Refuse this step: no gradient for anyone, so the optimiser leaves everything alone."""
        if not self._skipped:
            warnings.warn(
                f"step {self.step + 1} was skipped: the gradient of {self.intake.bad} is not "
                "finite; nothing was changed. If it recurs, lower the learning rate or look at "
                "the batch",
                UnmaskWarning,
                stacklevel=2,
            )
        self._skipped = True
        for parameter in self.full.values():
            parameter.grad = None

    def _write_gradient(self, gradient: Tensor | None) -> None:
        """`values.grad = x`: None clears the model's gradients, a tensor replaces the collected."""
        if gradient is not None:
            self.intake.gradient.copy_(gradient)
            return
        self.intake.forget()
        for parameter in self.slots.eligible.tensors:
            parameter.grad = None

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all that is trained, in the model and out of it."""
        self.intake.forget()
        for parameter in (*self.slots.eligible.tensors, *self.full.values()):
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad = parameter.grad.detach().zero_()

    def _state(self) -> dict[str, Tensor]:
        """What the optimiser keeps of the vector, entry for entry."""
        values = self.slots.values
        state = {} if self.optimizer is None else self.optimizer.state.get(values, {})
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == values.shape}


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])
