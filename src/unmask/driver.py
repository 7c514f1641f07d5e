"""An optimiser of the user's class, driven over the vector of values: choose, step, write back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from unmask import elementwise
from unmask.errors import UnmaskWarning
from unmask.intake import Intake
from unmask.slots import Slots


class Driver:
    """Ties `slots` and `intake` to one optimiser.

    step     optimiser steps taken; one that was skipped doesn't count
    updates  scalar updates made so far, the paper's U
    """

    def __init__(self, slots: Slots, intake: Intake, full: Mapping[str, nn.Parameter]) -> None:
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

    def commit(self) -> None:
        """Put the step's choice into force."""
        change, self.intake.change = self.intake.change, None
        if change is not None:
            reused = self.slots.commit(change)
            for key, state in self._state().items():  # a reused slot starts as a new one
                state[reused] = self._empty_state.get(key, 0.0)

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.intake.used:  # as with any optimiser, stepping again means the same gradients again
            self.intake.forget()
        self._stepping, self._skipped = True, False
        try:
            result = step(*args, **kwargs)
        finally:
            self._stepping = False
        if self.intake.used:
            self.slots.write_back()
            self.step += 1
            self.updates += len(self.slots)
        return result

    def _read_gradient(self) -> Tensor | None:
        """What `values.grad` is: collected from the model, and in force once the optimiser asks."""
        gradient = self.intake.collect()
        if gradient is None or not self._stepping:
            return gradient
        if self.intake.bad is not None:
            self._skip()
            return None
        self.commit()
        self.intake.used = True
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
