"""Batches -> statistics that some heuristics need before training.

Everything here leaves the model bit for bit as it found it: weights, buffers, modes, gradients and
the random state. Gradients are taken with `torch.autograd.grad`, so no `.grad` and no hook is
touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss of a batch."""
        return (self.loss or _loss)(model, batch)

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
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    dense = (g.to_dense() if g is not None and g.is_sparse else g for g in found)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, dense, strict=True)]


def mean_gradient(model: nn.Module, parameters: Parameters, data: Calibration) -> Statistics:
    """The mean of the batches' gradients, in the mode that the model is in."""
    totals, count = _zeros(parameters), 0
    with as_it_was(model, parameters.values()):
        for batch in _moved(data, parameters):
            found = gradients(data.loss_of(model, batch), list(parameters.values()))
            for total, gradient in zip(totals.values(), found, strict=True):
                total += gradient.float()
            count += 1
            data.tell(count, _length(data))
    _check(count)
    return {name: total.div_(count) for name, total in totals.items()}


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
    totals, count = _zeros(parameters), 0
    draw = torch.Generator().manual_seed(seed)
    with as_it_was(model, parameters.values()):
        model.eval()
        for sample in _samples(_moved(data, parameters)):
            loss = _loss_of_drawn(model, sample, draw) if sampled else data.loss_of(model, sample)
            found = gradients(loss, list(parameters.values()))
            for total, gradient in zip(totals.values(), found, strict=True):
                total += measure(gradient.float())
            count += 1
            data.tell(count, num_samples)
            if count == num_samples:
                break
    _check(count)
    return {name: total.div_(count) for name, total in totals.items()}


def full_training(
    model: nn.Module,
    parameters: Parameters,
    data: Calibration,
    passes: int,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> Statistics:
    """How far each scalar moves, |θ - θ₀|, when all that requires a gradient is trained in full.

    In training mode; low-precision weights through float32 masters. The weights are rewound.
    """
    whole = [p for p in model.parameters() if p.requires_grad]
    trained = list({id(p): p for p in (*parameters.values(), *whole)}.values())
    with as_it_was(model, parameters.values(), trained):
        model.train()
        masters = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in trained
        ]
        stepper = optimizer(masters)

        def step(found: list[Tensor]) -> None:
            for master, gradient in zip(masters, found, strict=True):
                master.grad = gradient.to(master.dtype)
            stepper.step()
            for p, master in zip(trained, masters, strict=True):
                p.data.copy_(master)

        starts = {name: p.detach().clone() for name, p in parameters.items()}
        _train(model, data, passes, trained, step)
        ends = {id(p): master for p, master in zip(trained, masters, strict=True)}
        return {n: (ends[id(p)] - starts[n]).abs().float() for n, p in parameters.items()}


def gated_training(
    model: nn.Module,
    parameters: Parameters,
    data: Calibration,
    passes: int,
    lr: float,
    gate_lr: float,
    penalty: float,
    seed: int,
) -> Statistics:
    """Diff pruning's |z·w| after training θ = θ₀ + z⊙w under an L0 penalty on the gates z.

    z is a hard concrete variable (Louizos et al. 2018) stretched to (-1.5, 1.5), its location
    starting at 5; penalty · Σ P(z ≠ 0) is added to the loss. The weights are rewound.
    """
    tensors = list(parameters.values())
    draw = torch.Generator(device=tensors[0].device).manual_seed(seed)
    with as_it_was(model, tensors, tensors):
        model.train()
        starts = [p.detach().to(torch.float32, copy=True) for p in tensors]
        moves = [torch.zeros_like(s, requires_grad=True) for s in starts]
        gates = [torch.full_like(s, 5.0).requires_grad_() for s in starts]
        adam = torch.optim.AdamW(
            [{"params": moves, "lr": lr}, {"params": gates, "lr": gate_lr}], weight_decay=0.0
        )
        diffs: list[Tensor] = []

        def place() -> None:
            diffs.clear()
            for p, start, move, gate in zip(tensors, starts, moves, gates, strict=True):
                u = torch.rand(gate.shape, generator=draw, device=draw.device).clamp(1e-6, 1 - 1e-6)
                diffs.append(_open(u.logit().to(gate.device) + gate) * move)
                p.data.copy_(start + diffs[-1].detach())

        def step(found: list[Tensor]) -> None:
            adam.zero_grad()
            torch.autograd.backward(diffs, [g.float() for g in found])
            for gate in gates:
                (penalty * gate.sigmoid().sum()).backward()
            adam.step()

        _train(model, data, passes, tensors, step, place)
        with torch.no_grad():
            return {
                n: (_open(g) * m).abs() for n, g, m in zip(parameters, gates, moves, strict=True)
            }


