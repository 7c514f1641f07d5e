"""Where one thing becomes another; what users get wrong; how a run ends.

Two ways of saying one thing must agree, and every mistake must say what was asked, what was found
and what to do.
"""

import contextlib
import copy
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import unmask
from lockstep import Pair, assert_same_state, chosen, random_grads, same_bits, scalars, snapshot
from models import ALL, BF16, CONV, LORA, MLP, TRANSFORMER, Case
from reference import uniform
from unmask import UnmaskError

ADAMW: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}


def needs(case: Case) -> None:
    if case is LORA:
        pytest.importorskip("peft")


def train(
    model: nn.Module, method: Any, case: Case, steps: int, count: int | None = None, **kw: Any
) -> unmask.Tuner:
    tuner = unmask.attach(model, method, steps=steps, **kw)
    optimizer = tuner.optimizer(torch.optim.AdamW, **ADAMW)
    for step in range(count or steps):
        case.loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuner


# Limits


@pytest.mark.parametrize("case", [MLP, TRANSFORMER], ids=str)
def test_increment_in_one_step_is_static(case: Case) -> None:
    models = [case.build(), case.build()]
    tuners = [
        train(models[0], unmask.id3(budget=30), case, steps=1, count=4),
        train(models[1], unmask.static_d3(budget=30), case, steps=4),
    ]
    assert chosen(tuners[0]) == chosen(tuners[1])
    assert tuners[0].updates == tuners[1].updates == 120
    assert_same_state(snapshot(models[0]), snapshot(models[1]))


def test_exponent_zero_is_the_gradient_alone() -> None:
    model = MLP.build()
    MLP.loss(model, 0).backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    best = sorted(grads.abs().sort(descending=True, stable=True).indices[:20].tolist())
    tuner = unmask.attach(model, unmask.id3(budget=20, exp=0.0), steps=1)
    tuner.optimizer(torch.optim.SGD, lr=0.1).step()
    start, flat = 0, []
    for name, parameter in model.named_parameters():
        flat += [start + index for index in chosen(tuner).get(name, [])]
        start += parameter.numel()
    assert flat == best


def test_share_of_everything_is_the_count() -> None:
    model = MLP.build()
    total = scalars(model)
    assert unmask.attach(model, unmask.id3(budget=1.0), steps=2).budget == total


@pytest.mark.parametrize("share", [0.5, 0.25, 0.125])
def test_share_of_the_eligible(share: float) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16))
    tuner = unmask.attach(model, unmask.id3(budget=share), steps=2, include="*.weight")
    assert tuner.budget == int(256 * share)


def test_static_needs_no_steps() -> None:
    tuner = unmask.attach(MLP.build(), unmask.static_d3(budget=10))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    MLP.loss(tuner.model, 0).backward()
    optimizer.step()
    assert tuner.active == 10


def test_steps_may_come_late() -> None:
    tuner = unmask.attach(MLP.build(), unmask.id3(budget=10))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    tuner.steps = 5
    MLP.loss(tuner.model, 0).backward()
    optimizer.step()
    assert tuner.active == 2


@pytest.mark.parametrize("case", [MLP, BF16], ids=str)
def test_nothing_is_unmasked_after_the_last_step(case: Case) -> None:
    exact = train(case.build(), unmask.id3(budget=30), case, steps=3)
    longer = train(case.build(), unmask.id3(budget=30), case, steps=3, count=6)
    assert exact.active == longer.active == 30
    assert chosen(exact) == chosen(longer)
    assert longer.updates == exact.updates + 90


# Counting


@pytest.mark.parametrize(("budget", "steps"), [(40, 8), (12, 12), (100, 1)])
def test_updates_are_half_of_static_when_budget_divides(budget: int, steps: int) -> None:
    tuner = train(MLP.build(), unmask.id3(budget=budget), MLP, steps=steps)
    assert tuner.updates * 2 == (steps + 1) * budget


