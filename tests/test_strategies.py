"""Strategies: how many go and come, and what becomes of those that go."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import unmask
from lockstep import assert_same_state, chosen, snapshot
from models import MLP
from test_methods import STEPS, Run
from unmask import Quota, UnmaskError

B = 40


def quotas(strategy: unmask.Strategy, steps: int, budget: int = 100) -> list[Quota]:
    found, active = [], 0
    for t in range(1, steps + 1):
        quota = strategy.quota(t, active, budget, steps)
        active += quota.grow - quota.drop
        assert 0 <= active <= budget
        found.append(quota)
    return found


def test_static_and_repeat() -> None:
    assert quotas(unmask.Static(), 3) == [Quota(0, 100), Quota(0, 0), Quota(0, 0)]
    assert quotas(unmask.Repeat(), 3) == [Quota(0, 100), Quota(100, 100), Quota(100, 100)]


def test_reselect() -> None:
    found = quotas(unmask.Reselect(every=3), 8)
    assert found[0] == Quota(0, 100)
    assert [t for t, q in enumerate(found, 1) if q.drop] == [4, 7]
    assert quotas(unmask.Reselect(every=1), 5) == quotas(unmask.Repeat(), 5)


def test_drop_grow() -> None:
    strategy = unmask.DropGrow(every=10, rate=0.2, first=5)
    found = quotas(strategy, 50)
    assert [t for t, q in enumerate(found, 1) if q.grow] == [5, 15, 25, 35, 45]
    assert [q.drop for q in found if q.drop] == [14, 10, 6, 2]
    assert all(q.drop == q.grow for q in found if q.drop)
    cosine = quotas(unmask.DropGrow(every=10, rate=0.2, first=5, decay="cosine"), 50)
    assert [q.drop for q in cosine if q.drop] == [15, 10, 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda: unmask.Reselect(every=0),
        lambda: unmask.Reselect(every=2.5),
        lambda: unmask.DropGrow(every=0),
        lambda: unmask.DropGrow(every=2.5),
        lambda: unmask.DropGrow(first=1.5),
        lambda: unmask.DropGrow(rate=1.5),
        lambda: unmask.DropGrow(first=0),
        lambda: unmask.DropGrow(decay="square"),
    ],
)
def test_refused(make: object) -> None:
    with pytest.raises(UnmaskError, match="was asked for"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("schedule", ["strided", unmask.Strided])
def test_a_schedule_is_an_instance(schedule: Any) -> None:
    with pytest.raises(UnmaskError, match=r"instance of unmask\.Schedule"):
        unmask.id3(budget=9, schedule=schedule)


def test_steps_are_asked_for() -> None:
    tuner = unmask.attach(MLP.build(), unmask.Method(unmask.Gradient(), unmask.DropGrow(), B))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    MLP.loss(tuner.model, 0).backward()
    with pytest.raises(UnmaskError, match="DropGrow needs the number of optimiser steps"):
        optimizer.step()


@dataclass(frozen=True)
class Rewinding(unmask.Repeat):
    """Repeat, but what leaves is as if it had never been trained."""

    rewinds: ClassVar[bool] = True


def test_what_is_rewound_is_no_part_of_the_delta() -> None:
    plain = Run(unmask.Method(unmask.Gradient(), unmask.Repeat(), B)).train()
    run = Run(unmask.Method(unmask.Gradient(), Rewinding(), B)).train()
    assert plain.tuner.active > B == run.tuner.active
    for name, weight in run.model.named_parameters():
        moved = (weight != run.base[name]).flatten().nonzero().flatten().tolist()
        assert set(moved) <= set(chosen(run.tuner).get(name, []))
    run.tuner.detach()
    assert_same_state(snapshot(run.model), run.base)


@dataclass(frozen=True)
class Shrinking(unmask.Strategy):
    """Take all of the budget, then let a few go at each step."""

    rewinds: ClassVar[bool] = True

    def quota(self, step: int, active: int, budget: int, steps: int | None) -> Quota:
        return Quota(0, budget) if step == 1 else Quota(min(3, active), 0)


@pytest.mark.parametrize("scope", [unmask.Global(), unmask.PerTensor(), unmask.Units()])
def test_a_set_may_only_shrink(scope: unmask.Scope) -> None:
    run = Run(unmask.Method(unmask.Gradient(), Shrinking(), B, scope=scope)).train()
    assert run.tuner.active == len(run.tuner.slots) == B - 3 * (STEPS - 1)
    for name, weight in run.model.named_parameters():
        moved = int((weight != run.base[name]).sum())
        assert moved <= len(chosen(run.tuner).get(name, []))


def test_those_that_moved_least_go() -> None:
    run = Run(unmask.Method(unmask.Gradient(), Shrinking(), B)).train(last=3)
    before = run.tuner.slots
    moved = (before.values.detach() - before.base)[before.position].abs()
    least = set(before.index[moved.argsort(stable=True)[:3]].tolist())
    old = set(before.index.tolist())
    run.train(first=4, last=4)
    assert old - set(run.tuner.slots.index.tolist()) == least


def test_a_choice_made_for_good_is_not_remembered() -> None:
    method = unmask.Method(unmask.Accumulated(), unmask.Static(), B)
    run = Run(method).train()
    assert run.tuner.state_dict()["seen"] == {}
    fish = Run(unmask.fish(B, num_samples=3))
    assert fish.tuner.state_dict()["seen"] == {}


def test_fisher_information_for_a_growing_set() -> None:
    """What was measured before training serves every later choice, also after a resume."""
    heuristic = unmask.Fisher(num_samples=5)
    growing = unmask.Method(heuristic, unmask.Increment(), B)
    run = Run(growing).train()
    at_once = Run(unmask.Method(heuristic, unmask.Static(), B))
    assert chosen(run.tuner) == chosen(at_once.tuner)
    half = Run(growing).train(last=5)
    assert chosen(Run(growing).load(half.save()).train(first=6).tuner) == chosen(run.tuner)
