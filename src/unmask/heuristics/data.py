"""Heuristics of batches that are looked at before training: `attach(..., calibration=)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unmask.calibrate import fisher, given, mean_gradient
from unmask.errors import UnmaskError
from unmask.heuristics.base import Heuristic, Scalars, needs_gradient
from unmask.heuristics.formulas import Taylor
from unmask.rehearse import full_training, gated_training

__all__ = ["Calibrated", "DiffPruning", "Fisher", "Movement"]

Parameters = Mapping[str, nn.Parameter]
Batches = Iterable[Any] | None


class _OfData(Heuristic):
    """Scores what `calibrate` found, and needs no gradient from then on."""

    uses_gradient: ClassVar[bool] = False

    def score(self, s: Scalars) -> Tensor:
        assert s.seen is not None
        return s.seen


@dataclass(frozen=True)
class Fisher(_OfData):
    """H(θ) = 1/n Σ_k (∇θ log p(y_k | x_k))²: the diagonal of the Fisher information over n samples.

    num_samples  n at the most; a sample is one row of a batch, and goes through the model alone
    sample_type  "label": y_k is the data's (the empirical Fisher); "model": drawn from p(· | x_k)
    grad_type    "square", or "absolute" for the mean of |∇θ log p|
    seed         of the labels drawn

    In evaluation mode, without dropout. Of a sequence, log p is the mean over its labelled
    positions. Memory before training: 8 bytes x N, for a gradient and the sum.
    Source: Sung et al., "Training Neural Networks with Fixed Sparse Masks", NeurIPS 2021,
    arXiv 2111.09839.
    """

    memory: ClassVar[str] = "before training, 8 bytes x N"
    num_samples: int = 1024
    sample_type: str = "label"
    grad_type: str = "square"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise UnmaskError(
                f"Fisher was asked for num_samples={self.num_samples}; it is 1 or more"
            )
        _allowed(self, "sample_type", ("label", "model"))
        _allowed(self, "grad_type", ("square", "absolute"))

    def calibrate(
        self, model: nn.Module, parameters: Parameters, batches: Batches
    ) -> dict[str, Tensor]:
        data = given(batches, self)
        measure = torch.square if self.grad_type == "square" else torch.abs
        sampled = self.sample_type == "model"
        return fisher(model, parameters, data, self.num_samples, sampled, measure, self.seed)


@dataclass(frozen=True)
class Calibrated(_OfData):
    """H(θ) = another heuristic's score with ∇θ the mean gradient of the calibration batches, before
    training, in place of the first batch's.

    Memory before training: 8 bytes x N, for a gradient and the sum; 4 bytes x N until it is chosen.
    """

    memory: ClassVar[str] = "before training, 8 bytes x N"
    inner: Heuristic = field(default_factory=Taylor)

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_gradient(self.inner, self)

    def calibrate(
        self, model: nn.Module, parameters: Parameters, batches: Batches
    ) -> dict[str, Tensor]:
        return mean_gradient(model, parameters, given(batches, self))

    def score(self, s: Scalars) -> Tensor:
        assert s.seen is not None
        return self.inner.score(Scalars(s.theta, s.seen, s.name, s.offset, s.flat))


@dataclass(frozen=True)
class Movement(_OfData):
    """H(θ) = |θ_full - θ_0|: how far full fine-tuning on the calibration batches moves it, after
    which the model is rewound bit for bit (a lottery ticket).

    optimizer, lr  of the full training, by its name in torch.optim; constant learning rate
    passes         over the calibration batches

    Memory before training: full fine-tuning's and two copies of the weights, 28 bytes x N with
    AdamW.
    Source: Ansell et al., "Composable Sparse Fine-Tuning", ACL 2022, arXiv 2110.07560.
    """

    memory: ClassVar[str] = "before training, full fine-tuning's (28 bytes x N with AdamW)"
    optimizer: str = "AdamW"
    lr: float = 5e-5
    passes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = getattr(torch.optim, self.optimizer, None)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise UnmaskError(
                f"Movement was asked for optimizer={self.optimizer!r}; give the name of one in "
                "torch.optim, AdamW or SGD say"
            )
        _positive(self, "lr", "passes")

    def calibrate(
        self, model: nn.Module, parameters: Parameters, batches: Batches
    ) -> dict[str, Tensor]:
        kind, data = getattr(torch.optim, self.optimizer), given(batches, self)
        weight = torch.zeros(2)
        weight.grad = torch.zeros(2)
        try:  # on any vector: one may take matrices only, or call the model several times a step
            kind([weight], lr=self.lr).step()
        except (TypeError, ValueError, RuntimeError) as problem:
            raise UnmaskError(
                f"Movement can't train by torch.optim.{self.optimizer}: {problem}; AdamW or SGD do"
            ) from problem
        return full_training(
            model, parameters, data, self.passes, lambda masters: kind(masters, lr=self.lr)
        )


@dataclass(frozen=True)
class DiffPruning(_OfData):
    """H(θ) = |z·w| after training θ_0 + z⊙w on the calibration batches with an L0 penalty on the
    gates z, which are hard concrete variables; then the model is rewound bit for bit.

    lr, gate_lr  AdamW's for w and for z
    penalty      on the expected number of open gates, added to the loss
    passes       over the calibration batches
    seed         of the gates' noise

    Memory before training: 60 bytes x N.
    Source: Guo et al., "Parameter-Efficient Transfer Learning with Diff Pruning", ACL 2021,
    arXiv 2012.07463.
    """

    memory: ClassVar[str] = "before training, 60 bytes x N"
    lr: float = 5e-5
    gate_lr: float = 0.1
    penalty: float = 1.25e-7
    passes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "lr", "gate_lr", "passes")

    def calibrate(
        self, model: nn.Module, parameters: Parameters, batches: Batches
    ) -> dict[str, Tensor]:
        return gated_training(
            model,
            parameters,
            given(batches, self),
            self.passes,
            self.lr,
            self.gate_lr,
            self.penalty,
            self.seed,
        )


def _allowed(asking: Heuristic, name: str, values: tuple[str, ...]) -> None:
    if getattr(asking, name) not in values:
        raise UnmaskError(
            f"{type(asking).__name__} was asked for {name}={getattr(asking, name)!r}; "
            f"it is one of {', '.join(values)}"
        )


def _positive(asking: Heuristic, *names: str) -> None:
    for name in names:
        if not getattr(asking, name) > 0:
            raise UnmaskError(
                f"{type(asking).__name__} was asked for {name}={getattr(asking, name)!r}; "
                "it is above 0"
            )