@pytest.mark.parametrize(("budget", "steps"), [(41, 8), (5, 12), (101, 3)])
def test_updates_are_the_sum_of_the_schedule(budget: int, steps: int) -> None:
    tuner = train(MLP.build(), unmask.id3(budget=budget), MLP, steps=steps)
    assert tuner.updates == sum(budget * t // steps for t in range(1, steps + 1))


def test_repeat_counts_the_union_and_updates_the_set() -> None:
    pair = Pair(MLP.build(), budget=10, steps=6, strategy="repeat", lr=0.1)
    source = random_grads(pair.model, 0)
    for _ in range(6):
        before = snapshot(pair.model)
        pair.set_grads(next(source))
        pair.step()
        after = snapshot(pair.model)
        assert sum(int((after[name] != before[name]).sum()) for name in after) == 10
    assert pair.tuner.active > 10
    assert pair.tuner.updates == 60


def test_the_head_is_not_counted() -> None:
    tuner = train(MLP.build(), unmask.id3(budget=8), MLP, steps=4, train_fully=("classifier*",))
    assert (tuner.active, tuner.budget, tuner.updates) == (8, 8, 20)
    assert not any(name.startswith("classifier") for name in chosen(tuner))


@given(budget=st.integers(0, 10**12), steps=st.integers(1, 10**6), data=st.data())
def test_uniform_adds_up(budget: int, steps: int, data: st.DataObject) -> None:
    schedule = unmask.Uniform()
    step = data.draw(st.integers(1, steps))
    assert schedule.target(step, steps, budget) == budget * step // steps
    assert schedule.target(steps, steps, budget) == budget


def test_uniform_is_the_reference() -> None:
    for budget, steps in ((10, 3), (3, 10), (7, 7), (1, 1), (0, 4), (1000, 7)):
        targets = [0, *(unmask.Uniform().target(t, steps, budget) for t in range(1, steps + 1))]
        differences = [b - a for a, b in pairwise(targets)]
        assert differences == uniform(budget, steps)


SCHEDULES = st.one_of(st.just(unmask.Uniform()), st.integers(1, 40).map(unmask.Strided))


@given(schedule=SCHEDULES, budget=st.integers(1, 10**7), steps=st.integers(1, 60))
def test_schedules_rise_to_the_budget_exactly(schedule: Any, budget: int, steps: int) -> None:
    targets = [schedule.target(step, steps, budget) for step in range(1, steps + 1)]
    assert all(type(target) is int for target in targets)
    assert targets == sorted(targets)
    assert targets[0] >= 0
    assert targets[-1] == budget


@given(every=st.integers(1, 20), budget=st.integers(1, 1000), steps=st.integers(1, 60))
def test_strided_unmasks_only_every_so_many_steps(every: int, budget: int, steps: int) -> None:
    schedule = unmask.Strided(every=every)
    targets = [0, *(schedule.target(step, steps, budget) for step in range(1, steps + 1))]
    changes = [t for t in range(1, steps + 1) if targets[t] != targets[t - 1]]
    assert len(changes) <= math.ceil(steps / every)
    gaps = [b - a for a, b in pairwise(changes)]
    assert all(gap >= every for gap in gaps[:-1])


def test_strided_by_one_is_uniform() -> None:
    for step in range(1, 14):
        assert unmask.Strided(every=1).target(step, 13, 101) == unmask.Uniform().target(
            step, 13, 101
        )


# The fully trained head


@pytest.mark.parametrize("case", [MLP, CONV], ids=str)
@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
def test_head_in_step_with_the_reference(case: Case, strategy: str) -> None:
    pair = Pair(
        case.build(), budget=30, steps=4, strategy=strategy, optimizer=torch.optim.AdamW,
        train_fully=("classifier*",), **ADAMW,
    )  # fmt: skip
    pair.train(case, 6)
    assert not same_bits(pair.model.classifier.weight, pair.base["classifier.weight"])


def test_head_pattern_as_a_plain_string() -> None:
    models = [MLP.build(), MLP.build()]
    train(models[0], unmask.id3(budget=9), MLP, steps=3, train_fully="classifier*")
    train(models[1], unmask.id3(budget=9), MLP, steps=3, train_fully=("classifier*",))
    assert_same_state(snapshot(models[0]), snapshot(models[1]))


# The end of a run: detach, delta, undo


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("strategy", ["increment", "repeat"])
def test_delta_on_a_fresh_base_is_the_trained_model(
    case: Case, strategy: str, tmp_path: Path
) -> None:
    needs(case)
    model = case.build()
    make = unmask.id3 if strategy == "increment" else unmask.repeat_d3
    tuner = train(model, make(budget=25), case, steps=4, train_fully=case.head)
    tuner.delta().save(tmp_path / "out")
    fresh = case.build()
    base = snapshot(fresh)
    undo = unmask.Delta.load(tmp_path / "out").apply(fresh)
    assert_same_state(snapshot(fresh), snapshot(model))
    model.eval(), fresh.eval()
    assert same_bits(case.logits(fresh, 99), case.logits(model, 99))
    undo.apply(fresh)
    assert_same_state(snapshot(fresh), base)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_detach_restores_every_bit(case: Case, tmp_path: Path) -> None:
    needs(case)
    model = case.build()
    base = snapshot(model)
    requires = {name: p.requires_grad for name, p in model.named_parameters()}
    tuner = train(model, unmask.id3(budget=25), case, steps=4, train_fully=case.head)
    trained = snapshot(model)
    assert any(not same_bits(trained[name], base[name]) for name in base)
    delta = tuner.detach()
    assert_same_state(snapshot(model), base)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires
    delta.apply(model)
    assert_same_state(snapshot(model), trained)


def test_detach_leaves_a_plain_model() -> None:
    model = MLP.build()
    plain = copy.deepcopy(model)
    train(model, unmask.id3(budget=25), MLP, steps=3).detach()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
        assert not module._backward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks or p._backward_hooks for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    for trained in (model, plain):
        MLP.loss(trained, 0).backward()
        torch.optim.SGD(trained.parameters(), lr=0.1).step()
    assert_same_state(snapshot(model), snapshot(plain))


def test_detach_gives_every_parameter_its_flag_back() -> None:
    """What is neither eligible nor trained fully takes no gradient meanwhile, or may: but after."""
    model = MLP.build()
    model.first.bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    base = snapshot(model)
    tuner = train(
        model, unmask.id3(budget=9), MLP, 3, include="second.*", train_fully=("classifier.bias",)
    )
    changed = [name for name, now in snapshot(model).items() if not same_bits(now, base[name])]
    assert set(changed) <= {"second.weight", "second.bias", "classifier.bias"}
    tuner.detach()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_attach_again_after_detach() -> None:
    model = MLP.build()
    train(model, unmask.id3(budget=25), MLP, steps=3).detach()
    again = train(model, unmask.id3(budget=25), MLP, steps=3)
    fresh = MLP.build()
    once = train(fresh, unmask.id3(budget=25), MLP, steps=3)
    assert chosen(again) == chosen(once)
    assert_same_state(snapshot(model), snapshot(fresh))


def test_detach_before_any_step() -> None:
    model = CONV.build()
    base = snapshot(model)
    tuner = unmask.attach(model, unmask.id3(budget=25), steps=3)
    delta = tuner.detach()
    assert_same_state(snapshot(model), base)
    delta.apply(model)
    assert_same_state(snapshot(model), base)


def test_a_step_after_detach_changes_nothing() -> None:
    model = MLP.build()
    tuner = unmask.attach(model, unmask.id3(budget=25), steps=3)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    MLP.loss(model, 0).backward()
    optimizer.step()
    tuner.detach()
    base = snapshot(model)
    MLP.loss(model, 0).backward()
    with contextlib.suppress(UnmaskError):
        optimizer.step()
    assert_same_state(snapshot(model), base)


def test_head_is_no_part_of_the_base_check() -> None:
    """A classifier drawn anew on each load is stored whole, so any start of it will do."""
    model = MLP.build()
    tuner = train(model, unmask.id3(budget=25), MLP, steps=3, train_fully=("classifier*",))
    fresh = MLP.build()
    nn.init.normal_(fresh.classifier.weight)
    tuner.delta().apply(fresh)
    assert_same_state(snapshot(fresh), snapshot(model))


def test_delta_is_taken_and_training_goes_on() -> None:
    models = [MLP.build(), MLP.build()]
    tuners = [unmask.attach(model, unmask.id3(budget=25), steps=4) for model in models]
    optimizers = [tuner.optimizer(torch.optim.AdamW, **ADAMW) for tuner in tuners]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            MLP.loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        tuners[0].delta()
        tuners[0].selected()
        tuners[0].state_dict()
    assert_same_state(snapshot(models[0]), snapshot(models[1]))


def test_a_delta_is_a_snapshot() -> None:
    """One run leaves a series of deltas: training on must not change those already taken."""
    model, half = CONV.build(), CONV.build()
    tuner = unmask.attach(model, unmask.id3(budget=24), steps=6, train_fully=CONV.head)
    optimizer = tuner.optimizer(torch.optim.AdamW, **ADAMW)
    for step in range(6):
        CONV.loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            delta, then = tuner.delta(), snapshot(model)
    delta.apply(half)
    assert_same_state(snapshot(half), then)


# Mistakes: asked, found, remedy

ELIGIBLE = 6 * 12 + 12 + 12 * 12 + 12 + 12 * 3 + 3


def attach(**kw: Any) -> unmask.Tuner:
    method = unmask.id3(**{key: kw.pop(key) for key in ("budget", "exp", "eps") if key in kw})
    return unmask.attach(MLP.build(), method, **{"steps": 5, **kw})


@pytest.mark.parametrize(
    ("kw", "says"),
    [
        ({"budget": 0}, ["budget", "0"]),
        ({"budget": -3}, ["budget", "-3"]),
        ({"budget": ELIGIBLE + 1}, ["budget", str(ELIGIBLE + 1), str(ELIGIBLE), "lower|include"]),
        ({"budget": 0.0}, ["budget", "0"]),
        ({"budget": 1.5}, ["budget", "1.5"]),
        ({"budget": -0.5}, ["budget", "-0.5"]),
        ({"budget": math.nan}, ["budget", "nan"]),
        ({"budget": "12"}, ["budget"]),
        ({"budget": True}, ["budget"]),
        ({"budget": 5, "include": "*.wieght"}, ["wieght"]),
        ({"budget": 5, "include": ()}, ["include"]),
        ({"budget": 5, "exclude": "*"}, ["exclude"]),
        ({"budget": 5, "train_fully": ("clasifier*",)}, ["clasifier"]),
        ({"budget": 5, "exp": math.nan}, ["exp", "nan"]),
        ({"budget": 5, "eps": 0.0}, ["eps", "0"]),
        ({"budget": 5, "eps": -1.0}, ["eps", "-1"]),
        ({"budget": 5, "eps": math.nan}, ["eps", "nan"]),
        ({"budget": 5, "steps": 0}, ["steps", "0"]),
        ({"budget": 5, "steps": -2}, ["steps", "-2"]),
        ({"budget": 5, "steps": 2.5}, ["steps", "2.5"]),
    ],
    ids=str,
)
def test_mistakes_name_what_was_asked(kw: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(UnmaskError) as caught:
        attach(**kw)
    message = str(caught.value).replace(",", "")
    for words in says:
        assert any(word in message for word in words.split("|")), (words, message)
    assert len(message) > 25


def test_a_share_is_at_least_one_scalar() -> None:
    assert attach(budget=1e-9).budget == 1


def test_steps_missing_at_the_first_step() -> None:
    tuner = unmask.attach(MLP.build(), unmask.id3(budget=10))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    MLP.loss(tuner.model, 0).backward()
    base = snapshot(tuner.model)
    with pytest.raises(UnmaskError, match="steps"):
        optimizer.step()
    assert_same_state(snapshot(tuner.model), base)
    tuner.steps = 2
    optimizer.step()
    assert tuner.active == 5


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_set_late_are_checked_too(steps: int) -> None:
    tuner = unmask.attach(MLP.build(), unmask.id3(budget=10))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    MLP.loss(tuner.model, 0).backward()

    def set_and_step() -> None:
        tuner.steps = steps
        optimizer.step()

    with pytest.raises(UnmaskError, match="steps"):
        set_and_step()


def test_attaching_twice() -> None:
    model = MLP.build()
    tuner = unmask.attach(model, unmask.id3(budget=10), steps=2)
    with pytest.raises(UnmaskError, match="detach"):
        unmask.attach(model, unmask.id3(budget=10), steps=2)
    tuner.detach()
    unmask.attach(model, unmask.id3(budget=10), steps=2)


def test_attaching_to_a_part_or_to_the_whole_of_it() -> None:
    """Each would freeze what the other trains, and take its gradients."""
    model = MLP.build()
    for first, second in ((model, model.first), (model.first, model)):
        tuner = unmask.attach(first, unmask.id3(budget=10), steps=2)
        with pytest.raises(UnmaskError, match=r"shares parameters .* detach"):
            unmask.attach(second, unmask.id3(budget=10), steps=2)
        tuner.detach()
    tuners = [unmask.attach(part, unmask.id3(budget=3)) for part in (model.first, model.second)]
    assert all(tuner.detach() for tuner in tuners)


def test_detaching_twice() -> None:
    """The second time another may have the model: it must not be undone behind its back."""
    first = train(MLP.build(), unmask.random_mask(9), MLP, steps=1)
    first.detach()
    second = train(first.model, unmask.random_mask(9), MLP, steps=1)
    now = snapshot(first.model)
    with pytest.raises(UnmaskError, match="off its model already"):
        first.detach()
    assert_same_state(snapshot(first.model), now)
    with pytest.raises(UnmaskError, match="has a tuner already"):
        unmask.attach(first.model, unmask.random_mask(9))
    second.detach()


def test_nothing_to_train() -> None:
    with pytest.raises(UnmaskError):
        unmask.attach(nn.ReLU(), unmask.id3(budget=1), steps=1)
    frozen = MLP.build().requires_grad_(False)
    with pytest.raises(UnmaskError, match="requires_grad"):
        unmask.attach(frozen, unmask.id3(budget=1), steps=1)


def test_an_optimiser_after_detach() -> None:
    """It would train nothing, without a word."""
    tuner = unmask.attach(MLP.build(), unmask.id3(budget=9), steps=2)
    tuner.detach()
    with pytest.raises(UnmaskError, match=r"off its model.*attach\(\)"):
        tuner.optimizer(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("loss", ["x", None, torch.ones(2)], ids=str)
def test_a_report_that_is_no_loss(loss: Any) -> None:
    tuner = unmask.attach(MLP.build(), unmask.id3(budget=9), steps=2)
    with pytest.raises(UnmaskError, match=r"report\(\) was given .* one number"):
        tuner.report(loss)


def test_not_a_model_not_a_method() -> None:
    with pytest.raises(UnmaskError):
        unmask.attach([1, 2], unmask.id3(budget=1), steps=1)  # type: ignore[arg-type]
    with pytest.raises(UnmaskError):
        unmask.attach(MLP.build(), "id3", steps=1)  # type: ignore[arg-type]


def test_the_same_parameter_asked_for_twice() -> None:
    """Selected and fully trained are disjoint: the head wins, whatever include says."""
    tuner = attach(budget=1.0, include="*", train_fully="classifier*")
    assert tuner.budget == ELIGIBLE - 39


def test_the_error_is_a_value_error() -> None:
    assert issubclass(UnmaskError, ValueError)
    assert issubclass(unmask.UnmaskWarning, UserWarning)


def test_methods_are_frozen_and_printable() -> None:
    method = unmask.id3(budget=10)
    with pytest.raises((AttributeError, TypeError)):
        method.budget = 11  # type: ignore[misc]
    assert "10" in repr(method)
    assert hash(method) == hash(unmask.id3(budget=10))


@pytest.mark.parametrize(
    "make",
    [unmask.id3, unmask.repeat_d3, unmask.static_d3, unmask.pafi, unmask.random_mask],
    ids=lambda make: make.__name__,
)
def test_methods_train_within_their_budget(make: Callable[..., Any]) -> None:
    tuner = train(MLP.build(), make(budget=20), MLP, steps=4)
    assert tuner.budget == 20
    assert tuner.active >= 20


def test_random_mask_repeats_itself() -> None:
    picks = [chosen(train(MLP.build(), unmask.random_mask(budget=20), MLP, 2)) for _ in range(2)]
    assert picks[0] == picks[1]
    assert sum(map(len, picks[0].values())) == 20


def test_bitfit_trains_biases_only() -> None:
    tuner = train(MLP.build(), unmask.bitfit(), MLP, steps=2)
    assert set(chosen(tuner)) == {"first.bias", "second.bias", "classifier.bias"}
    assert tuner.active == 27


@pytest.mark.parametrize("gradients", ["dense", "streaming", "sampled"])
def test_an_attach_that_fails_leaves_the_model_as_it_was(gradients: str) -> None:
    """Another may follow, and gradients are the model's again."""
    model = MLP.build()

    def stop(model: nn.Module, batch: Any) -> Tensor:
        raise KeyboardInterrupt

    for calibration, error in (
        (None, UnmaskError),
        (unmask.Calibration([(torch.ones(1),)], stop), KeyboardInterrupt),
    ):
        with pytest.raises(error):
            unmask.attach(
                model, unmask.fish(9), include="first*", calibration=calibration,
                gradients=gradients,
            )  # fmt: skip
    assert all(parameter.requires_grad for parameter in model.parameters())
    MLP.loss(model, 0).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    unmask.attach(model, unmask.random_mask(9)).detach()


class Odd(nn.Module):
    """With a parameter that holds nothing, and one that has no shape yet if `lazy`."""

    def __init__(self, lazy: bool = False) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.layer = nn.LazyLinear(3) if lazy else nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.empty.sum()


@pytest.mark.parametrize("name", unmask.methods.__all__)
def test_a_parameter_that_holds_nothing_is_no_obstacle(name: str) -> None:
    model, batch = Odd(), (torch.ones(2, 6), torch.tensor([0, 2]))
    method = getattr(unmask, name)(budget=3)
    tuner = unmask.attach(model, method, steps=5, calibration=[batch])
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(5):
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.active >= 3
    assert set(tuner.selected()) <= {"layer.weight", "layer.bias"}


def test_a_parameter_without_a_shape_is_refused() -> None:
    with pytest.raises(UnmaskError, match="run the model once before attach"):
        unmask.attach(Odd(lazy=True), unmask.id3(budget=3), steps=1)


def test_parameters_that_share_memory_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(UnmaskError, match=r"'0.weight' and '1.weight' share memory"):
        unmask.attach(model, unmask.id3(budget=3), steps=1)
    model[1].weight = model[0].weight
    unmask.attach(model, unmask.id3(budget=3), steps=1)


def test_parts_of_one_memory_are_tensors_of_their_own() -> None:
    model, whole = nn.Linear(4, 3), torch.randn(15)
    model.weight.data, model.bias.data = whole[:12].view(3, 4), whole[12:]
    unmask.attach(model, unmask.id3(budget=3), steps=1)


def test_weights_that_forward_rescales_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 2))
    with pytest.raises(UnmaskError, match=r"'0\.weight' is rescaled at every forward pass"):
        unmask.attach(model, unmask.id3(budget=3), steps=1)
    unmask.attach(model, unmask.id3(budget=3), steps=1, exclude="0.*")


def test_weights_of_eight_bits_are_passed_over() -> None:
    model = nn.Linear(4, 2)
    model.weight = nn.Parameter(model.weight.detach().to(torch.float8_e4m3fn))
    assert unmask.attach(model, unmask.id3(budget=1.0), steps=1).budget == 2


def test_a_compiled_model_has_the_names_of_its_own() -> None:
    model = nn.Linear(4, 2)
    compiled = torch.compile(model, backend="eager")
    tuner = unmask.attach(compiled, unmask.id3(budget=10), steps=1)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    compiled(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert set(tuner.selected()) == {"weight", "bias"}
    tuner.detach().apply(model)


def test_one_pattern_of_a_method_as_a_plain_string() -> None:
    method = unmask.Method(unmask.Gradient(), unmask.Static(), 9, include="*bias")  # type: ignore[arg-type]
    assert method.include == ("*bias",)
    assert unmask.Method.from_dict(method.to_dict() | {"include": "*bias"}) == method


def test_numbers_of_numpy_are_numbers() -> None:
    """Whatever they come from, a checkpoint and a delta hold plain ones."""
    schedule = unmask.Strided(every=np.int64(2))  # type: ignore[arg-type]
    method = unmask.Method(unmask.D3(exp=np.float32(2)), unmask.Increment(schedule), 9)  # type: ignore[arg-type]
    tuner = unmask.attach(MLP.build(), method, steps=4)
    assert json.loads(tuner.state_dict()["method"]) == tuner.delta().info["method"]
    assert unmask.Method.from_dict(tuner.delta().info["method"]) == method


@pytest.mark.parametrize("patterns", [None, 7, [None], b"x"])
@pytest.mark.parametrize("option", ["include", "exclude", "train_fully"])
def test_patterns_that_are_none(option: str, patterns: object) -> None:
    with pytest.raises(UnmaskError, match="is no pattern on names"):
        unmask.attach(torch.nn.Linear(2, 2), unmask.id3(budget=1), **{option: patterns})


def test_a_description_that_is_none() -> None:
    with pytest.raises(UnmaskError, match="None doesn't describe a method"):
        unmask.Method.from_dict(None)  # type: ignore[arg-type]
