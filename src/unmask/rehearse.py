"""Training before training: what it does to each scalar, after which all is as it was.

As everything in `calibrate`, this leaves the model bit for bit as it found it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unmask.calibrate import (
    Calibration,
    Parameters,
    Statistics,
    as_it_was,
    checked,
    gradients,
    length,
    on_device,
)
from unmask.errors import UnmaskError

__all__ = ["full_training", "gated_training"]


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
        done = _train(model, data, passes, trained, step)
        ends = {id(p): master for p, master in zip(trained, masters, strict=True)}
        moved = {n: (ends[id(p)] - starts[n]).abs().float() for n, p in parameters.items()}
        return checked(moved, done)


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

        done = _train(model, data, passes, tensors, step, place)
        with torch.no_grad():
            found = [(_open(g) * m).abs() for g, m in zip(gates, moves, strict=True)]
        return checked(dict(zip(parameters, found, strict=True)), done)


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
) -> int:
    """`step` by each batch's gradients; returns how many batches there were."""
    if passes > 1 and iter(data.batches) is data.batches:
        raise UnmaskError(
            f"passes={passes} over calibration batches that can be read only once; give a list or "
            "a DataLoader, or passes=1"
        )
    batches, done = length(data), 0
    for _ in range(passes):
        for batch in on_device(data, trained):
            before()
            step(gradients(data.loss_of(model, batch), trained))
            done += 1
            data.tell(done, None if batches is None else batches * passes)
    return done
