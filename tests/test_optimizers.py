"""Every element-wise torch optimiser on the vector equals itself on dense masks.

Bit by bit: an element-wise update is the same arithmetic in a short vector as in a dense tensor.
Only clipping by norm sums in another order, and says so.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import unmask
from lockstep import Pair, assert_same_state, random_grads, same_bits, scalars, snapshot
from models import BF16, CONV, F64, MLP, TRANSFORMER, Case

optim = torch.optim
Setting = tuple[type[optim.Optimizer], dict[str, Any]]

SETTINGS: dict[str, Setting] = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "sgd-decay": (optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "dampening": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "maximize": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "adam": (optim.Adam, {"lr": 0.01}),
    "adam-decay": (optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adam-foreach": (optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "foreach": True}),
    "adam-fused": (optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "adamw": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "amsgrad": (optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adamw-amsgrad": (optim.AdamW, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "rmsprop": (optim.RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop-centered": (optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
    "adagrad": (optim.Adagrad, {"lr": 0.1, "weight_decay": 0.1, "lr_decay": 0.1}),
    "adagrad-start": (optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5}),
    "adadelta": (optim.Adadelta, {"weight_decay": 0.1}),
    "adamax": (optim.Adamax, {"lr": 0.01, "weight_decay": 0.1}),
    "nadam": (optim.NAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "radam": (optim.RAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "rprop": (optim.Rprop, {"lr": 0.01}),
    "asgd": (optim.ASGD, {"lr": 0.01, "lambd": 0.1}),
}


def lockstep(case: Case, setting: str, strategy: str) -> None:
    model = case.build()
    cls, kw = SETTINGS[setting]
    pair = Pair(model, budget=60, steps=4, strategy=strategy, optimizer=cls, **kw)
    source = random_grads(model, 5)
    for _ in range(6):
        pair.set_grads(next(source))
        pair.step()
        pair.assert_equal()


@pytest.mark.parametrize("case", [TRANSFORMER, BF16, F64], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_increment(setting: str, case: Case) -> None:
    lockstep(case, setting, "increment")


@pytest.mark.parametrize("case", [MLP, BF16], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_repeat(setting: str, case: Case) -> None:
    lockstep(case, setting, "repeat")


@pytest.mark.parametrize("setting", ["momentum", "adamw", "amsgrad"])
def test_static(setting: str) -> None:
    lockstep(MLP, setting, "static")


@pytest.mark.parametrize("setting", SETTINGS)
def test_everything_unmasked_is_the_optimiser_itself(setting: str) -> None:
    model = MLP.build()
    plain = copy.deepcopy(model)
    cls, kw = SETTINGS[setting]
    dense = cls(plain.parameters(), **kw)
    tuner = unmask.attach(model, unmask.id3(budget=1.0), steps=1)
    optimizer = tuner.optimizer(cls, **kw)
    for step in range(4):
        for trained, stepper in ((model, optimizer), (plain, dense)):
            MLP.loss(trained, step).backward()
            stepper.step()
            stepper.zero_grad()
        assert_same_state(snapshot(model), snapshot(plain))


@pytest.mark.parametrize("case", [TRANSFORMER, CONV, MLP], ids=str)
def test_full_is_full_fine_tuning(case: Case) -> None:
    model = case.build()
    plain = copy.deepcopy(model)
    dense = optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
    tuner = unmask.attach(model, unmask.full())
    optimizer = tuner.optimizer(optim.AdamW, lr=0.01, weight_decay=0.1)
    for step in range(4):
        for trained, stepper in ((model, optimizer), (plain, dense)):
            case.loss(trained, step).backward()
            stepper.step()
            stepper.zero_grad()
        assert_same_state(snapshot(model), snapshot(plain))
    assert tuner.active == scalars(model)


# The vector


def test_it_is_a_real_optimiser_over_one_vector() -> None:
    model = MLP.build()
    tuner = unmask.attach(model, unmask.id3(budget=25), steps=5)
    optimizer = tuner.optimizer(optim.AdamW, lr=0.01)
    assert isinstance(optimizer, optim.AdamW)
    [values] = [p for group in optimizer.param_groups for p in group["params"]]
    assert isinstance(values, nn.Parameter)
    assert values.shape == (25,)
    assert values.dtype == torch.float32


@pytest.mark.parametrize(("case", "dtype"), [(BF16, torch.float32), (F64, torch.float64)])
def test_the_vector_is_as_wide_as_masters_must_be(case: Case, dtype: torch.dtype) -> None:
    tuner = unmask.attach(case.build(), unmask.id3(budget=25), steps=5)
    optimizer = tuner.optimizer(optim.SGD, lr=0.01)
    assert optimizer.param_groups[0]["params"][0].dtype == dtype


def test_state_is_as_long_as_the_budget() -> None:
    pair = Pair(TRANSFORMER.build(), budget=25, steps=2, optimizer=optim.Adam, lr=0.1)
    pair.train(TRANSFORMER, 3)
    tensors = [t for state in pair.optimizer.state.values() for t in state.values()]
    assert {t.numel() for t in tensors if isinstance(t, Tensor)} == {1, 25}


def test_unfilled_slots_are_zero() -> None:
    pair = Pair(MLP.build(), budget=30, steps=6, optimizer=optim.Adam, lr=0.1, weight_decay=0.1)
    pair.train(MLP, 2)
    [values] = pair.optimizer.param_groups[0]["params"]
    state = pair.optimizer.state[values]
    for tensor in (values.detach(), state["exp_avg"], state["exp_avg_sq"]):
        assert int((tensor != 0).sum()) <= pair.tuner.active == 10


def test_low_precision_weights_gather_small_updates() -> None:
    """256 updates of 1/256 bf16 ulp each: without a float32 master none would ever arrive."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    tuner = unmask.attach(model, unmask.id3(budget=1), steps=1)
    optimizer = tuner.optimizer(optim.SGD, lr=2.0**-15)
    for _ in range(256):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert model.weight.item() == 1 - 2.0**-7


