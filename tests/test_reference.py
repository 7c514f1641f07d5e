"""The reference against plain torch: before it judges the library it must itself be right."""

import copy

import pytest
import torch
from torch import nn

from lockstep import assert_same_state, scalars, snapshot
from models import BAG, CONV, MLP, TRANSFORMER, Case
from reference import DenseReference, d3, uniform


@pytest.mark.parametrize("case", [TRANSFORMER, CONV, BAG, MLP], ids=str)
@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
def test_everything_unmasked_is_plain_training(case: Case, strategy: str) -> None:
    model = case.build()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
    reference = DenseReference(
        model, budget=scalars(model), steps=1, strategy=strategy,
        optimizer=torch.optim.AdamW, lr=0.01, weight_decay=0.1,
    )  # fmt: skip
    for step in range(4):
        for trained, stepper in ((plain, optimizer), (reference.model, reference)):
            case.loss(trained, step).backward()
            stepper.step()
            stepper.zero_grad()
    assert_same_state(snapshot(plain), snapshot(reference.model))


def test_one_step_by_hand() -> None:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0, 3.0]]))
    reference = DenseReference(model, budget=2, steps=2, lr=0.5, weight_decay=0.1, momentum=0.9)
    reference.set_grads({"weight": torch.tensor([[4.0, 1.0, 16.0]])})  # scores 1, 1, 1
    reference.step()
    assert reference.model.weight.tolist() == [[pytest.approx(1 - 0.5 * 4.1), 0.0, 3.0]]
    reference.set_grads({"weight": torch.tensor([[0.0, 1.0, 32.0]])})  # scores -, 1, 2
    reference.step()
    first = 1 - 0.5 * 4.1
    momentum = 0.9 * 4.1 + 0.1 * first
    expected = [first - 0.5 * momentum, 0.0, 3 - 0.5 * 32.3]
    assert reference.model.weight.flatten().tolist() == pytest.approx(expected)
    assert (reference.active, reference.updates) == (2, 3)


def test_score_by_hand() -> None:
    weight, grad = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([-8.0, 4.0, 0.0])
    assert d3(2.0, 1.0)("", weight, grad).tolist() == [2.0, 1.0, 0.0]
    assert d3(-1.0, 1.0)("", weight, grad).tolist() == [16.0, 8.0, 0.0]


def test_repeat_forgets_what_leaves() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    reference = DenseReference(model, budget=1, steps=3, strategy="repeat", lr=1.0, momentum=0.5)
    for grad in ([2.0, 0.0], [0.0, 3.0], [4.0, 0.0]):  # 0 in; 1 in, 0 out; 0 back with no momentum
        reference.set_grads({"weight": torch.tensor([grad])})
        reference.step()
    assert reference.model.weight.tolist() == [[-6.0, -3.0]]
    assert (reference.active, reference.updates) == (2, 3)


def test_uniform_by_hand() -> None:
    assert uniform(7, 3) == [2, 2, 3]
    assert uniform(2, 5) == [0, 0, 1, 0, 1]
