"""Heuristics of gradients over several steps, each with what remembering costs.

N counts the eligible scalars. What is remembered is part of checkpoints, so resume is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from unmask.allot import up
from unmask.errors import UnmaskError
from unmask.heuristics.base import Heuristic, Scalars, Whole, needs_gradient
from unmask.heuristics.formulas import Gradient

__all__ = ["Accumulated", "Candidates", "Cover", "Smoothed"]

KINDS = ("score", "gradient")


@dataclass(frozen=True)
class Smoothed(Heuristic):
    """S_t = decay·S_{t-1} + (1 - decay)·H_t, an exponential mean of another heuristic's scores.

    of="gradient" smooths the gradient instead (a momentum) and scores that: opposite gradients then
    cancel. Memory: 4 bytes x N, twice that during a step; no form in O(B) is known. Every step
    reads all gradients.
    """

    memory: ClassVar[str] = "4 bytes x N for the running mean"
    inner: Heuristic = field(default_factory=Gradient)
    decay: float = 0.9
    of: str = "score"

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_gradient(self.inner, self)
        if not 0 <= self.decay < 1:
            raise UnmaskError(f"Smoothed was asked for decay={self.decay}; it is from 0 to below 1")
        _one_of(self, self.of)

    def observe(self, kept: Tensor | None, whole: Whole) -> Tensor | None:
        now = _news(self.inner, self.of, whole) * (1 - self.decay)
        return now if kept is None else kept * self.decay + now

    def score(self, s: Scalars) -> Tensor:
        return _judged(self.inner, self.of, s)


@dataclass(frozen=True)
class Accumulated(Heuristic):
    """S_t = H_1 + ... + H_t, the sum of another heuristic's scores over all steps so far.

    of="gradient" sums the gradients instead and scores the sum: opposite ones then cancel.
    Memory: 4 bytes x N, twice that during a step; `Candidates` is the form in O(B) for a short
    window. Every step reads all gradients.
    """

    memory: ClassVar[str] = "4 bytes x N for the running sum"
    inner: Heuristic = field(default_factory=Gradient)
    of: str = "score"

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_gradient(self.inner, self)
        _one_of(self, self.of)

    def observe(self, kept: Tensor | None, whole: Whole) -> Tensor | None:
        now = _news(self.inner, self.of, whole)
        return now if kept is None else kept + now

    def score(self, s: Scalars) -> Tensor:
        return _judged(self.inner, self.of, s)


@dataclass(frozen=True)
class Candidates(Heuristic):
    """H(θ) = |Σ ∇θ| over a window of steps, for each tensor's best candidates only: SpIEL-AG.

    At steps 1, 1 + every, ... a window opens: of each tensor of n scalars the ⌈n·B/N⌉ of largest
    |∇θ| become candidates, and for `window` steps their gradients are summed. All others score 0.
    Memory: 16 bytes x B. Steps outside a window need no gradient but that of what is trained.
    Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", arXiv 2401.16405.
    """

    memory: ClassVar[str] = "16 bytes x B for the candidates"
    window: int = 5
    every: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.window <= self.every:
            raise UnmaskError(
                f"Candidates was asked for window={self.window}, every={self.every}; "
                "window is from 1 to every"
            )

    def watches(self, step: int) -> bool:
        return (step - 1) % self.every < self.window

    def observe(self, kept: Tensor | None, whole: Whole) -> Tensor | None:
        grad = whole.grad.reshape(-1)
        if (step := (whole.step - 1) % self.every) and kept is not None:
            flat = kept[0].long()
        elif step:
            return None  # joined in the middle of a window
        else:
            count = min(len(grad), up(len(grad) * whole.share))
            flat = _largest(grad.abs(), count)
        # Indices up to 2^53 are exact in float64, so both rows can be one tensor.
        now = torch.stack([flat.double(), grad[flat].double()])
        return now if kept is None or not step else torch.stack([now[0], kept[1] + now[1]])

    def survey(self, kept: Tensor | None, whole: Whole) -> Tensor | None:
        sums = torch.zeros(whole.theta.numel(), device=whole.theta.device)
        if kept is not None:
            sums[kept[0].long()] = kept[1].float()
        return sums

    def score(self, s: Scalars) -> Tensor:
        assert s.seen is not None
        return s.seen.abs()


@dataclass(frozen=True)
class Cover(Heuristic):
    """H(θ_ij) = √(r_i·c_j), SM3's cover of the summed squared gradients by rows and columns:
    SpIEL-MA.

    With ν_ij = min(r_i, c_j) + ∇θ_ij²: r_i = max_j ν_ij, c_j = max_i ν_ij, from zero on, at every
    step. Dimensions behind the first are columns. Memory: 4 bytes x (rows + columns) of every
    tensor. Every step reads all gradients.
    Source: Ansell et al., arXiv 2401.16405; Anil et al., "Memory-Efficient Adaptive Optimization",
    NeurIPS 2019, arXiv 1901.11150.
    """

    memory: ClassVar[str] = "4 bytes x (rows + columns) of every tensor"

    def observe(self, kept: Tensor | None, whole: Whole) -> Tensor | None:
        cover = whole.matrix.square()
        if not cover.numel():
            return None
        if kept is not None:
            rows, columns = kept.split(tuple(cover.shape))
            cover = torch.minimum(rows[:, None], columns[None, :]) + cover
        return torch.cat([cover.amax(1), cover.amax(0)])

    def survey(self, kept: Tensor | None, whole: Whole) -> Tensor | None:
        shape = tuple(whole.matrix.shape)
        if kept is None:
            return torch.zeros(shape, device=whole.theta.device)
        rows, columns = kept.sqrt().split(shape)
        return torch.outer(rows, columns)

    def score(self, s: Scalars) -> Tensor:
        assert s.seen is not None
        return s.seen


def _largest(values: Tensor, count: int) -> Tensor:
    """Sorted indices of the `count` largest, of equals the first."""
    least = values.topk(count, sorted=False).values.min() if count else values.new_tensor(math.inf)
    above, tied = values > least, (values == least).nonzero().squeeze(1)
    above[tied[: count - int(above.sum())]] = True
    return above.nonzero().squeeze(1)


def _one_of(asking: Heuristic, of: str) -> None:
    if of not in KINDS:
        raise UnmaskError(f"{type(asking).__name__} was asked for of={of!r}; it is one of {KINDS}")


def _news(inner: Heuristic, of: str, whole: Whole) -> Tensor:
    """What one step adds: the inner heuristic's scores, or the gradients, 1-D in float32."""
    theta, grad = (t.detach().reshape(-1).float() for t in (whole.theta, whole.grad))
    if of == "gradient":
        return grad
    return inner.score(Scalars(theta, grad, whole.name, whole.offset, range(len(theta)))).float()


def _judged(inner: Heuristic, of: str, s: Scalars) -> Tensor:
    if s.seen is None:  # nothing was observed yet
        return torch.zeros_like(s.theta)
    if of == "score":
        return s.seen
    return inner.score(Scalars(s.theta, s.seen, s.name, s.offset, s.flat))