def test_masked_scalars_keep_their_bits() -> None:
    model = TRANSFORMER.build()
    base = snapshot(model)
    tuner = unmask.attach(model, unmask.id3(budget=12), steps=4)
    optimizer = tuner.optimizer(optim.SGD, lr=0.5, momentum=0.9, weight_decay=0.5)
    for step in range(8):
        TRANSFORMER.loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    chosen = tuner.selected()
    moved = 0
    for name, parameter in model.named_parameters():
        masked = torch.ones(parameter.numel(), dtype=torch.bool)
        masked[chosen.get(name, torch.empty(0, dtype=torch.long))] = False
        now, before = parameter.detach().flatten(), base[name].flatten()
        assert same_bits(now[masked], before[masked])
        moved += int((now != before).sum())
    assert moved == 12


def test_second_optimizer_is_refused_or_works() -> None:
    model = MLP.build()
    tuner = unmask.attach(model, unmask.id3(budget=12), steps=4)
    tuner.optimizer(optim.SGD, lr=0.1)
    try:
        second = tuner.optimizer(optim.SGD, lr=0.1)
    except unmask.UnmaskError:
        return
    MLP.loss(model, 0).backward()
    second.step()
    assert tuner.active == 3


def test_own_element_wise_optimiser() -> None:
    class Lion(optim.Optimizer):
        def __init__(self, params: Any, lr: float = 0.01, beta: float = 0.9) -> None:
            super().__init__(params, {"lr": lr, "beta": beta})

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    mean = state.setdefault("mean", torch.zeros_like(p))
                    p.sub_(group["lr"] * (mean * group["beta"] + p.grad * 0.1).sign())
                    mean.mul_(0.99).add_(p.grad, alpha=0.01)

    Pair(MLP.build(), budget=40, steps=4, optimizer=Lion, lr=0.01).train(MLP, 5)


