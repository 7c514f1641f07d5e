"""What a heuristic is, and what it gets to see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unmask.errors import UnmaskError
from unmask.part import Part

__all__ = ["Heuristic", "Scalars", "Whole"]


@dataclass(frozen=True, eq=False)
class Scalars:
    """Some scalars of one parameter, as `score` sees them; all tensors are 1-D, one entry each.

    theta   the weights, float32 whatever the model's dtype
    grad    their gradients, float32; zeros for a parameter that got none, or when the heuristic
            has `uses_gradient = False`
    name    the parameter's name
    offset  global index of the parameter's first scalar
    flat    the scalars' flat indices in the parameter: a range for a run of them, or int64
    seen    what `survey` made of each of them (by default, what the heuristic keeps), or None
    """

    theta: Tensor
    grad: Tensor
    name: str
    offset: int
    flat: range | Tensor
    seen: Tensor | None = None

    @property
    def index(self) -> Tensor:
        """The scalars' global indices in the model, int64."""
        if isinstance(self.flat, range):
            start, stop = self.flat.start + self.offset, self.flat.stop + self.offset
            return torch.arange(start, stop, device=self.theta.device)
        return self.flat + self.offset


@dataclass(frozen=True, eq=False)
class Whole:
    """A whole parameter at a step, in its own shape and dtype, as `observe` and `survey` see it.

    grad    its gradient; zeros if it got none, or in `survey` with `uses_gradient = False`
    step    the optimiser step, 1 is the first
    share   budget / eligible scalars
    offset  global index of the parameter's first scalar
    """

    theta: Tensor
    grad: Tensor
    name: str
    step: int
    share: float
    offset: int = 0

    @property
    def matrix(self) -> Tensor:
        """The gradient in float32, with everything behind the first dimension as columns."""
        grad = self.grad.float()
        height = len(grad) if grad.ndim else 1
        return grad.reshape(height, grad.numel() // max(1, height))


class Heuristic(Part, ABC):
    """One number a scalar, of its weight and gradient alone: `score` may be called on any piece of
    a parameter, and must give a scalar the same number in every piece.

    Three optional hooks, each a whole parameter at a time, give `score` more to go by in `s.seen`:
    `calibrate` looks at data before training, `observe` at each step's gradients, and `survey` at
    the parameter that is about to be scored.
    """

    uses_gradient: ClassVar[bool] = True
    memory: ClassVar[str] = ""  # what it keeps beyond the budget, for the listing of methods

    @abstractmethod
    def score(self, s: Scalars) -> Tensor:
        """Scores of the given scalars, float32, same shape as `s.theta`."""

    def power_law(self) -> tuple[float, float] | None:
        """(exp, eps) if the score is |g| / (|θ| + eps)^exp: lets kernels skip what can't matter."""
        return None

    def calibrate(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batches: Iterable[Any] | None,
    ) -> dict[str, Tensor]:
        """Before training: what the heuristic keeps of the parameters, by name; nothing by default.
        The model must be left bit for bit as it was."""
        return {}

    def watches(self, step: int) -> bool:
        """Whether `observe` wants this step's gradients, also if nothing is chosen at it; by
        default, every step's if `observe` is overridden."""
        return type(self).observe is not Heuristic.observe

    def observe(self, kept: Tensor | None, whole: Whole) -> Tensor | None:
        """At a watched step, before any score: what to keep of the parameter from now on, given
        what was kept so far, which must stay as it is. Any tensor will do. It takes its memory as
        long as the run, and is part of checkpoints."""
        return kept

    def survey(self, kept: Tensor | None, whole: Whole) -> Tensor | None:
        """What `s.seen` is for the parameter's scalars, of as many entries, just before they are
        scored and only for as long; by default, what is kept."""
        return kept


def needs_gradient(inner: Heuristic, outer: Heuristic) -> None:
    """Refuse a heuristic that can't be wrapped: its score must be of θ and ∇θ alone."""
    plain = isinstance(inner, Heuristic) and all(
        getattr(type(inner), hook) is getattr(Heuristic, hook)
        for hook in ("calibrate", "observe", "survey")
    )
    if not (plain and inner.uses_gradient):
        raise UnmaskError(
            f"{type(outer).__name__} was asked for inner={inner!r}; give it a heuristic of the "
            "weight and the gradient alone: D3, Gradient, SquaredGradient, Taylor, one of your own"
        )
