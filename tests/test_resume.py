"""k steps, a file, m more steps in a new process's model: bitwise k + m steps in one go."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import unmask
from lockstep import assert_same_state, chosen, same_tree, snapshot
from models import ALL, BF16, CONV, LORA, MLP, TRANSFORMER, Case

Make = Callable[[], unmask.Method]
METHODS: dict[str, Make] = {
    "id3": lambda: unmask.id3(budget=30),
    "strided": lambda: unmask.id3(budget=30, schedule=unmask.Strided(every=3)),
    "static": lambda: unmask.static_d3(budget=30),
    "repeat": lambda: unmask.repeat_d3(budget=30),
    "random": lambda: unmask.random_mask(budget=30),
    "pafi": lambda: unmask.pafi(budget=30),
}
ADAM = (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1})
MOMENTUM = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True})
HEAD = ("classifier*",)


class Run:
    """A training that can be stopped and taken up again."""

    def __init__(
        self, case: Case, make: Make = METHODS["id3"], steps: int = 7, optimizer: Any = ADAM,
        train_fully: tuple[str, ...] = (), seed: int = 0,
    ) -> None:  # fmt: skip
        self.case = case
        self.model = case.build(seed)
        self.tuner = unmask.attach(self.model, make(), steps=steps, train_fully=train_fully)
        cls, kw = optimizer
        self.optimizer = self.tuner.optimizer(cls, **kw)
        self.scheduler = lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def train(self, first: int, count: int) -> "Run":
        for step in range(first, first + count):
            self.case.loss(self.model, step).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return self

    def save(self) -> bytes:
        file = io.BytesIO()
        parts = (self.tuner, self.optimizer, self.scheduler)
        torch.save([part.state_dict() for part in parts], file)
        return file.getvalue()

    def load(self, data: bytes, order: tuple[int, ...] = (0, 1, 2)) -> "Run":
        states = torch.load(io.BytesIO(data), weights_only=True)
        parts = (self.tuner, self.optimizer, self.scheduler)
        for index in order:
            parts[index].load_state_dict(states[index])
        return self

    def assert_equal(self, other: "Run") -> None:
        assert_same_state(snapshot(self.model), snapshot(other.model))
        assert chosen(self.tuner) == chosen(other.tuner)
        for name in ("active", "updates", "step", "budget"):
            assert getattr(self.tuner, name) == getattr(other.tuner, name), name
        assert same_tree(self.optimizer.state_dict(), other.optimizer.state_dict())


def resumed(k: int, m: int, order: tuple[int, ...] = (0, 1, 2), **kw: Any) -> None:
    whole = Run(**kw).train(0, k + m)
    data = Run(**kw).train(0, k).save()
    Run(**kw).load(data, order).train(k, m).assert_equal(whole)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_model(case: Case) -> None:
    if case is LORA:
        pytest.importorskip("peft")
    resumed(3, 5, case=case, train_fully=case.head)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", [ADAM, MOMENTUM], ids=["adamw", "nesterov"])
def test_every_method(method: str, optimizer: Any) -> None:
    resumed(3, 5, case=MLP, make=METHODS[method], optimizer=optimizer, train_fully=HEAD)


@pytest.mark.parametrize("method", ["id3", "repeat"])
def test_every_method_in_low_precision(method: str) -> None:
    """The float32 masters travel: bf16 weights alone would forget small updates."""
    resumed(4, 6, case=BF16, make=METHODS[method], optimizer=(torch.optim.SGD, {"lr": 1e-3}))


@pytest.mark.parametrize("k", [0, 1, 6, 7, 9])
def test_any_moment(k: int) -> None:
    resumed(k, 3, case=MLP, train_fully=HEAD)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_any_order_of_loading(order: tuple[int, ...]) -> None:
    resumed(3, 4, order, case=MLP, train_fully=HEAD)


def test_loading_before_the_optimiser_is_made() -> None:
    whole = Run(MLP, train_fully=HEAD).train(0, 7)
    states = torch.load(
        io.BytesIO(Run(MLP, train_fully=HEAD).train(0, 3).save()), weights_only=True
    )
    run = Run(MLP, train_fully=HEAD)
    run.tuner.detach()
    run.tuner = unmask.attach(run.model, METHODS["id3"](), steps=7, train_fully=HEAD)
    run.tuner.load_state_dict(states[0])
    run.optimizer = run.tuner.optimizer(ADAM[0], **ADAM[1])
    run.scheduler = lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (1 + step))
    run.optimizer.load_state_dict(states[1])
    run.scheduler.load_state_dict(states[2])
    run.train(3, 4).assert_equal(whole)


def test_twice() -> None:
    whole = Run(CONV, train_fully=HEAD).train(0, 7)
    first = Run(CONV, train_fully=HEAD).train(0, 2).save()
    second = Run(CONV, train_fully=HEAD).load(first).train(2, 2).save()
    Run(CONV, train_fully=HEAD).load(second).train(4, 3).assert_equal(whole)


def test_loading_writes_the_weights_into_the_model() -> None:
    there = Run(CONV, train_fully=HEAD).train(0, 4)
    here = Run(CONV, train_fully=HEAD)
    here.tuner.load_state_dict(there.tuner.state_dict())
    assert_same_state(snapshot(here.model), snapshot(there.model))


def test_loading_into_a_run_that_went_on_goes_back() -> None:
    run = Run(CONV, train_fully=HEAD).train(0, 3)
    data = run.save()
    at_three = Run(CONV, train_fully=HEAD).train(0, 3)
    run.train(3, 4).load(data).assert_equal(at_three)
    whole = Run(CONV, train_fully=HEAD).train(0, 7)
    run.train(3, 4).assert_equal(whole)


def test_detach_after_resume_restores_the_base() -> None:
    base = snapshot(CONV.build())
    data = Run(CONV, train_fully=HEAD).train(0, 3).save()
    run = Run(CONV, train_fully=HEAD).load(data).train(3, 4)
    delta = run.tuner.detach()
    assert_same_state(snapshot(run.model), base)
    whole = Run(CONV, train_fully=HEAD).train(0, 7)
    delta.apply(run.model)
    assert_same_state(snapshot(run.model), snapshot(whole.model))


def test_a_model_that_holds_the_checkpoint_already() -> None:
    """As after `from_pretrained(checkpoint)`: training goes on, and the base is still known."""
    base = snapshot(CONV.build())
    whole = Run(CONV, train_fully=HEAD).train(0, 7)
    at_three = Run(CONV, train_fully=HEAD).train(0, 3)
    model = CONV.build()
    model.load_state_dict(at_three.model.state_dict())
    run = Run(replace(CONV, make=lambda: model), train_fully=HEAD).load(at_three.save())
    run.train(3, 4).assert_equal(whole)
    run.tuner.detach()
    assert_same_state(snapshot(model), base)


def test_a_state_is_a_snapshot() -> None:
    """Training on must not change a state that was taken before."""
    run = Run(CONV, train_fully=HEAD).train(0, 3)
    state = run.tuner.state_dict()
    kept = copy.deepcopy(state)
    run.train(3, 4)
    assert same_tree(state, kept)


def test_a_loaded_state_stays_the_callers() -> None:
    state = Run(CONV, train_fully=HEAD).train(0, 3).tuner.state_dict()
    kept = copy.deepcopy(state)
    run = Run(CONV, train_fully=HEAD)
    run.tuner.load_state_dict(state)
    run.train(3, 4)
    assert same_tree(state, kept)


def flat(tree: object) -> list[object]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in flat(value)]
    if isinstance(tree, list | tuple):
        return [leaf for value in tree for leaf in flat(value)]
    return [tree]


def test_a_state_holds_plain_things_and_is_small() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2))
    tuner = unmask.attach(model, unmask.id3(budget=100), steps=2)
    optimizer = tuner.optimizer(torch.optim.Adam, lr=0.1)
    model(torch.randn(2, 300)).sum().backward()
    optimizer.step()
    leaves = flat(tuner.state_dict())
    assert all(type(x) in (Tensor, int, float, str, bool, type(None)) for x in leaves)
    file = io.BytesIO()
    torch.save(tuner.state_dict(), file)
    assert len(file.getvalue()) < 20_000


# A state for something else


def state_of(case: Case, budget: int, steps: int = 7, **kw: Any) -> dict[str, Any]:
    model = case.build()
    tuner = unmask.attach(model, unmask.id3(budget=budget), steps=steps, **kw)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    case.loss(model, 0).backward()
    optimizer.step()
    return tuner.state_dict()


@pytest.mark.parametrize(
    "state",
    [
        lambda: state_of(MLP, 31),
        lambda: state_of(TRANSFORMER, 30),
        lambda: state_of(MLP, 30, train_fully=HEAD),
        lambda: state_of(MLP, 30, exclude=("first*",)),
        dict,
    ],
    ids=["budget", "model", "head", "eligible", "empty"],
)
def test_a_state_for_something_else_is_refused_whole(state: Callable[[], dict[str, Any]]) -> None:
    run = Run(MLP).train(0, 2)
    before = (snapshot(run.model), copy.deepcopy(run.tuner.state_dict()))
    with pytest.raises(unmask.UnmaskError):
        run.tuner.load_state_dict(state())
    assert_same_state(snapshot(run.model), before[0])
    assert same_tree(run.tuner.state_dict(), before[1])
    run.train(2, 2).assert_equal(Run(MLP).train(0, 4))


def with_slots(state: dict[str, Any], name: str, at: int | None, value: Any) -> dict[str, Any]:
    """The state with another part in its table, or with another entry in one."""
    slots = copy.deepcopy(state["slots"])
    if at is None:
        slots[name] = value(slots[name])
    else:
        slots[name][at] = value
    return {**state, "slots": slots}


NOTHING = torch.empty(0, dtype=torch.int32)
DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda state: None,
    "a list": lambda state: list(state),
    "a table without parts": lambda state: {**state, "slots": {}},
    "too high": lambda state: with_slots(state, "index", -1, 2**31 - 5),
    "negative": lambda state: with_slots(state, "index", 0, -5_000_000),
    "beyond int32": lambda state: with_slots(state, "index", None, lambda t: t.long() + 2**32),
    "unsorted": lambda state: with_slots(state, "index", None, lambda t: t.flip(0)),
    "not whole": lambda state: with_slots(state, "index", None, lambda t: t.float()),
    "of two dimensions": lambda state: with_slots(state, "index", None, lambda t: t[None]),
    "far position": lambda state: with_slots(state, "position", 0, 10**8),
    "negative position": lambda state: with_slots(state, "position", 0, -1),
    "position twice": lambda state: with_slots(state, "position", 0, 1),
    "few positions": lambda state: with_slots(state, "position", None, lambda t: t[1:]),
    "few values": lambda state: with_slots(state, "values", None, lambda t: t[:3]),
    "half values": lambda state: with_slots(state, "values", None, lambda t: t.half()),
    "few of the base": lambda state: with_slots(state, "base", None, lambda t: t[:3]),
    "no number": lambda state: with_slots(state, "base", None, lambda t: None),
    "few of the retired": lambda state: with_slots(state, "retired", None, lambda t: t[1:]),
    "retired and current": lambda state: with_slots(
        state, "retired", 0, state["slots"]["index"].min()
    ),
    "too many handed out": lambda state: with_slots(state, "handed_out", None, lambda t: t + 99),
    "too few handed out": lambda state: with_slots(state, "handed_out", None, lambda t: t - 1),
    "no count handed out": lambda state: with_slots(state, "handed_out", None, lambda t: NOTHING),
    **{f"{key} is None": lambda state, key=key: {**state, key: None}  # type: ignore[misc]
       for key in ("step", "updates", "slots", "seen", "heard", "whole", "whole_base")},
    "half a step": lambda state: {**state, "step": 1.5},
    "step back": lambda state: {**state, "step": -1},
    "true updates": lambda state: {**state, "updates": True},
    "heard words": lambda state: {**state, "heard": ["1.0"]},
    "seen elsewhere": lambda state: {**state, "seen": {"x": torch.ones(1)}},
    "seen no tensor": lambda state: {**state, "seen": {"first.weight": 1}},
    "no head": lambda state: {**state, "whole": {}},
    "no head's base": lambda state: {**state, "whole_base": {}},
    "an old base of the head": lambda state: {
        **state, "whole_base": {n: t.double() for n, t in state["whole_base"].items()}
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused_whole(damage: str) -> None:
    make = METHODS["repeat"]  # which retires scalars
    state = Run(MLP, make, train_fully=HEAD).train(0, 3).tuner.state_dict()
    assert len(state["slots"]["retired"]) > 1
    run = Run(MLP, make, train_fully=HEAD).train(0, 2)
    before = (snapshot(run.model), copy.deepcopy(run.tuner.state_dict()))
    with pytest.raises(unmask.UnmaskError):
        run.tuner.load_state_dict(DAMAGE[damage](state))
    assert_same_state(snapshot(run.model), before[0])
    assert same_tree(run.tuner.state_dict(), before[1])
    run.tuner.load_state_dict(state)


def test_steps_of_a_damaged_state() -> None:
    """Where the run doesn't know them, the state's are taken over."""
    state = {**Run(MLP).train(0, 3).tuner.state_dict()}
    tuner = unmask.attach(MLP.build(), METHODS["id3"]())
    for steps in ("7", 0, 2.5, True):
        with pytest.raises(unmask.UnmaskError, match=r"steps=.* is no count"):
            tuner.load_state_dict({**state, "steps": steps})
    tuner.load_state_dict(state)
    assert tuner.steps == 7