# Learning-rate schedules, clipping


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    ],
    ids=["lambda", "one-cycle", "cosine"],
)
def test_learning_rate_schedules(make: Callable[[optim.Optimizer], Any]) -> None:
    pair = Pair(
        MLP.build(), budget=40, steps=4, optimizer=optim.AdamW, lr=0.01, train_fully=MLP.head
    )
    schedulers = [make(pair.optimizer), make(pair.reference.optimizer)]
    for step in range(6):
        pair.train(MLP, 1, first=step)
        for scheduler in schedulers:
            scheduler.step()
    assert schedulers[0].get_last_lr() == pytest.approx(schedulers[1].get_last_lr())


def test_clip_value_is_exact() -> None:
    pair = Pair(MLP.build(), budget=40, steps=4, lr=0.1, momentum=0.9)
    for step in range(5):
        pair.backward(MLP, step)
        torch.nn.utils.clip_grad_value_(pair.optimizer.param_groups[0]["params"], 0.01)
        inner, step_inner = pair.reference.optimizer, pair.reference.optimizer.step

        def clipped(inner: Any = inner, step_inner: Any = step_inner) -> None:
            torch.nn.utils.clip_grad_value_(inner.param_groups[0]["params"], 0.01)
            step_inner()

        pair.reference.optimizer.step = clipped  # type: ignore[method-assign, assignment]
        pair.step()
        pair.reference.optimizer.step = step_inner  # type: ignore[method-assign]
        pair.assert_equal()


def test_clip_norm_is_over_what_is_trained() -> None:
    """The norm sums B numbers here, N numbers with zeros there: equal up to rounding."""
    pair = Pair(MLP.build(), budget=40, steps=4, lr=0.1, momentum=0.9, train_fully=("classifier*",))
    params = [p for group in pair.optimizer.param_groups for p in group["params"]]
    inner = pair.reference.optimizer
    step_inner = inner.step
    norms: list[float] = []

    def clipped() -> None:
        dense = [p for group in inner.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.clip_grad_norm_(dense, 0.05)))
        step_inner()

    inner.step = clipped  # type: ignore[method-assign, assignment]
    for step in range(6):
        pair.backward(MLP, step)
        norm = torch.nn.utils.clip_grad_norm_(params, 0.05)
        pair.step()
        assert float(norm) == pytest.approx(norms[-1], rel=1e-5)
        for ours, theirs in zip(
            pair.model.parameters(), pair.reference.model.parameters(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        pair.assert_masked_untouched()
    assert max(norms) > 0.05


# Optimisers that need more than one element at a time


class TrustRatio(optim.Optimizer):
    """SGD whose step is scaled by the ratio of two norms of the whole tensor, as in LAMB."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    trust = p.norm() / (p.grad.norm() + 1e-6)
                    p.add_(p.grad, alpha=-group["lr"] * float(trust))


REFUSED = [(optim.Adafactor, {}), (optim.LBFGS, {}), (TrustRatio, {}), (TrustRatio, {"lr": 1e-6})]
if hasattr(optim, "Muon"):
    REFUSED.append((optim.Muon, {"lr": 0.01}))


@pytest.mark.parametrize(("cls", "kw"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_optimisers_that_are_not_element_wise_are_refused(
    cls: type[optim.Optimizer], kw: dict[str, Any]
) -> None:
    model = MLP.build()
    tuner = unmask.attach(model, unmask.id3(budget=12), steps=4)
    with pytest.raises(unmask.UnmaskError, match=r"(?i)element|shape|matrix|vector|norm") as caught:
        tuner.optimizer(cls, **kw)
    assert cls.__name__ in str(caught.value)
    tuner.optimizer(optim.SGD, lr=0.1)  # a refusal leaves the tuner usable


def test_an_instance_or_nonsense_is_a_clear_mistake() -> None:
    model = MLP.build()
    tuner = unmask.attach(model, unmask.id3(budget=12), steps=4)
    with pytest.raises(unmask.UnmaskError):
        tuner.optimizer(optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(unmask.UnmaskError):
        tuner.optimizer("adamw", lr=0.1)  # type: ignore[arg-type]
