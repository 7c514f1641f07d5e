"""The compiled CPU sweep by itself: it misses nothing, filters well, and adds up what it passes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lockstep import same_bits
from models import seeded
from unmask.heuristics import D3, Scalars
from unmask.kernels import laws
from unmask.select import Piece, TopK

numba = pytest.importorskip("numba")
cpu = pytest.importorskip("unmask.kernels.cpu")
base = pytest.importorskip("unmask.kernels.cpu_base")
cpu_filter = pytest.importorskip("unmask.kernels.cpu_filter")
cpu_sweep = pytest.importorskip("unmask.kernels.cpu_sweep")

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


def test_threads_of_its_own_find_the_same(monkeypatch: Any) -> None:
    """Where torch came without an OpenMP library."""
    monkeypatch.setattr(cpu, "SHARE", 2000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr("unmask.kernels.threads.openmp", lambda: None)
    problem = Problem(torch.float32, torch.bfloat16)
    into = torch.zeros(len(problem.kept))
    for _ in range(20):
        this = problem.sweep(1.0, 1.0, into.zero_())
        (index, _, _), left, bad = this.run(0, this.total, -math.inf, 10**6)
        assert (left, bad) == ([], -1)
        assert torch.equal(index.sort().values, problem.index[problem.free])
        assert same_bits(into, torch.cat(problem.grads)[problem.kept - 11])


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_magnitudes_are_compared_in_lanes_as_wide_as_the_numbers(dtype: Any) -> None:
    """numba's own `&` and `max` widen to 64 bits, at which a scan takes several times as long."""

    @numba.njit
    def bits(x: Any, y: Any) -> Any:
        return base.larger(base.size(x), base.size(y))

    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    for x, y in ((-3, 5), (low, 1), (high, 0), (low + 7, 6), (-1, low)):
        assert bits(dtype(x), dtype(y)) == max(x & high, y & high)
    assert bits.nopython_signatures[0].return_type == numba.from_dtype(np.dtype(dtype))


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


class Extremes(Problem):
    """Weights and gradients of any size that float32 has, zero and weights that aren't finite."""

    def __init__(self, low: float, high: float, dtype: torch.dtype, seed: int) -> None:
        super().__init__(torch.float32, torch.float32, seed)
        draw = seeded(seed)
        for k, n in enumerate(SIZES):
            theta, grad = torch.rand(2, n, generator=draw).double()
            theta = (10 ** (low + (high - low) * theta)).float()
            grad = (10 ** (-45 + 83.5 * grad)).float().clamp(max=3e38)
            for at, odd in enumerate((0.0, 1.8e19, 3e38, 3.4e38, math.inf, math.nan)):
                theta[at::97] = odd
            grad[::11] = 0.0
            grad[1::11] = 2.0**-149
            self.thetas[k], self.grads[k] = theta.to(dtype), grad.to(dtype)


EXPONENTS = st.one_of(
    st.sampled_from([-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 300.0, -300.0, 1e30, -1e30]),
    st.floats(-5, 5),
)
EPSILONS = st.one_of(
    st.sampled_from([1e-300, 1e-45, 1e-40, 1e-20, 1e-6, 1.0, 1e5, 2e19, 3e38]),
    st.floats(-45, 38).map(lambda power: 10**power),
)
RANGES = st.sampled_from([(-38.0, 38.4), (18.0, 20.0), (-2.0, 2.0), (-45.0, -36.0)])


