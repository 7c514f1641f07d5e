"""Heuristics of what is at hand at the step: the weight, its gradient, its place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor

from unmask.errors import UnmaskError
from unmask.heuristics.base import Heuristic, Scalars, Whole

__all__ = [
    "D3",
    "Biases",
    "Gradient",
    "Magnitude",
    "Principal",
    "Random",
    "SquaredGradient",
    "Taylor",
]

# Exponents for which float32 `**` is multiplications, divisions and square roots. Others go through
# float64, so that a score never depends on how a device or a vector's tail rounds its pow().
EXACT_POWERS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)


@dataclass(frozen=True)
class D3(Heuristic):
    """H(θ) = |∇θ| / (|θ| + ε)^exp: dynamic magnitude and gradient, Equation 1 of the ID3 paper.

    exp = 0 is `Gradient`; exp > 0 prefers small weights, exp < 0 large ones, and exp = -1 with
    ε -> 0 is `Taylor`; any real exp, any ε > 0.
    Source: Agarwal et al., "Step-by-Step Unmasking", TACL 2025, arXiv 2408.14470.

    >>> D3(exp=1.0, eps=0.5).power_law()
    (1.0, 0.5)
    """

    exp: float = 2.0
    eps: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.exp):
            raise UnmaskError(f"D3 was asked for exp={self.exp}; exp is any finite real number")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise UnmaskError(f"D3 was asked for eps={self.eps}; eps is any finite number above 0")

    def score(self, s: Scalars) -> Tensor:
        base = s.theta.abs() + self.eps
        if self.exp in EXACT_POWERS:
            return s.grad.abs() / base**self.exp
        return s.grad.abs() / (base.double() ** self.exp).float()

    def power_law(self) -> tuple[float, float] | None:
        return self.exp, self.eps


@dataclass(frozen=True)
class Gradient(Heuristic):
    """H(θ) = |∇θ|, which is D3 with exp = 0."""

    def score(self, s: Scalars) -> Tensor:
        return s.grad.abs()

    def power_law(self) -> tuple[float, float] | None:
        return 0.0, 1.0


@dataclass(frozen=True)
class SquaredGradient(Heuristic):
    """H(θ) = ∇θ²: the empirical Fisher information when accumulated over batches of one sample.

    At one step it is the order of |∇θ| from 1.1e-19 to 1.8e19; float32 holds no smaller square in
    full, and no larger one at all.
    """

    def score(self, s: Scalars) -> Tensor:
        return s.grad.square()


@dataclass(frozen=True)
class Taylor(Heuristic):
    """H(θ) = |θ·∇θ|: to first order, how much the loss changes when θ is set to zero (SNIP).

    Source: Molchanov et al., ICLR 2017, arXiv 1611.06440; Lee et al., "SNIP", ICLR 2019,
    arXiv 1810.02340.
    """

    def score(self, s: Scalars) -> Tensor:
        return (s.theta * s.grad).abs()


@dataclass(frozen=True)
class Magnitude(Heuristic):
    """H(θ) = -|θ| (smallest first, PaFi) or |θ| (largest first); needs no gradient.

    Source: Liao et al., "Parameter-Efficient Fine-Tuning without Introducing New Latency",
    ACL 2023, arXiv 2305.16742 (smallest).
    """

    uses_gradient: ClassVar[bool] = False
    largest: bool = False

    def score(self, s: Scalars) -> Tensor:
        return s.theta.abs() if self.largest else -s.theta.abs()


@dataclass(frozen=True)
class Principal(Heuristic):
    """H(θ) = |W_r|, W_r the nearest matrix of rank r to W, as W is when scored: principal weights.

    W_r = W·V·Vᵀ with V the r leading eigenvectors of WᵀW (of WWᵀ where that is smaller), in
    float64. Dimensions behind the first are columns; a vector is its own nearest matrix. Memory
    for the length of a choice: W_r and the eigenvectors of one tensor at a time.
    Source: Liu et al., "LIFT the Veil for the Truth", ICML 2025, arXiv 2506.00772.
    """

    uses_gradient: ClassVar[bool] = False
    rank: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UnmaskError(f"Principal was asked for rank={self.rank}; rank is 1 or more")

    def survey(self, kept: Tensor | None, whole: Whole) -> Tensor | None:
        theta: Tensor = whole.theta
        if theta.ndim < 2 or self.rank >= min(len(theta), theta.numel() // max(1, len(theta))):
            return theta.float()
        w = theta.reshape(len(theta), -1).double()
        wide = len(w) < w.shape[1]
        space = torch.linalg.eigh(w @ w.T if wide else w.T @ w).eigenvectors[:, -self.rank :]
        near: Tensor = space @ (space.T @ w) if wide else (w @ space) @ space.T
        return near.float().reshape(theta.shape)

    def score(self, s: Scalars) -> Tensor:
        assert s.seen is not None
        return s.seen.abs()


@dataclass(frozen=True)
class Biases(Heuristic):
    """H(θ) = 1 in parameters whose names match `pattern`, 0 elsewhere: these first, the rest after.

    To have biases only, narrow the method's `include` instead, as `bitfit` does.
    Source: Ben Zaken et al., "BitFit", ACL 2022, arXiv 2106.10199.
    """

    uses_gradient: ClassVar[bool] = False
    pattern: str = "*bias"

    def score(self, s: Scalars) -> Tensor:
        return torch.full_like(s.theta, float(fnmatchcase(s.name, self.pattern)))


@dataclass(frozen=True)
class Random(Heuristic):
    """H(θ) uniform in [0, 1), a hash of the seed and the scalar's global index: the same on every
    device and for every number of threads, without a random state."""

    uses_gradient: ClassVar[bool] = False
    seed: int = 0

    def score(self, s: Scalars) -> Tensor:
        # The finaliser of splitmix64 in wrapping int64 arithmetic; shifts are made logical by
        # masks.
        x = (s.index + self.seed * 0x2545F4914F6CDD1D % (1 << 62)) * -7046029254386353131
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
        x = x ^ ((x >> 31) & ((1 << 33) - 1))
        return ((x >> 40) & ((1 << 24) - 1)).to(torch.float32) / (1 << 24)
