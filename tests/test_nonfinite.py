"""A NaN or an infinity in a gradient: the step is skipped and nothing has happened."""

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unmask
from lockstep import Pair, random_grads, same_bits, same_tree, snapshot
from models import BF16, MLP, TRANSFORMER, Case
from unmask import UnmaskWarning

BAD = [math.nan, math.inf, -math.inf]


def state_of(pair: Pair) -> object:
    tuner = pair.tuner
    return copy.deepcopy(
        {
            "weights": snapshot(pair.model),
            "tuner": tuner.state_dict(),
            "optimizer": pair.optimizer.state_dict(),
            "selected": tuner.selected(),
            "counts": [tuner.active, tuner.updates, tuner.step],
        }
    )


def make(case: Case = MLP, strategy: str = "increment", **kw: Any) -> Pair:
    return Pair(
        case.build(), budget=40, steps=4, strategy=strategy,
        optimizer=torch.optim.AdamW, lr=0.01, weight_decay=0.1, **kw,
    )  # fmt: skip


def poisoned(grads: Mapping[str, Tensor], name: str, index: int, value: float) -> dict[str, Tensor]:
    grads = {key: grad.clone() for key, grad in grads.items()}
    grads[name].view(-1)[index] = value
    return grads


def assert_skipped(pair: Pair, grads: Mapping[str, Tensor]) -> None:
    before = state_of(pair)
    pair.set_grads(grads)
    with pytest.warns(UnmaskWarning, match="(?i)nan|finite|inf"):
        pair.step()
    assert same_tree(state_of(pair), before)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("strategy", ["increment", "repeat"])
def test_skipped_and_then_on_as_if_nothing_was(value: float, when: int, strategy: str) -> None:
    pair = make(strategy=strategy)
    source = random_grads(pair.model, 0)
    for step in range(5):
        if step == when:
            assert_skipped(pair, poisoned(next(source), "second.weight", 77, value))
        pair.set_grads(next(source))
        pair.step()
        pair.assert_equal()


@pytest.mark.parametrize("value", BAD)
def test_static_reads_all_once_and_then_its_own(value: float) -> None:
    pair = make(strategy="static")
    source = random_grads(pair.model, 0)
    assert_skipped(pair, poisoned(next(source), "second.weight", 77, value))
    pair.train(MLP, 2)
    name, index = next((name, int(i[-1])) for name, i in pair.reference.selected().items())
    assert_skipped(pair, poisoned(next(source), name, index, value))
    pair.train(MLP, 2, first=3)


@pytest.mark.parametrize(("name", "index"), [("first.weight", 0), ("classifier.bias", 2)])
def test_at_either_end(name: str, index: int) -> None:
    pair = make()
    assert_skipped(pair, poisoned(next(random_grads(pair.model, 0)), name, index, math.nan))


@pytest.mark.parametrize("case", [BF16, TRANSFORMER], ids=str)
@pytest.mark.parametrize("value", BAD)
def test_other_models(case: Case, value: float) -> None:
    pair = make(case)
    pair.train(case, 1)
    assert_skipped(pair, poisoned(next(random_grads(pair.model, 0)), "mlp.2.weight", 5, value))
    pair.train(case, 4, first=2)


def test_on_an_unmasked_scalar_after_the_schedule() -> None:
    pair = make()
    pair.train(MLP, 4)
    name, index = next((name, int(i[0])) for name, i in pair.reference.selected().items())
    assert_skipped(pair, poisoned(next(random_grads(pair.model, 0)), name, index, math.nan))
    pair.train(MLP, 2, first=5)


def test_in_the_fully_trained_head() -> None:
    pair = make(train_fully=("classifier*",))
    pair.train(MLP, 1)
    grads = next(random_grads(pair.model, 0))
    assert_skipped(pair, poisoned(grads, "classifier.bias", 0, math.inf))
    pair.train(MLP, 4, first=2)


@pytest.mark.parametrize("exp", [0.0, -1.0, 2.0])
@pytest.mark.parametrize("value", BAD)
def test_with_any_exponent(exp: float, value: float) -> None:
    pair = make(exp=exp)
    assert_skipped(pair, poisoned(next(random_grads(pair.model, 0)), "first.bias", 3, value))