def _open(gate: Tensor) -> Tensor:
    """A hard concrete gate, stretched from (0, 1) to (-1.5, 1.5) and clipped to [0, 1]."""
    return (gate.sigmoid() * 3.0 - 1.5).clamp(0.0, 1.0)


def _train(
    model: nn.Module,
    data: Calibration,
    passes: int,
    trained: list[nn.Parameter],
    step: Callable[[list[Tensor]], None],
    before: Callable[[], None] = lambda: None,
) -> None:
    if passes > 1 and iter(data.batches) is data.batches:
        raise UnmaskError(
            f"passes={passes} over calibration batches that can be read only once; give a list or "
            "a DataLoader, or passes=1"
        )
    length, done = _length(data), 0
    for _ in range(passes):
        for batch in _moved(data, {"": trained[0]}):
            before()
            step(gradients(data.loss_of(model, batch), trained))
            done += 1
            data.tell(done, None if length is None else length * passes)
    _check(done)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss by the conventions that `Calibration` states."""
    if isinstance(batch, Mapping):
        output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            return loss
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        output, target = model(*batch[:-1]), batch[-1]
        if isinstance(output, Tensor) and isinstance(target, Tensor):
            if target.is_floating_point():
                return F.mse_loss(output, target)
            return F.cross_entropy(output.flatten(0, -2), target.flatten())
    raise UnmaskError(
        f"no loss can be had from a calibration batch of type {type(batch).__name__}; give a "
        "mapping with labels to a model that returns .loss, or (inputs, target), or say how: "
        "unmask.Calibration(batches, loss=lambda model, batch: ...)"
    )


def _loss_of_drawn(model: nn.Module, sample: Any, draw: torch.Generator) -> Tensor:
    """-log p(y | x) of a y drawn from the model's output; a mean over y's positions that count."""
    labels = sample.get("labels") if isinstance(sample, Mapping) else sample[-1]
    output = model(**sample) if isinstance(sample, Mapping) else model(*sample[:-1])
    logits = output["logits"] if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[-1] < 2:
        raise UnmaskError(
            "sample_type='model' draws labels from the model's class scores, and it gives none; "
            "use sample_type='label'"
        )
    flat = logits.flatten(0, -2).float()
    chances = flat.detach().softmax(-1).cpu()
    drawn = torch.multinomial(chances, 1, generator=draw).squeeze(1).to(flat.device)
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]:
        if getattr(model, "loss_type", None) == "ForCausalLM":  # there position t predicts t + 1
            labels = F.pad(labels[..., 1:], (0, 1), value=-100)
        drawn = drawn.masked_fill(labels.flatten() == -100, -100)
    return F.cross_entropy(flat, drawn)


def _samples(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches' samples, as batches of one."""
    for batch in batches:
        values = list(batch.values() if isinstance(batch, Mapping) else batch)
        sizes = [len(v) for v in values if isinstance(v, Tensor) and v.ndim]
        if not sizes:
            raise UnmaskError(
                f"a calibration batch of type {type(batch).__name__} holds no tensors to take "
                "single samples from; give mappings or tuples of tensors"
            )
        for i in range(sizes[0]):
            one = [
                v[i : i + 1] if isinstance(v, Tensor) and v.ndim and len(v) == sizes[0] else v
                for v in values
            ]
            yield dict(zip(batch, one, strict=True)) if isinstance(batch, Mapping) else tuple(one)


def _moved(batches: Iterable[Any], parameters: Parameters) -> Iterator[Any]:
    """The batches on the device where the parameters are."""
    device = next(iter(parameters.values())).device
    for batch in batches:
        if isinstance(batch, Mapping):
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        elif isinstance(batch, list | tuple):
            yield tuple(v.to(device) if isinstance(v, Tensor) else v for v in batch)
        else:
            yield batch.to(device) if isinstance(batch, Tensor) else batch


def _zeros(parameters: Parameters) -> Statistics:
    return {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}


def _length(data: Calibration) -> int | None:
    return len(data.batches) if isinstance(data.batches, Sized) else None


def _check(count: int) -> None:
    if not count:
        raise UnmaskError(
            "attach() was given calibration= without a single batch; give at least one (a "
            "generator is empty after its first use)"
        )
