"""The compiled CPU sweep by itself: it misses nothing, filters well, and adds up what it passes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lockstep import same_bits
from models import seeded
from unmask.heuristics import D3, Scalars

cpu = pytest.importorskip("unmask.kernels.cpu")

SIZES = (3000, 0, 1, 1024, 2500, 7, 130_000)
LAWS = [(2.0, 1.0), (0.0, 1.0), (1.0, 0.5), (1.0, 1e-4), (-1.0, 1e-3), (0.7, 1e-6), (-2.5, 2.0)]
DTYPES = (torch.float32, torch.bfloat16)


class Problem:
    """Weights and gradients of several tensors, some of their scalars taken."""

    def __init__(self, grad: torch.dtype, theta: torch.dtype, seed: int = 0) -> None:
        draw = seeded(seed)
        scales = torch.rand(len(SIZES), generator=draw).exp().tolist()
        self.thetas = [torch.randn(n, generator=draw).to(theta) for n in SIZES]
        self.grads = [
            (s * torch.randn(n, generator=draw)).to(grad)
            for n, s in zip(SIZES, scales, strict=True)
        ]
        self.offsets = [11 + sum(SIZES[:k]) for k in range(len(SIZES))]
        taken = [(torch.rand(n, generator=draw) < 0.2).nonzero().squeeze(1) for n in SIZES]
        self.kept = torch.cat([t + o for t, o in zip(taken, self.offsets, strict=True)]).int()
        ends = [sum(map(len, taken[:k])) for k in range(len(SIZES) + 1)]
        self.runs = list(pairwise(ends))
        self.index = torch.arange(sum(SIZES)) + self.offsets[0]
        self.free = ~torch.isin(self.index, self.kept)

    def sweep(self, exp: float, eps: float, into: Tensor | None = None) -> Any:
        of = self.thetas, self.grads, self.offsets, self.kept, self.runs
        return cpu.Sweep(*of, into, (exp, eps))

    def scores(self, exp: float, eps: float) -> Tensor:
        theta, grad = (torch.cat([x.float() for x in xs]) for xs in (self.thetas, self.grads))
        return D3(exp, eps).score(Scalars(theta, grad, "", 0, self.index))


@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("theta", DTYPES)
@pytest.mark.parametrize(("exp", "eps"), LAWS)
def test_nothing_is_missed_and_little_is_found(
    exp: float, eps: float, theta: torch.dtype, grad: torch.dtype
) -> None:
    problem = Problem(grad, theta)
    score = problem.scores(exp, eps)
    ranked = score[problem.free].sort(descending=True).values
    values = torch.cat([x.float() for x in problem.grads])
    for rank in (0, 9, 500, len(ranked) - 1):
        this = problem.sweep(exp, eps)
        (index, weight, gradient), left, bad = this.run(0, this.total, float(ranked[rank]), 10**6)
        assert (left, bad) == ([], -1)
        assert len(index.unique()) == len(index)
        assert problem.free[index - problem.offsets[0]].all()
        best = problem.index[problem.free & (score >= ranked[rank])]
        assert torch.isin(best, index).all()
        assert rank == len(ranked) - 1 or len(index) <= 2 * len(best) + 5
        assert same_bits(gradient, values[index - problem.offsets[0]])
        assert same_bits(
            weight, torch.cat([x.float() for x in problem.thetas])[index - problem.offsets[0]]
        )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("every", [1, 2, 7, 57, 10**4])
def test_some_blocks_and_then_the_others_are_all(
    every: int, threads: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cpu, "SHARE", 2000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    problem = Problem(torch.bfloat16, torch.float32)
    into = torch.zeros(len(problem.kept))
    this = problem.sweep(2.0, 1.0, into)
    got = [this.run(0, this.total, -math.inf, 10**6, every)[0][0]]
    if every > 1:
        assert len(got[0]) < int(problem.free.sum())
        got.append(this.run(0, this.total, -math.inf, 10**6, 1, every)[0][0])
    assert torch.equal(torch.cat(got).sort().values, problem.index[problem.free])
    assert same_bits(into, torch.cat([x.float() for x in problem.grads])[problem.kept - 11])


@pytest.mark.parametrize("threads", [1, 3])
def test_too_many_candidates_are_left_for_later(threads: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(cpu, "SHARE", 2000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    problem = Problem(torch.float32, torch.float32)
    into = torch.zeros(len(problem.kept))
    this = problem.sweep(1.0, 1.0, into)
    ranges, got = [(0, this.total)], []
    while ranges:
        found, left, bad = this.run(*ranges.pop(), -math.inf, 5000)
        assert bad == -1
        assert len(found[0]) <= 5000 * threads
        ranges += left
        got.append(found[0])
    assert len(got) > 5
    assert torch.equal(torch.cat(got).sort().values, problem.index[problem.free])
    assert same_bits(into, torch.cat(problem.grads)[problem.kept - 11])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exp", [2.0, -1.0])
def test_a_gradient_that_is_not_finite(exp: float, dtype: torch.dtype, value: float) -> None:
    for k, at in ((0, 0), (0, 2999), (2, 0), (6, 129_999)):
        problem = Problem(dtype, torch.float32)
        problem.grads[k][at] = value
        this = problem.sweep(exp, 1.0)
        assert this.run(0, this.total, 1e30, 100)[2] == k


@settings(max_examples=60, deadline=None)
@given(
    exp=st.floats(-4, 4),
    eps=st.floats(1e-6, 10.0),
    scale=st.floats(1e-6, 1e6),
    rank=st.integers(0, 5000),
    seed=st.integers(0, 3),
)
def test_any_law(exp: float, eps: float, scale: float, rank: int, seed: int) -> None:
    problem = Problem(torch.float32, torch.float32, seed)
    for grad in problem.grads:
        grad *= scale
    score = problem.scores(exp, eps)
    threshold = float(score[problem.free].sort(descending=True).values[rank])
    this = problem.sweep(exp, eps)
    (index, _, _), left, bad = this.run(0, this.total, threshold, 10**6)
    assert (left, bad) == ([], -1)
    assert torch.isin(problem.index[problem.free & (score >= threshold)], index).all()
