"""Batches -> statistics that some heuristics need before training.

Everything here leaves the model bit for bit as it found it: weights, buffers, modes, gradients and
the random state. Gradients are taken with `torch.autograd.grad`, so no `.grad` and no hook is
touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unmask.batches import loss_of, loss_of_drawn, moved, samples
from unmask.errors import UnmaskError

__all__ = ["Calibration", "Progress"]

Parameters = Mapping[str, nn.Parameter]
Statistics = dict[str, Tensor]


class Progress(Protocol):
    """Hears how far a calibration is."""

    def __call__(self, done: int, total: int | None) -> None:
        """`done` samples or batches are behind us, of `total` if that is known."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches, with what can't be guessed from them; `attach(calibration=)` takes it or the
    batches.

    batches   a mapping is given to the model as keywords and the output's `.loss` is used; of a
              tuple the last entry is the target (cross-entropy for whole numbers, else the squared
              error)
    loss      what to use instead: loss(model, batch) -> a tensor of one number
    progress  called as progress(done, total) along the way
    """

    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if not any(hasattr(self.batches, name) for name in ("__iter__", "__getitem__")):
            raise UnmaskError(
                f"calibration={self.batches!r}; give an iterable of the batches that you train with"
            )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss of a batch."""
        return (self.loss or loss_of)(model, batch)

    def tell(self, done: int, total: int | None) -> None:
        """Pass it on to `progress`."""
        if self.progress is not None:
            self.progress(done, total)


def given(batches: Iterable[Any] | None, who: object) -> Calibration:
    """The calibration that `attach()` was given, or an UnmaskError that says who needs one."""
    if batches is None:
        raise UnmaskError(
            f"{type(who).__name__} needs data before training, and attach() was given none; give "
            "attach(..., calibration=batches), an iterable of the batches that you train with"
        )
    return batches if isinstance(batches, Calibration) else Calibration(batches)


@contextmanager
def as_it_was(
    model: nn.Module, measured: Iterable[Tensor], moved: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Afterwards modes, flags, buffers, random state and the parameters to be moved are what they
    were before; until then those to be measured require a gradient."""
    flags = [(p, p.requires_grad) for p in measured]
    modules = [(m, m.training, dict(m._buffers)) for m in model.modules()]
    kept = [(t, t.detach().clone()) for t in (*model.buffers(), *moved)]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training, buffers in modules:
            module.training = training
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The loss's gradients, zeros where a parameter has no part in it."""
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and torch.isfinite(loss)):
        raise UnmaskError(
            f"the loss of a calibration batch is {loss}, not a tensor of one finite number; leave "
            "out samples of which no label counts, lower a learning rate that makes it diverge, "
            "and let a loss of your own return a mean"
        )
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    dense = (g.to_dense() if g is not None and g.is_sparse else g for g in found)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, dense, strict=True)]


def mean_gradient(model: nn.Module, parameters: Parameters, data: Calibration) -> Statistics:
    """The mean of the batches' gradients, in the mode that the model is in."""
    with as_it_was(model, parameters.values()):
        losses = (data.loss_of(model, batch) for batch in on_device(data, parameters.values()))
        return _mean(losses, Tensor.float, parameters, data, length(data))


def fisher(
    model: nn.Module,
    parameters: Parameters,
    data: Calibration,
    num_samples: int,
    sampled: bool,
    measure: Callable[[Tensor], Tensor],
    seed: int,
) -> Statistics:
    """Mean of `measure` of single samples' gradients of -log p(y | x), in evaluation mode.

    y is the data's label, or drawn from the model's output if `sampled`. Samples go through the
    model one at a time: the square of a batch's mean gradient is not the mean of squares.
    """
    draw = torch.Generator().manual_seed(seed)
    with as_it_was(model, parameters.values()):
        model.eval()
        losses = (
            loss_of_drawn(model, sample, draw) if sampled else data.loss_of(model, sample)
            for sample in samples(on_device(data, parameters.values()))
        )
        return _mean(islice(losses, num_samples), measure, parameters, data, num_samples)


def _mean(
    losses: Iterable[Tensor],
    measure: Callable[[Tensor], Tensor],
    parameters: Parameters,
    data: Calibration,
    expected: int | None,
) -> Statistics:
    """The mean of `measure` of the losses' gradients."""
    totals = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    done = 0
    for loss in losses:
        found = gradients(loss, list(parameters.values()))
        for total, gradient in zip(totals.values(), found, strict=True):
            total += measure(gradient.float())
        done += 1
        data.tell(done, expected)
    return checked({name: total.div_(max(1, done)) for name, total in totals.items()}, done)


def checked(found: Statistics, batches: int) -> Statistics:
    """What calibration found, refused if it found nothing, or nothing that can be compared."""
    if not batches:
        raise UnmaskError(
            "attach() was given calibration= without a single batch; give at least one (a "
            "generator is empty after its first use)"
        )
    for name, statistic in found.items():
        if not torch.isfinite(statistic).all():
            raise UnmaskError(
                f"calibration found NaN or infinity in {name!r}; lower its learning rate, if it "
                "has one, or calibrate a float32 or bfloat16 model"
            )
    return found


def on_device(data: Calibration, parameters: Iterable[Tensor]) -> Iterator[Any]:
    """The batches on the device of these parameters."""
    return moved(data, next(iter(parameters)).device)


def length(data: Calibration) -> int | None:
    """How many batches there are, if that can be known."""
    return len(data.batches) if isinstance(data.batches, Sized) else None
