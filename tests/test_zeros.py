"""Zeros keep their signs: where everything is unmasked, training is the base optimiser's own."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unmask
from lockstep import Pair, assert_same_state, snapshot
from models import BF16, MLP, TRANSFORMER, Case, Mlp, seeded

# A weight, and its gradient in two backward passes: every choice of signs.
SIGNS = torch.tensor(list(product([0.0, -0.0], repeat=3))).T


class Zeros(nn.Module):
    """Weights and gradients that are zero: of a vector, of a matrix, and of what isn't used."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(SIGNS[0].clone())
        self.matrix = nn.Linear(8, 8)
        with torch.no_grad():
            self.matrix.weight.copy_(SIGNS[0].expand(8, 8))
            self.matrix.bias.copy_(SIGNS[0])
        self.unused = nn.Parameter(SIGNS[0].clone())

    def forward(self, x: Tensor, use: bool) -> Tensor:
        out = (self.vector * x).sum() + (self.matrix(x[None]) * x).sum()
        return out + (self.unused * x).sum() if use else out


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("gradients", ["dense", "streaming", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_step_with_the_optimiser_alone(
    dtype: torch.dtype, gradients: str, accumulation: int
) -> None:
    base = Zeros().to(dtype)
    model = copy.deepcopy(base)
    method = unmask.id3(budget=1.0)
    passes = {} if gradients == "dense" else {"accumulation": accumulation}
    tuner = unmask.attach(model, method, steps=1, gradients=gradients, **passes)
    optimizers: list[Any] = [
        tuner.optimizer(torch.optim.SGD, lr=0.1),
        torch.optim.SGD(base.parameters(), lr=0.1),
    ]
    for use in (False, True, False):
        for name, weight in base.named_parameters():
            with torch.no_grad():  # anew, as a step may leave none of one sign
                weight.copy_(SIGNS[0].expand(weight.shape))
                model.get_parameter(name).copy_(weight)
        tuner.reread()
        for part in range(accumulation):
            for each in (model, base):
                each(SIGNS[1 + part].to(dtype), use).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same_state(snapshot(model), snapshot(base))
    assert torch.signbit(base.unused).any()  # of what has no gradient


@pytest.mark.parametrize("case", [MLP, TRANSFORMER, BF16], ids=str)
@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_in_step_with_the_reference(share: float, strategy: str, case: Case) -> None:
    """Gradients of what is unmasked are gathered while others are chosen."""
    model, draw = case.build(), seeded(0)

    def zeros(of: Tensor) -> Tensor:
        kinds = torch.tensor([0.0, -0.0, 0.25], dtype=of.dtype)
        return kinds[torch.randint(3, of.shape, generator=draw)]

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(zeros(parameter))
    budget = int(share * sum(p.numel() for p in model.parameters()))
    pair = Pair(model, budget=budget, steps=3, strategy=strategy, lr=0.25)
    for step in range(4):
        named = dict(model.named_parameters())
        silent = list(named)[step]
        pair.set_grads({n: None if n == silent else zeros(p) for n, p in named.items()})
        pair.step()
        pair.assert_equal()


def test_more_gradients_after_a_first_look() -> None:
    model = Mlp()
    weight = model.first.weight
    with torch.no_grad():
        weight.fill_(-0.0)
    tuner = unmask.attach(model, unmask.full(), steps=1, gradients="streaming", accumulation=2)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    for parameter, look in ((model.second.weight, True), (weight, False)):
        (parameter * -0.0).sum().backward()
        if look:
            assert not torch.signbit(tuner.slots.values.grad).all()
    optimizer.step()
    assert not torch.signbit(weight).any()  # -0.0 - 0.1 · -0.0
