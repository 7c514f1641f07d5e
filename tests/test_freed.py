"""Who drops a model in training, detached or not, has its memory back."""

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import unmask
from models import ALL, CONV, MLP, TRANSFORMER, Case, pretrained

with contextlib.suppress(ImportError):
    import bitsandbytes  # noqa: F401  # logs an exception, which holds what is on the stack

pytestmark = [
    pytest.mark.filterwarnings("ignore::unmask.UnmaskWarning"),
    pytest.mark.filterwarnings("ignore:.*will be removed in v6.*:FutureWarning"),
]


def watched(model: nn.Module) -> list[weakref.ref[Any]]:
    return [weakref.ref(model), *map(weakref.ref, model.parameters())]


def alive(refs: list[weakref.ref[Any]]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in refs)


def trained(case: Case, gradients: str, **options: Any) -> tuple[unmask.Tuner, list[Any]]:
    model = case.build()
    method = unmask.id3(budget=20, schedule=unmask.Strided(every=2))
    tuner = unmask.attach(model, method, steps=9, gradients=gradients, **options)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.01)
    for step in range(3):
        case.loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuner, watched(model)


@pytest.mark.parametrize("gradients", ["dense", "streaming", "sampled"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_in_the_middle_of_a_run(case: Case, gradients: str) -> None:
    tuner, refs = trained(case, gradients)
    assert alive(refs) == len(refs)
    del tuner
    assert not alive(refs)


@pytest.mark.parametrize("gradients", ["dense", "streaming", "sampled"])
@pytest.mark.parametrize("case", [CONV, MLP, TRANSFORMER], ids=str)
def test_with_a_head_and_detached(case: Case, gradients: str) -> None:
    tuner, refs = trained(case, gradients, train_fully=case.head)
    tuner.detach()
    del tuner
    assert not alive(refs)


def test_the_optimizer_alone_keeps_a_run_going() -> None:
    model = MLP.build()
    tuner = unmask.attach(model, unmask.id3(budget=20), steps=4, gradients="streaming")
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.01)
    del tuner
    gc.collect()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    MLP.loss(model, 0).backward()
    optimizer.step()
    changed = sum(int((p != before[name]).sum()) for name, p in model.named_parameters())
    assert changed == 5


def test_with_peft() -> None:
    peft = pytest.importorskip("peft")
    from unmask.integrations.peft import UnmaskConfig

    model = peft.get_peft_model(pretrained(), UnmaskConfig(budget=40, steps=9))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        batch = {"input_ids": torch.ones(2, 8).long(), "labels": torch.zeros(2).long()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    refs = watched(model)
    assert alive(refs) == len(refs)
    del model, optimizer
    assert not alive(refs)
