"""What each step of a run does to the choice, by the method and by what was reported so far."""

from __future__ import annotations

from unmask.errors import UnmaskError
from unmask.method import Method
from unmask.strategies import Quota

__all__ = ["Course"]


class Course:
    """A method's schedule over one run.

    steps  optimiser steps T, once that is known
    heard  what the strategy keeps of the reported losses
    """

    def __init__(self, method: Method, budget: int) -> None:
        self.method, self.budget = method, budget
        self.steps: int | None = None
        self.heard: tuple[float, ...] = ()

    def lead(self, steps: int | None, taken: int) -> None:
        """Set the number of steps, of which some may be `taken` already; then it can't change."""
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
            raise UnmaskError(f"steps={steps!r}; steps is a whole number of optimiser steps")
        if steps is not None and steps < 1:
            raise UnmaskError(f"steps={steps}; give the number of optimiser steps, 1 or more")
        if taken and steps != self.steps:
            raise UnmaskError(
                f"steps can't change from {self.steps} to {steps} after {taken} steps were "
                "taken; set it before the first"
            )
        self.steps = steps

    def report(self, loss: float) -> None:
        """Let the strategy hear the training loss of a step."""
        self.heard = self.method.strategy.hear(self.heard, loss)

    def at(self, step: int, active: int) -> tuple[Quota, bool]:
        """What happens at a step with `active` scalars chosen, and whether the heuristic watches
        its gradients."""
        strategy = self.method.strategy.hearing(self.heard)
        if self.steps is None and strategy.needs_steps:
            raise UnmaskError(
                f"{type(strategy).__name__} needs the number of optimiser steps of the run; give "
                "steps= to attach() or UnmaskConfig(), or set tuner.steps before the first step"
            )
        quota = strategy.quota(step, active, self.budget, self.steps)
        return quota, not self.final(active) and self.method.heuristic.watches(step)

    def settled(self, step: int, active: int) -> bool:
        """Whether a step leaves the choice as it is, and needs no other gradients."""
        if self.steps is None and self.method.strategy.needs_steps:
            return False
        quota, watching = self.at(step, active)
        return not (watching or any(quota))

    def final(self, active: int) -> bool:
        """Whether the choice is made for good."""
        return self.method.strategy.once and active == self.budget
