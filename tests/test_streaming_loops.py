"""Streaming in every kind of training loop, against the dense reference, step by step."""

import math
from typing import Any

import pytest
import torch

import unmask
from lockstep import Pair, assert_same_state, chosen, snapshot
from models import BF16, F64, MIXED, MLP, TRANSFORMER, Case

ADAMW: dict[str, Any] = {"optimizer": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1}


def streaming(case: Case, accumulation: int = 1, **kw: Any) -> Pair:
    how = {"gradients": "streaming", "accumulation": accumulation}
    return Pair(case.build(), **{"budget": 37, "steps": 5, **ADAMW, "how": how, **kw})


@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
def test_beside_a_fully_trained_head(strategy: str) -> None:
    streaming(MLP, strategy=strategy, train_fully=MLP.head).train(MLP, 7)


@pytest.mark.parametrize("strategy", ["increment", "repeat"])
@pytest.mark.parametrize("case", [TRANSFORMER, F64, BF16, MIXED], ids=str)
def test_micro_batches(case: Case, strategy: str) -> None:
    """A sum is rounded as the model's dtype rounds it, within the schedule and beyond it."""
    pair = streaming(case, accumulation=2, strategy=strategy)
    for step in range(7):
        pair.backward(case, 2 * step)
        pair.backward(case, 2 * step + 1)
        pair.step()
        pair.assert_equal()


def test_rounds_of_any_length_up_to_what_was_announced() -> None:
    pair = streaming(MLP, accumulation=3)
    for step, passes in enumerate([3, 1, 3, 2, 3, 1, 2]):
        for number in range(passes):
            pair.backward(MLP, 10 * step + number)
        pair.step()
        pair.assert_equal()


@pytest.mark.parametrize("look", [False, True])
def test_dropped_gradients_leave_no_trace(look: bool) -> None:
    pair = streaming(MLP)
    for step in range(6):
        MLP.loss(pair.model, 50 + step).backward()
        if look:
            assert pair.optimizer.param_groups[0]["params"][0].grad is not None
        pair.optimizer.zero_grad()
        pair.assert_equal()
        pair.train(MLP, 1, first=step)


def test_gradients_dropped_amid_a_round_leave_no_trace() -> None:
    pair = streaming(MLP, accumulation=2)
    for step in range(6):
        MLP.loss(pair.model, 50 + step).backward()
        pair.optimizer.zero_grad()
        for part in range(2):
            pair.backward(MLP, 2 * step + part)
        pair.step()
        pair.assert_equal()


def test_zero_grad_before_backward() -> None:
    pair = streaming(MLP)
    for step in range(6):
        pair.optimizer.zero_grad()
        pair.reference.zero_grad()
        pair.backward(MLP, step)
        pair.optimizer.step()
        pair.reference.step()
        pair.assert_equal()


def test_no_zero_grad_at_all() -> None:
    """Streaming leaves nothing to clear, so a loop may forget to; the next round starts anew."""
    pair = streaming(MLP)
    for step in range(6):
        pair.backward(MLP, step)
        pair.optimizer.step()
        pair.reference.step()
        pair.reference.zero_grad()
        pair.assert_equal()


def test_a_refused_pass_can_be_dropped() -> None:
    pair = streaming(MLP)
    for step in range(6):
        MLP.loss(pair.model, step).backward()
        with pytest.raises(unmask.UnmaskError, match="accumulation"):
            MLP.loss(pair.model, step).backward()
        pair.optimizer.zero_grad()
        pair.assert_equal()
        pair.train(MLP, 1, first=step)


@pytest.mark.parametrize("strategy", ["increment", "repeat"])
def test_a_nan_is_skipped_at_any_step(strategy: str) -> None:
    pair = streaming(MLP, strategy=strategy, train_fully=MLP.head)
    for step in range(7):
        before = snapshot(pair.model), chosen(pair.tuner), pair.tuner.updates
        (MLP.loss(pair.model, step) * math.nan).backward()
        with pytest.warns(unmask.UnmaskWarning):
            pair.optimizer.step()
        pair.optimizer.zero_grad()
        assert_same_state(before[0], snapshot(pair.model))
        assert before[1:] == (chosen(pair.tuner), pair.tuner.updates)
        pair.train(MLP, 1, first=step)


def test_grad_scaler() -> None:
    pair = streaming(MLP)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10)
    for step in range(6):
        for factor in (1.0, math.inf) if step == 2 else (1.0,):
            scale = scaler.get_scale()
            scaler.scale(MLP.loss(pair.model, step) * factor).backward()
            scaler.step(pair.optimizer)
            scaler.update()
            pair.optimizer.zero_grad()
            assert scaler.get_scale() == (scale if factor == 1.0 else scale / 2)
        MLP.loss(pair.reference.model, step).backward()
        pair.reference.step()
        pair.reference.zero_grad()
        pair.assert_equal()


def test_detach_gives_the_gradients_back() -> None:
    model = MLP.build()
    unmask.attach(model, unmask.id3(budget=40), steps=4, gradients="streaming").detach()
    MLP.loss(model, 0).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