@settings(max_examples=60, deadline=None)
@given(
    exp=EXPONENTS,
    eps=EPSILONS,
    sizes=RANGES,
    share=st.sampled_from([0.0, 1e-3, 0.03, 0.3, 0.6, 0.9, 1.0]),
    wanted=st.sampled_from([1, 100, 3000, 30_000]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
@example(exp=-2.0, eps=1.0, sizes=(18.0, 20.0), share=0.6, wanted=1, dtype=DTYPES[0], seed=0)
@example(exp=-0.5, eps=1.0, sizes=(-2.0, 2.0), share=0.03, wanted=1, dtype=DTYPES[0], seed=0)
@example(exp=2.0, eps=1e5, sizes=(-2.0, 2.0), share=0.5, wanted=1, dtype=DTYPES[0], seed=0)
@example(exp=0.5, eps=1e-45, sizes=(-45.0, -36.0), share=0.1, wanted=1, dtype=DTYPES[0], seed=0)
@example(exp=-300.0, eps=1e-300, sizes=(-2.0, 2.0), share=0.0, wanted=100, dtype=DTYPES[0], seed=1)
def test_no_score_is_too_odd(
    exp: float,
    eps: float,
    sizes: tuple[float, float],
    share: float,
    wanted: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    problem = Extremes(*sizes, dtype, seed)
    score = problem.scores(exp, eps)
    some = score[problem.free & ~score.isnan()].sort(descending=True).values
    ranks = [round(share * (len(some) - 1))]
    ranks += [int((some > limit).sum()) - 1 for limit in (0.0, 2.0**-126)]  # the least of these
    for rank in ranks:
        threshold = float(some[rank]) if rank >= 0 else math.ulp(0.0)
        this = problem.sweep(exp, eps)
        (index, _, _), left, bad = this.run(0, this.total, threshold, 10**6)
        assert (left, bad) == ([], -1)
        assert torch.isin(problem.index[problem.free & (score.double() >= threshold)], index).all()
    for threshold in (-math.inf, float(some[min(2 * wanted, len(some) - 1)])):
        this = problem.sweep(exp, eps)
        (index, _, _), left, _ = this.run(0, this.total, threshold, 10**6, wanted=wanted)
        assert not left
        assert torch.isin(best(problem, score, wanted), index).all()


@settings(max_examples=40, deadline=None)
@given(
    exp=EXPONENTS,
    eps=EPSILONS,
    sizes=RANGES,
    count=st.sampled_from([1, 100, 3000, 30_000, 80_000, 10**6]),
    dtype=st.sampled_from(DTYPES),
    backwards=st.booleans(),
    seed=st.integers(0, 9),
)
def test_odd_scores_are_ranked_as_they_are(
    exp: float,
    eps: float,
    sizes: tuple[float, float],
    count: int,
    dtype: torch.dtype,
    backwards: bool,
    seed: int,
) -> None:
    problem = Extremes(*sizes, dtype, seed)
    score = torch.where(problem.free, problem.scores(exp, eps), torch.nan)
    order = score.nan_to_num(-1.0, posinf=math.inf).sort(descending=True, stable=True).indices
    expected = problem.index[order[: min(count, int((score >= 0).sum()))]].sort().values
    top = TopK(count, D3(exp, eps), torch.device("cpu"))
    parts = zip(problem.offsets, problem.thetas, problem.grads, problem.runs, strict=True)
    pieces = [Piece("", o, theta, g, problem.kept, *run) for o, theta, g, run in parts]
    for some in [pieces[4:], pieces[:4]] if backwards else [pieces]:
        top.offer(some)
    index, grad = top.best()
    assert torch.equal(index, expected)
    grads = torch.cat([g.float() for g in problem.grads])
    assert same_bits(grad, grads[index - problem.offsets[0]])


@pytest.mark.parametrize("law", [D3(1.0, 0.5), D3(-1.0, 1e-3)], ids=repr)
def test_scores_that_are_no_numbers_take_no_ones_place(law: D3) -> None:
    """Also if there are so many that too few of the others are left to make a threshold."""
    top, none = TopK(2, law, torch.device("cpu")), torch.empty(0, dtype=torch.int32)
    theta, grad = torch.full((9,), torch.nan), torch.ones(9)
    theta[4] = 1.0
    top.offer([Piece("", 0, theta, grad, none, 0, 0)])
    top.offer([Piece("", 9, torch.ones(9), torch.arange(9) / 100, none, 0, 0)])
    assert top.best()[0].tolist() == [4, 17]


def best(problem: Problem, score: Tensor, wanted: int) -> Tensor:
    """The global indices of that many best scores and of whatever equals the last; no NaN."""
    score = torch.where(problem.free & ~score.isnan(), score, -torch.inf)
    last = score.sort(descending=True).values[wanted - 1]
    return problem.index[(score >= last) & (score > -torch.inf)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize(("exp", "eps"), [*LAWS, (2.0, 1e-30), (3.5, 1e-12), (-1.0, 1e-30)])
def test_what_others_outdo_is_left_out(
    exp: float, eps: float, grad: torch.dtype, threads: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cpu, "SHARE", 2000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    problem = Problem(grad, torch.float32)
    score = problem.scores(exp, eps)
    for wanted in (1, 40, 2000):
        this = problem.sweep(exp, eps)
        (index, _, _), left, bad = this.run(0, this.total, -math.inf, 10**6, wanted=wanted)
        assert (left, bad) == ([], -1)
        assert len(index.unique()) == len(index)
        assert torch.isin(best(problem, score, wanted), index).all()
        if eps > 1e-12:  # else powers may be no numbers to go by
            assert len(index) <= threads * (3 * wanted + cpu_sweep.BLOCK)


@pytest.mark.parametrize("exp", [-0.3, -1.0, -1.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_with_few_digits_outdo_no_more_than_they_do(
    exp: float, dtype: torch.dtype, monkeypatch: Any
) -> None:
    """The logarithm of a denormal weight is far below what its bits say."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # so that one finds enough
    problem = Extremes(-45.0, -36.0, dtype, 0)
    score = problem.scores(exp, 1e-300)
    for wanted in (3000, 20_000, 30_000):
        this = problem.sweep(exp, 1e-300)
        (index, _, _), left, _ = this.run(0, this.total, -math.inf, 10**6, wanted=wanted)
        assert not left
        assert torch.isin(best(problem, score, wanted), index).all()


@settings(max_examples=60, deadline=None)
@given(
    exp=st.sampled_from([0.0, 1.0, 2.0, -1.0, 0.5, -1.7, 3.0]),
    eps=st.floats(1e-35, 1e35),
    power=st.integers(-44, 30),
    spread=st.sampled_from([0.0, 1.0, 20.0]),
    wanted=st.integers(1, 3000),
    seed=st.integers(0, 3),
)
def test_what_others_outdo_at_the_ends_of_float32(
    exp: float, eps: float, power: int, spread: float, wanted: int, seed: int
) -> None:
    problem, draw = Problem(torch.float32, torch.float32, seed), seeded(seed)
    for grad, theta in zip(problem.grads, problem.thetas, strict=True):
        grad *= 10.0**power
        theta *= (spread * torch.randn(theta.shape, generator=draw)).exp()
        theta[::997] = torch.inf
        theta[::1009] = torch.nan
    score = problem.scores(exp, eps)
    this = problem.sweep(exp, eps)
    (index, _, _), left, bad = this.run(0, this.total, -math.inf, 10**6, wanted=wanted)
    assert (left, bad) == ([], -1)
    assert torch.isin(best(problem, score, wanted), index).all()


@settings(max_examples=80, deadline=None)
@given(
    exp=st.sampled_from([0.0, 1.0, 2.0, -1.0, 0.5, -1.7, 3.0]),
    eps=st.sampled_from([1e-36, 1e-20, 1e-6, 1.0, 1.442]),
    bases=st.sampled_from([(0.0,), (0.0, 0.45), (-20.0, 0.0, 3.0), (-11.5, 0.0)]),
    scale=st.sampled_from([1e-3, 1e-8]),
    close=st.sampled_from([1e-7, 1e-5, 1e-2]),
    wanted=st.sampled_from([1, 100, 3000]),
    seed=st.integers(0, 9),
)
@example(exp=3.0, eps=2e-12, bases=(-11.5, 0.0), scale=1e-8, close=0.5, wanted=3000, seed=0)
def test_scores_that_are_nearly_equal(
    exp: float,
    eps: float,
    bases: tuple[float, ...],
    scale: float,
    close: float,
    wanted: int,
    seed: int,
) -> None:
    """Bounds that are wrong for some weights or gradients lose some of them here."""
    problem, draw = Problem(torch.float32, torch.float32, seed), seeded(seed)
    for k, theta in enumerate(problem.thetas):
        which = torch.randint(len(bases), theta.shape, generator=draw)
        size = 10 ** torch.tensor(bases).double()[which]
        base = size * (1 + torch.rand(theta.shape, generator=draw))
        theta.copy_((base - eps).clamp(min=0))
        wish = (theta.double() + eps) ** exp
        near = 1 + close * torch.rand(theta.shape, generator=draw).double()
        problem.grads[k] = (scale * wish * near).float().clamp(max=1e38)
    score = problem.scores(exp, eps)
    this = problem.sweep(exp, eps)
    (index, _, _), left, bad = this.run(0, this.total, -math.inf, 10**6, wanted=wanted)
    assert (left, bad) == ([], -1)
    assert torch.isin(best(problem, score, wanted), index).all()


@base.compiled
def logarithms(numbers, out):  # type: ignore[no-untyped-def]
    for i in range(len(numbers)):
        out[i] = base.logarithm(numbers[i])


def test_the_logarithm_is_as_close_as_is_said() -> None:
    first, last = (np.float32(x).view(np.int32) for x in (1.2e-38, 3.4e38))
    numbers = np.arange(first, last, 997, dtype=np.int32).view(np.float32)  # 2 million
    found = np.empty_like(numbers)
    logarithms(numbers, found)
    off = np.abs(found - np.log2(numbers.astype(np.float64)))
    assert laws.LOG_ERROR / 2 < off.max() <= laws.LOG_ERROR


def lacking(g: Any, base: Any, law: int, exp: Any, cut: Any) -> float:
    found: float = cpu_filter.lacking(g, base, law, exp, cut, cpu_filter.ending(law, exp))
    return found


@settings(max_examples=300, deadline=None)
@given(
    exp=st.sampled_from([0.0, 1.0, 2.0, 0.5, 3.0, -1.0, -0.5, -3.0]),
    base=st.one_of(st.floats(1e-6, 1e6), st.floats(1e-30, 1e30)),
    score=st.one_of(st.floats(1e-15, 1e15), st.floats(1e-29, 1e29)),
)
def test_the_least_gradient_that_a_cut_lets_any_scalar_have(
    exp: float, base: float, score: float
) -> None:
    law, _, cut = (np.float32(x) for x in laws.bounds(exp, base, score))
    law, exp, base = int(law), np.float32(exp), np.float32(base)
    least = cpu_filter.least_gradient(base, law, exp, cut)
    below = np.array(max(0, least - 1), dtype=np.int32).view(np.float32)[()]
    assert least >= 0
    if least > 0:
        assert lacking(below, base, law, exp, cut) > 0
    if 0 < least < np.float32(1e38).view(np.int32):  # and it isn't far from the least
        above = np.array(least + 200_000, dtype=np.int32).view(np.float32)[()]
        assert lacking(above, base, law, exp, cut) <= 0


@settings(max_examples=300, deadline=None)
@given(
    exp=st.one_of(st.sampled_from([-0.5, -1.0, -2.0]), st.floats(-6.0, -1e-4)),
    eps=st.floats(1e-10, 1e3),
    most=st.floats(1e-6, 1e3),
    share=st.floats(0, 1),
    score=st.floats(1e-9, 1e9),
)
def test_a_line_lets_no_less_through(
    exp: float, eps: float, most: float, share: float, score: float
) -> None:
    """And where weights are few eps wide, little more."""
    _, low, cut = (np.float32(x) for x in laws.bounds(exp + 1e-9, eps, score))
    how = laws.FALLING, np.float32(exp), np.float32(eps), np.int32(low), cut
    law, exp32, base, _, reach = cpu_filter.line(how, np.float32(most).view(np.int32))
    theta, base, reach = np.float32(share) * np.float32(most), np.float32(base), np.float32(reach)
    exact = score * (float(theta) + eps) ** exp
    assume(exact < 3e38)
    grad = np.float32(exact)
    assert lacking(grad, theta + base, law, exp32, reach) <= 0
    if law == -1 and most < 0.05 * eps and exp > -3:
        assert lacking(np.float32(0.98) * grad, theta + base, law, exp32, reach) > 0


def test_equals_are_never_left_out() -> None:
    problem = Problem(torch.float32, torch.float32)
    for grad, theta in zip(problem.grads, problem.thetas, strict=True):
        grad.fill_(0.25)
        theta.fill_(3.0)
    this = problem.sweep(2.0, 1.0)
    (index, _, _), left, _ = this.run(0, this.total, -math.inf, 10**6, wanted=5)
    assert not left
    assert torch.equal(index.sort().values, problem.index[problem.free])
