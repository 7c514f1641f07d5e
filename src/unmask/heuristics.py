"""How much a scalar matters: score(scalars) -> one float32 number each, the higher the better."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unmask.errors import UnmaskError

# Exponents for which float32 `**` is multiplications, divisions and square roots. Others go through
# float64, so that a score never depends on how a device or a vector's tail rounds its pow().
EXACT_POWERS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)

__all__ = ["D3", "Gradient", "Heuristic", "Magnitude", "Random", "Scalars"]


@dataclass(frozen=True, eq=False)
class Scalars:
    """Some scalars of one parameter, as a heuristic sees them; all tensors are 1-D, one entry each.

    theta   the weights, float32 whatever the model's dtype
    grad    their gradients, float32; zeros for a parameter that got none, or when the heuristic
            has `uses_gradient = False`
    name    the parameter's name
    offset  global index of the parameter's first scalar
    flat    the scalars' flat indices in the parameter: a range for a run of them, or int64
    seen    what the heuristic keeps of each of them (see `calibrate`, `observe`), or None
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


class Heuristic(ABC):
    """One number a scalar, of its weight and gradient alone: `score` may be called on any piece of
    a parameter, and must give a scalar the same number in every piece."""

    uses_gradient: ClassVar[bool] = True

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
        """Before training: what `score` will find in `s.seen`, by parameter name, float32 and of the
        parameters' shapes; nothing by default. The model must be left bit for bit as it was."""
        return {}

    def observe(self, seen: Tensor | None, theta: Tensor, grad: Tensor) -> Tensor | None:
        """During training: the new `s.seen` of a parameter whose gradient has come, all 1-D.

        Called once a step and parameter, before `score`; what it returns is O(N) memory, kept between
        steps and in checkpoints, so only heuristics with a memory override it.
        """
        return seen


@dataclass(frozen=True)
class D3(Heuristic):
    """H(θ) = |∇θ| / (|θ| + ε)^exp: dynamic magnitude and gradient, Equation 1 of the ID3 paper.

    exp = 0 is |∇θ|; exp > 0 prefers small weights, exp < 0 large ones; any real exp, any ε > 0.
    Source: Agarwal et al., "Step-by-Step Unmasking", TACL 2025, arXiv 2408.14470.

    >>> D3(exp=1.0, eps=0.5).power_law()
    (1.0, 0.5)
    """

    exp: float = 2.0
    eps: float = 1.0

    def __post_init__(self) -> None:
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
    """H(θ) = |∇θ|, the limit exp = 0 of D3."""

    def score(self, s: Scalars) -> Tensor:
        return s.grad.abs()

    def power_law(self) -> tuple[float, float] | None:
        return 0.0, 1.0


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
class Random(Heuristic):
    """H(θ) uniform in [0, 1), a hash of the seed and the scalar's global index: the same on every
    device and for every number of threads, without a random state."""

    uses_gradient: ClassVar[bool] = False
    seed: int = 0

    def score(self, s: Scalars) -> Tensor:
        # The finaliser of splitmix64 in wrapping int64 arithmetic; shifts are made logical by masks.
        x = (s.index + self.seed * 0x2545F4914F6CDD1D % (1 << 62)) * -7046029254386353131
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
        x = x ^ ((x >> 31) & ((1 << 33) - 1))
        return ((x >> 40) & ((1 << 24) - 1)).to(torch.float32) / (1 << 24)
