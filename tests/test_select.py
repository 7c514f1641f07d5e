"""`TopK` where many are chosen at once: its threshold is foretold from a sample of blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unmask import select
from unmask.heuristics import D3
from unmask.kernels import compiled_for
from unmask.select import Piece, TopK

cpu_sweep = pytest.importorskip("unmask.kernels.cpu_sweep")
SIZES = (300_000, 1, 77_777, 400_000)
COUNT = 9_000


def alike(_: Tensor) -> Tensor:
    """Blocks are alike."""
    return torch.tensor(1.0)


def more_in_the_sample(block: Tensor) -> Tensor:
    """The blocks that are looked at first promise too much."""
    return torch.where(block % select.SAMPLE == 0, 50.0, 1.0)


def less_in_the_sample(block: Tensor) -> Tensor:
    """Or too little, so that far too many are found."""
    return torch.where(block % select.SAMPLE == 0, 0.02, 1.0)


def only_in_the_sample(block: Tensor) -> Tensor:
    """The others have nothing."""
    return torch.where(block % select.SAMPLE == 0, 1.0, 0.0)


def nothing(_: Tensor) -> Tensor:
    """No gradient at all."""
    return torch.tensor(0.0)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "size", [alike, more_in_the_sample, less_in_the_sample, only_in_the_sample, nothing]
)
def test_many_are_chosen_as_if_all_were_sorted(
    size: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    equal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    total = sum(SIZES)
    block = torch.arange(total) // cpu_sweep.BLOCK
    gradient = (torch.ones(total) if equal else torch.randn(total)) * size(block)
    weight = torch.full((total,), 0.5) if equal else torch.randn(total)
    grads = [x.to(dtype) for x in gradient.split(SIZES)]
    thetas = [x.to(dtype) for x in weight.split(SIZES)]
    assert compiled_for(*grads, *thetas)
    offsets = [sum(SIZES[:k]) for k in range(len(SIZES))]
    kept = torch.randperm(total)[:20_000].sort().values.int()
    cuts = [0, *torch.searchsorted(kept, torch.tensor([*offsets[1:], total])).tolist()]
    into = torch.full((len(kept),), -0.0)
    pieces = [
        Piece(f"p{k}", offsets[k], thetas[k], grads[k], kept, cuts[k], cuts[k + 1], into)
        for k in range(len(SIZES))
    ]
    original, foretold = TopK._foretold, []

    def spy(self: TopK, *args: object) -> float:
        foretold.append(original(self, *args))
        return foretold[-1]

    monkeypatch.setattr(TopK, "_foretold", spy)
    top = TopK(COUNT, D3(1.0, 0.5), torch.device("cpu"))
    top.offer(pieces)
    index, found = top.best()

    flat = torch.cat([g.float() for g in grads])
    score = flat.abs() / (torch.cat([t.float() for t in thetas]).abs() + 0.5)
    score[kept.long()] = -1.0
    expected = score.sort(descending=True, stable=True).indices[:COUNT].sort().values
    assert torch.equal(index, expected)
    assert torch.equal(found, flat[expected])
    assert torch.equal(into, flat[kept.long()])  # added up once, however often they are looked at
    if not equal and size in (alike, more_in_the_sample):
        assert (foretold[0] <= score[expected].min()) == (size is alike)


def test_few_are_not_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopK, "_foretold", None)
    grad = torch.randn(100_000)
    none = torch.empty(0, dtype=torch.int32)
    top = TopK(select.CROWD - 1, D3(), torch.device("cpu"))
    top.offer([Piece("p", 0, torch.zeros_like(grad), grad, none, 0, 0)])
    chosen = grad.abs().topk(select.CROWD - 1).indices.sort().values
    assert torch.equal(top.best()[0], chosen)
