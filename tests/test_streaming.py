"""Streaming consumes gradients during backward; every result is the dense mode's, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unmask
from lockstep import METHODS, assert_same_state, chosen, same_tree, snapshot
from models import ALL, MLP, Case, Mlp, numbers

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


class Run:
    """One model trained in one mode."""

    def __init__(self, case: Case, method: unmask.Method, gradients: str, **kw: Any) -> None:
        self.case, self.model = case, case.build()
        self.tuner = unmask.attach(self.model, method, steps=5, gradients=gradients, **kw)
        self.optimizer = self.tuner.optimizer(torch.optim.AdamW, **ADAMW)

    def train(self, steps: int, backwards: int = 1) -> "Run":
        for step in range(steps):
            for part in range(backwards):
                self.case.loss(self.model, 10 * step + part).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


def assert_alike(a: Run, b: Run) -> None:
    assert chosen(a.tuner) == chosen(b.tuner)
    assert (a.tuner.active, a.tuner.updates) == (b.tuner.active, b.tuner.updates)
    assert_same_state(snapshot(a.model), snapshot(b.model))
    assert same_tree(a.optimizer.state_dict(), b.optimizer.state_dict())


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
@pytest.mark.parametrize("name", METHODS)
def test_every_model(name: str, case: Case) -> None:
    dense, streaming = (Run(case, METHODS[name](budget=20), mode) for mode in MODES)
    assert_alike(dense.train(7), streaming.train(7))


MODES = ("dense", "streaming")
OTHERS = {
    "strided": unmask.id3(budget=20, schedule=unmask.Strided(every=3)),
    "all": unmask.full(),
    "pafi": unmask.pafi(budget=20),
    "random": unmask.random_mask(budget=20),
    "half": unmask.id3(budget=0.5, exp=0.7, eps=0.01),
    "large-first": unmask.id3(budget=20, exp=-1.0),
}


@pytest.mark.parametrize("method", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("backwards", [1, 3])
def test_every_kind_of_choice_also_accumulated(method: unmask.Method, backwards: int) -> None:
    dense, streaming = (Run(MLP, method, mode, accumulation=backwards) for mode in MODES)
    assert_alike(dense.train(6, backwards), streaming.train(6, backwards))


def test_no_gradient_is_left_and_only_one_lives_at_a_time() -> None:
    run = Run(MLP, unmask.id3(budget=20), "streaming")
    alive: list[int] = []

    def count(_: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in run.model.parameters()))

    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    run.train(2)
    run.case.loss(run.model, 0).backward()
    assert max(alive) <= 1
    assert all(p.grad is None for p in run.model.parameters())


def test_accumulation_without_a_choice_keeps_nothing_between_passes() -> None:
    run = Run(MLP, unmask.static_d3(budget=20), "streaming", accumulation=2).train(1, 2)
    run.case.loss(run.model, 0).backward()
    assert all(p.grad is None for p in run.model.parameters())


def test_more_passes_than_said_are_refused_with_the_remedy() -> None:
    run = Run(MLP, unmask.id3(budget=20), "streaming").train(1)
    run.case.loss(run.model, 0).backward()
    with pytest.raises(unmask.UnmaskError, match=r"accumulation=1.*accumulation="):
        run.case.loss(run.model, 1).backward()


def test_a_step_without_a_full_round_takes_what_there_is() -> None:
    """The last batches of an epoch may be fewer than the accumulation says."""
    dense, streaming = (Run(MLP, unmask.id3(budget=20), m, accumulation=3) for m in MODES)
    assert_alike(dense.train(3, 2), streaming.train(3, 2))


def test_clipping_sees_what_is_trained() -> None:
    runs = [Run(MLP, unmask.id3(budget=20), mode) for mode in MODES]
    for run in runs:
        for step in range(5):
            run.case.loss(run.model, step).backward()
            nn.utils.clip_grad_norm_(run.optimizer.param_groups[0]["params"], 1e-3)
            run.optimizer.step()
            run.model.zero_grad()  # as trainers do, past the optimiser
    assert_alike(*runs)


def test_a_step_with_infinite_gradients_is_skipped() -> None:
    runs = [Run(MLP, unmask.id3(budget=20), mode).train(2) for mode in MODES]
    for run in runs:
        (run.case.loss(run.model, 0) * torch.inf).backward()
        with pytest.warns(unmask.UnmaskWarning, match="skipped"):
            run.optimizer.step()
        run.optimizer.zero_grad()
        run.train(3)
    assert_alike(*runs)


def test_checkpointed_layers() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.first, self.second):
                x = checkpoint(lambda y, layer=layer: layer(y).tanh(), x, use_reentrant=False)
            return self.classifier(x)

    case = Case("checkpointed", Checkpointed, numbers(5, 6))
    dense, streaming = (Run(case, unmask.id3(budget=20), mode) for mode in MODES)
    assert_alike(dense.train(4), streaming.train(4))


@pytest.mark.parametrize("wrong", [{"gradients": "lazy"}, {"accumulation": 0}])
def test_mistakes(wrong: dict[str, Any]) -> None:
    with pytest.raises(unmask.UnmaskError, match=next(iter(wrong))):
        unmask.attach(Mlp(), unmask.id3(budget=2), steps=1, **wrong)


class Both(nn.Module):
    """A weight whose gradient is sparse in one pass and dense in another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(9, 4))

    def forward(self, sparse: bool) -> Tensor:
        if sparse:
            return nn.functional.embedding(torch.tensor([1, 1, 5]), self.weight, sparse=True).sum()
        return self.weight.square().sum()


@pytest.mark.parametrize("order", [(True, False), (False, True), (True, True)])
def test_sparse_and_dense_gradients_of_one_weight_add_up(order: tuple[bool, bool]) -> None:
    weights = []
    for mode, given in (("dense", {}), ("streaming", {"accumulation": 2})):
        model = Both()
        tuner = unmask.attach(model, unmask.id3(budget=20), steps=2, gradients=mode, **given)
        optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(2):
            for sparse in order:
                model(sparse).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.weight)
    assert torch.equal(*weights)