def test_in_a_large_tensor_whose_blocks_could_be_passed_over() -> None:
    """After a first step has set a threshold, a NaN in a quiet block must still be seen."""
    torch.manual_seed(0)
    model = nn.Linear(1_000, 400, bias=False)
    pair = Pair(model, budget=100, steps=4, lr=0.1)
    grad = torch.zeros(400, 1_000)
    grad[0] = 1.0
    for spot in (0, 123_457, 399_999):
        pair.set_grads({"weight": grad})
        pair.step()
        assert_skipped(pair, poisoned({"weight": grad}, "weight", spot, math.nan))
        assert_skipped(pair, poisoned({"weight": grad}, "weight", spot, math.inf))
    pair.assert_equal()


def test_nan_from_a_real_backward() -> None:
    pair = make()
    (MLP.loss(pair.model, 0) * math.nan).backward()
    before = state_of(pair)
    with pytest.warns(UnmaskWarning):
        pair.optimizer.step()
    pair.optimizer.zero_grad()
    assert same_tree(state_of(pair), before)
    pair.train(MLP, 5)


def test_clipping_a_nan_gradient_and_stepping() -> None:
    """The usual loop clips before it steps: the clip turns every gradient into NaN."""
    pair = make()
    pair.train(MLP, 1)
    before = state_of(pair)
    pair.set_grads(poisoned(next(random_grads(pair.model, 0)), "first.weight", 9, math.nan))
    torch.nn.utils.clip_grad_norm_(pair.optimizer.param_groups[0]["params"], 1.0)
    with pytest.warns(UnmaskWarning):
        pair.optimizer.step()
    pair.optimizer.zero_grad()
    pair.reference.zero_grad()
    assert same_tree(state_of(pair), before)
    pair.train(MLP, 3, first=2)


def scaled_step(pair: Pair, scaler: Any, step: int, factor: float, unscale: bool) -> None:
    loss = MLP.loss(pair.model, step) * factor
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(pair.optimizer)
    scaler.step(pair.optimizer)
    scaler.update()
    pair.optimizer.zero_grad()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("head", [(), ("classifier*",)], ids=["no-head", "head"])
def test_grad_scaler_skips_the_infinite_step(unscale: bool, head: tuple[str, ...]) -> None:
    """Scales are powers of two, so scaled training is bitwise the plain one."""
    pair = make(train_fully=head)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, growth_interval=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnmaskWarning)  # the scaler reports in its own way
        for step in range(6):
            if step in (0, 3):
                before, scale = state_of(pair), scaler.get_scale()
                scaled_step(pair, scaler, step, math.inf, unscale)
                assert same_tree(state_of(pair), before)
                assert scaler.get_scale() == scale / 2
            scaled_step(pair, scaler, step, 1.0, unscale)
            MLP.loss(pair.reference.model, step).backward()
            pair.reference.step()
            pair.reference.zero_grad()
            pair.assert_equal()


def test_grad_scaler_with_clipping() -> None:
    pair = make()
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10)
    params = pair.optimizer.param_groups[0]["params"]
    for step in range(4):
        scaler.scale(MLP.loss(pair.model, step)).backward()
        scaler.unscale_(pair.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, 1e6)
        scaler.step(pair.optimizer)
        scaler.update()
        pair.optimizer.zero_grad()
        MLP.loss(pair.reference.model, step).backward()
        pair.reference.step()
        pair.reference.zero_grad()
        assert bool(norm > 0)
        pair.assert_equal()


def test_a_masked_weight_that_is_nan_is_never_chosen_before_others() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[math.nan, 1.0, 2.0, 3.0]]))
    tuner = unmask.attach(model, unmask.id3(budget=2), steps=1)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    model.weight.grad = torch.ones(1, 4)
    before = model.weight.detach().clone()
    optimizer.step()
    assert tuner.selected()["weight"].tolist() == [1, 2]
    assert same_bits(model.weight[0, :1], before[0, :1])
