"""The kernels for GPUs: on one if there is one, else in Triton's interpreter on the CPU."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lockstep import Pair, same_bits
from models import BF16, F16, MLP, TRANSFORMER, Case, seeded
from unmask import kernels, select
from unmask.derivatives import At
from unmask.errors import UnmaskWarning
from unmask.heuristics import D3, Scalars
from unmask.kernels import Run, reference, sampled
from unmask.rows import Rows

pytest.importorskip("triton")

from unmask.kernels import cuda, cuda_sampled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXAMPLES = int(os.environ.get("UNMASK_EXAMPLES", "20"))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a few numbers are many of them; and these kernels wherever we are."""
    for name, size in {"BLOCK": 128, "PART": 64, "FEW": 32}.items():
        monkeypatch.setattr(cuda, name, size)
    monkeypatch.setattr(kernels, "_cpu", lambda: cuda)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, everything in plain torch."""

    def begin() -> None:
        monkeypatch.setattr(kernels, "_cpu", lambda: None)
        monkeypatch.setattr(kernels, "_cuda", lambda: None)

    return begin


def here(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def problem(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    index: torch.dtype = torch.int64,
    offset: int = 0,
    draw: Callable[..., Tensor] = torch.randn,
    every: int = 5,
) -> dict[str, Any]:
    """Weights, gradients and what a sweep has to know of them; one in `every` is taken."""
    thetas = [draw(n, generator=seeded(n)).to(t) for n, t in zip(sizes, dtypes, strict=True)]
    grads = [draw(n, generator=seeded(n + 1)).to(t) for n, t in zip(sizes, dtypes, strict=True)]
    offsets = [offset + sum(sizes[:k]) for k in range(len(sizes))]
    taken = [
        torch.arange(o, o + n, dtype=index)[torch.rand(n, generator=seeded(n)) < 1 / every]
        for o, n in zip(offsets, sizes, strict=True)
    ]
    return {"thetas": here(thetas), "grads": here(grads), "offsets": offsets, "taken": here(taken)}


def runs(given: dict[str, Any]) -> list[tuple[int, int]]:
    """Where each tensor's are among all that are taken."""
    ends = list(accumulate(map(len, given["taken"])))
    return list(pairwise([0, *ends]))


def sweep(given: dict[str, Any], exp: float, eps: float, into: Tensor | None = None) -> Any:
    tensors = given["thetas"], given["grads"], given["offsets"]
    return cuda.Sweep(*tensors, torch.cat(given["taken"]), runs(given), into, (exp, eps))


def scores(given: dict[str, Any], exp: float, eps: float) -> tuple[Tensor, Tensor]:
    """(global indices, scores) of what isn't taken, by the formula."""
    theta, grad = (torch.cat([x.float() for x in given[name]]) for name in ("thetas", "grads"))
    spans = zip(given["offsets"], map(len, given["thetas"]), strict=True)
    index = torch.cat([torch.arange(o, o + n, device=DEVICE) for o, n in spans])
    score = D3(exp, eps).score(Scalars(theta, grad, "", 0, index))
    free = ~torch.isin(index, torch.cat(given["taken"]).long())
    return index[free], score[free]


def assert_found(given: dict[str, Any], exp: float, eps: float, thresholds: Sequence[float]) -> int:
    """No candidate missed, none twice, none of the taken; how many there were at the last."""
    index, score = scores(given, exp, eps)
    this = sweep(given, exp, eps)
    count = 0
    for threshold in thresholds:
        found, left, bad = this.run(0, this.total, threshold, this.total)
        assert (left, bad) == ([], -1)
        got = found[0]
        count = len(got)
        assert len(got.unique()) == count
        assert torch.isin(got, index).all()
        assert torch.isin(index[score >= threshold], got).all()
        assert got.dtype == given["taken"][0].dtype
        flat = torch.cat([x.float() for x in given["grads"]])
        assert same_bits(found[2], flat[got.long() - given["offsets"][0]])
        flat = torch.cat([x.float() for x in given["thetas"]])
        assert same_bits(found[1], flat[got.long() - given["offsets"][0]])
    return count


SIZES = (300, 0, 1, 128, 515, 0)
MIXED = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16, torch.float32)
LAWS = [(2.0, 1.0), (0.0, 1.0), (1.0, 0.5), (-1.0, 1e-3), (0.7, 1e-6), (-2.5, 2.0), (3.0, 1e-30)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("index", INTEGERS)
@pytest.mark.parametrize(("exp", "eps"), LAWS)
def test_a_sweep_misses_nothing(exp: float, eps: float, index: torch.dtype) -> None:
    given = problem(SIZES, MIXED, index)
    _, score = scores(given, exp, eps)
    ordered = score.sort(descending=True).values
    some = [float(ordered[i]) for i in (300, 9)]
    few = assert_found(given, exp, eps, [-math.inf, math.ulp(0.0), *some])
    if abs(exp) <= 2 and eps > 1e-10:
        assert few < 30  # it filters, too


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("offset", [0, 2**31 - 200, 2**33 + 7])
def test_a_sweep_far_into_a_large_model(offset: int) -> None:
    given = problem((200, 300), (torch.bfloat16, torch.bfloat16), offset=offset)
    assert assert_found(given, 2.0, 1.0, [0.1, 0.6]) > 0
    this = sweep(given, 2.0, 1.0)
    assert [this.first(place) for place in (0, 199, 200, 499)] == [
        offset + place for place in (0, 199, 200, 499)
    ]


@pytest.mark.usefixtures("small")
def test_a_sweep_in_a_tensor_beyond_32_bits() -> None:
    """Only a few pages of these tensors are ever touched."""
    size, at = 2**31 + 1000, 2**31 - 300
    theta = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    grad = torch.empty_like(theta)
    theta[at : at + 800], grad[at : at + 800] = 1.0, 0.25
    grad[[at + 7, at + 650]] = torch.tensor([-3.0, 5.0], dtype=torch.bfloat16, device=DEVICE)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    this = cuda.Sweep([theta], [grad], [11], none, [(0, 0)], None, (1.0, 1.0))
    (index, _, found), left, bad = this.run(at, at + 800, 1.0, 800)
    assert (left, bad) == ([], -1)
    order = index.argsort()
    assert (index[order] - 11).tolist() == [at + 7, at + 650]
    assert found[order].tolist() == [-3.0, 5.0]
    run = [Run(theta, 11, 0, 2)]
    kernels.scatter(run, index[order], torch.tensor([7.0, 8.0], device=DEVICE))
    assert theta[[at + 7, at + 650]].tolist() == [7.0, 8.0]
    out = torch.zeros(2, device=DEVICE)
    kernels.gather(run, index[order], out)
    assert out.tolist() == [7.0, 8.0]


def any_bits(count: int, generator: torch.Generator) -> Tensor:
    """Numbers of every size, denormals, zeros; neither infinite nor NaN."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).int()
    x = bits.view(torch.float32)
    return torch.where(x.isfinite(), x, 0.0)


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # numpy's: inf is meant
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    exp=st.one_of(st.sampled_from([-2.0, -1.0, 0.5, 1.0, 2.0, 3.0]), st.floats(-40, 40)),
    log_eps=st.floats(-160, 40),
    seed=st.integers(0, 2**20),
    like_weights=st.booleans(),
)
def test_no_number_is_too_odd(exp: float, log_eps: float, seed: int, like_weights: bool) -> None:
    eps, generator = 2.0**log_eps, seeded(seed)
    theta, grad = any_bits(1000, generator), any_bits(1000, generator)
    if like_weights:
        theta = torch.randn(1000, generator=generator) * 0.02
    theta[:2] = torch.tensor([torch.inf, -torch.inf])
    none = torch.empty(0, dtype=torch.int64)
    given = {
        "thetas": here([theta]), "grads": here([grad]), "offsets": [0], "taken": here([none])
    }  # fmt: skip
    _, score = scores(given, exp, eps)
    score = score[score.isfinite()].sort().values
    tops = [*score[:: max(1, len(score) // 5)].tolist(), 1e-44, math.inf]
    assert_found(given, exp, eps, tops)


@pytest.mark.parametrize(
    ("exp", "eps", "theta", "grad", "threshold"),
    [
        (0.5, 1e-46, 0.0, 1e-20, 1e10),  # ε is 0 in float32, and so the denominator
        (3.0, 1e-20, 0.0, 1e-30, 1e35),  # the denominator rounds to 0
        (-2.0, 1.0, 1e25, 1e-30, 1e35),  # the same, of a large weight
        (1.0, 1.0, 0.5, 2.0**-149, 2.0**-149),  # the score rounds up by half of itself
        (-0.5, 1.0, math.inf, 1e-30, 1e35),  # an infinite weight
        (1e30, 1e-3, 0.5, 1e-30, 1e35),  # the key itself would overflow
    ],
)
def test_what_float32_makes_of_extremes(
    exp: float, eps: float, theta: float, grad: float, threshold: float
) -> None:
    none = torch.empty(0, dtype=torch.int64)
    weights, gradients = torch.full((9,), theta), torch.tensor([grad] + 8 * [0.0])
    given = dict(zip(("thetas", "grads", "offsets", "taken"), ([weights], [gradients], [0], [none]),
                     strict=True))  # fmt: skip
    given |= {name: here(given[name]) for name in ("thetas", "grads", "taken")}
    assert float(scores(given, exp, eps)[1][0]) >= threshold
    assert assert_found(given, exp, eps, [threshold]) == 1


def test_the_filter_is_close() -> None:
    """A bound as good as none would pass the tests above."""
    given = problem((4000,), (torch.float32,), every=10**9)
    for exp, eps in [(2.0, 1.0), (1.0, 0.1), (0.0, 1.0), (-1.0, 1.0), (0.5, 1e-8)]:
        _, score = scores(given, exp, eps)
        count = assert_found(given, exp, eps, [float(score.sort().values[-200])])
        assert count < 300


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gradient_that_is_not_finite(dtype: torch.dtype, value: float) -> None:
    for place, expected in ((0, 0), (299, 0), (300, 2), (428, 3), (942, 4)):
        given = problem(SIZES[:-1], [dtype] * 5)
        torch_at = place - (given["offsets"][expected])
        given["grads"][expected][torch_at] = value
        if expected < 4:
            given["grads"][4][3] = value  # the first is named
        this = sweep(given, 2.0, 1.0)
        found, left, bad = this.run(0, this.total, 1e30, 100)
        assert (len(found[0]), left, bad) == (0, [], expected)


@pytest.mark.usefixtures("small")
def test_too_many_candidates_are_looked_at_in_pieces() -> None:
    given = problem(SIZES, MIXED)
    this = sweep(given, 2.0, 1.0)
    index, _ = scores(given, 2.0, 1.0)
    ranges, got, held = [(0, this.total)], [], []
    while ranges:
        found, left, bad = this.run(*ranges.pop(), -1.0, 20)
        assert bad == -1
        assert not (len(found[0]) and left)
        ranges += left
        got.append(found[0])
        held.append(len(found[0]))
    assert torch.equal(torch.cat(got), torch.cat(got).sort().values) or DEVICE.type != "cpu"
    assert torch.equal(torch.cat(got).sort().values, index)
    assert max(held) <= 20 * cuda.ROOM


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
def test_some_blocks_and_then_the_others(every: int) -> None:
    given = problem(SIZES, MIXED)
    this = sweep(given, 2.0, 1.0)
    index, _ = scores(given, 2.0, 1.0)
    ranges = [(0, 200), (200, this.total)]
    got = [this.run(a, b, -1.0, 10**4, every)[0][0] for a, b in ranges]
    if every > 1:
        assert sum(map(len, got)) < len(index)
        got += [this.run(a, b, -1.0, 10**4, 1, every)[0][0] for a, b in ranges]
    assert torch.equal(torch.cat(got).sort().values, index)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", INTEGERS)
def test_gradients_of_the_taken_are_added_up(dtype: torch.dtype, index: torch.dtype) -> None:
    given = problem((300, 0, 129), [dtype] * 3, index)
    size = sum(map(len, given["taken"]))
    into = torch.randn(size, generator=seeded(7)).to(dtype).float().to(DEVICE)
    of = zip(runs(given), given["grads"], given["taken"], given["offsets"], strict=True)
    expected = [
        (into[start:stop] + g[t.long() - o]).to(dtype).float() for (start, stop), g, t, o in of
    ]
    this = sweep(given, 2.0, 1.0, into)
    this.run(0, this.total, 1.0, 1000)
    assert size > cuda.FEW
    assert same_bits(into, torch.cat(expected))


# The whole selection


class Tied:
    """Small integers: ties everywhere."""

    @staticmethod
    def draw(n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(-2, 3, (n,), generator=generator).float()


def pieces(given: dict[str, Any], into: Tensor | None) -> list[select.Piece]:
    columns = (given[name] for name in ("offsets", "thetas", "grads"))
    kept = torch.cat(given["taken"])
    return [
        select.Piece(str(k), o, theta, grad, kept, *run, into)
        for k, (o, theta, grad, run) in enumerate(zip(*columns, runs(given), strict=True))
    ]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("draw", [torch.randn, Tied.draw], ids=["distinct", "tied"])
@pytest.mark.parametrize(("count", "crowd"), [(1, 900), (40, 900), (500, 900), (40, 1), (300, 1)])
@pytest.mark.parametrize(("exp", "eps"), LAWS[2:5])
def test_the_selection_is_plain_torchs(
    exp: float,
    eps: float,
    count: int,
    crowd: int,
    draw: Callable[..., Tensor],
    monkeypatch: Any,
    plain: Any,
) -> None:
    given = problem((300, 0, 1, 128, 515), MIXED[:5], draw=draw)
    monkeypatch.setattr(select, "FEW", 64)  # several rounds, which overflow
    monkeypatch.setattr(select, "MANY", 8)
    monkeypatch.setattr(select, "CROWD", crowd)  # from which on a sample of blocks foretells
    monkeypatch.setattr(select, "SAMPLE", 3)
    monkeypatch.setattr(cuda, "ROOM", 1)
    found = []
    swept: list[int] = []
    run = cuda.Sweep.run
    monkeypatch.setattr(cuda.Sweep, "run", lambda *a: swept.append(1) or run(*a))
    for _ in range(2):
        into = torch.zeros(sum(map(len, given["taken"])), device=DEVICE)
        top = select.TopK(count, D3(exp, eps), DEVICE)
        top.offer(pieces(given, into))
        found.append((*top.best(), into))
        if len(found) == 1:
            assert swept
            swept.clear()
            plain()
    assert not swept
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.long() if a.dtype == torch.int32 else a, b)


@pytest.mark.usefixtures("small")
def test_what_they_cannot_do_is_done_in_plain_torch() -> None:
    """Strided and float64 tensors among others."""
    given = problem((90, 60), (torch.float32, torch.float64), index=torch.int64)
    spread = torch.zeros(90, 2, device=DEVICE)[:, 0]
    spread.copy_(given["grads"][0])
    given["grads"][0] = spread
    top = select.TopK(20, D3(), DEVICE)
    top.offer(pieces(given, None))
    index, score = scores(given, 2.0, 1.0)
    assert top.best()[0].tolist() == index[score.topk(20).indices].sort().values.tolist()


@pytest.mark.usefixtures("small")
def test_the_bad_tensor_is_named() -> None:
    given = problem((90, 60, 90), [torch.bfloat16] * 3)
    given["grads"][1][59] = math.nan
    with pytest.raises(select.NonFinite, match=r"^1$"):
        select.TopK(20, D3(), DEVICE).offer(pieces(given, None))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the models are on the CPU")
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("how", ["dense", "streaming"])
@pytest.mark.parametrize("case", [MLP, TRANSFORMER, BF16, F16], ids=str)
def test_training_with_them_is_the_reference(case: Case, how: str) -> None:
    kw = {"optimizer": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1}
    pair = Pair(case.build(), budget=37, steps=3, how={"gradients": how}, **kw)
    pair.train(case, 4)


# Gather and scatter


def scattered(dtype: torch.dtype, index: torch.dtype) -> tuple[list[Run], Tensor]:
    """Three tensors of which some scalars are meant, with all sorts of values."""
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-41, 65504.0, 3e38])
    values = [torch.cat([odd, torch.randn(n - 8, generator=seeded(n))]) for n in (100, 9, 64)]
    tensors = here([v.to(dtype) for v in values])
    at = [torch.randperm(len(t), generator=seeded(1))[:n].sort().values for t, n in
          zip(tensors, (77, 9, 1), strict=True)]  # fmt: skip
    at[0][:8] = torch.arange(8)
    at[0] = at[0].unique()
    offsets, cuts = (5, 105, 300), [0]
    for part in at:
        cuts.append(cuts[-1] + len(part))
    parts = zip(tensors, offsets, cuts, cuts[1:], strict=False)
    runs = [Run(*part) for part in parts]
    sorted_index = torch.cat([a + o for a, o in zip(at, offsets, strict=True)])
    return runs, sorted_index.to(DEVICE, index)


def assert_same_numbers(a: Tensor, b: Tensor) -> None:
    """The same bits, but any NaN for any other."""
    assert torch.equal(a.isnan(), b.isnan())
    assert same_bits(a.nan_to_num(0.0, math.inf, -math.inf), b.nan_to_num(0.0, math.inf, -math.inf))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("index", INTEGERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gather(dtype: torch.dtype, index: torch.dtype, add: bool) -> None:
    runs, at = scattered(dtype, index)
    outs = [torch.randn(len(at), generator=seeded(3)).to(DEVICE) for _ in range(2)]
    cuda.gather(runs, at, outs[0], add)
    reference.gather(runs, at, outs[1], add)
    assert_same_numbers(*outs)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy's, to float16
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("jump", [None, *INTEGERS])
@pytest.mark.parametrize("index", INTEGERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_scatter(dtype: torch.dtype, index: torch.dtype, jump: torch.dtype | None) -> None:
    values = any_bits(500, seeded(5))
    values[::3] = torch.randn(167, generator=seeded(6))
    values[:4] = torch.tensor([math.nan, math.inf, -math.inf, 1.00390625])
    values, where, ended = values.to(DEVICE), None, []
    for scatter in (cuda.scatter, reference.scatter):
        runs, at = scattered(dtype, index)
        if jump is not None:
            where = torch.randperm(500, generator=seeded(4))[: len(at)].to(DEVICE, jump)
            where[0] = 0
        before = [run.tensor._version for run in runs]
        at = at.long() if scatter is reference.scatter else at
        scatter(runs, at, values[: len(at)] if jump is None else values, where)
        assert all(run.tensor._version > v for run, v in zip(runs, before, strict=True))
        ended.append(torch.cat([run.tensor for run in runs]))
    assert_same_numbers(*ended)


@pytest.mark.usefixtures("small")
def test_runs_that_nothing_compiled_can_do() -> None:
    turned = torch.arange(12.0, device=DEVICE).view(3, 4).t()
    wide = torch.arange(6.0, dtype=torch.float64, device=DEVICE)
    plain = torch.arange(5.0, device=DEVICE)
    runs = [Run(turned, 0, 0, 2), Run(wide, 12, 2, 3), Run(plain, 18, 3, 5)]
    index = torch.tensor([1, 11, 14, 18, 22], device=DEVICE)
    out = torch.zeros(5, device=DEVICE)
    kernels.gather(runs, index, out)
    assert out.tolist() == [4.0, 11.0, 2.0, 0.0, 4.0]
    kernels.scatter(runs, index, -out - 1)
    kernels.gather(runs, index, out)
    assert out.tolist() == [-5.0, -12.0, -3.0, -1.0, -5.0]
    cuda.gather([], index[:0], out[:0], add=False)


# The sampled product


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", INTEGERS)
@pytest.mark.parametrize("size", [(0, 3, 4, 5), (1, 1, 1, 1), (300, 20, 33, 70), (128, 40, 9, 16)])
def test_sampled_product(
    size: tuple[int, int, int, int], index: torch.dtype, dtype: torch.dtype
) -> None:
    tokens, height, width, count = size
    draw = (torch.randn(tokens, n, generator=seeded(n)) for n in (height, width))
    left, right = (x.to(DEVICE, dtype) for x in draw)
    flat = torch.randperm(height * width, generator=seeded(0))[:count].sort().values.to(DEVICE)
    expected = (left.double().t() @ right.double()).reshape(-1)[flat].float()
    rows, columns = (flat // width).to(index), (flat % width).to(index)
    found = cuda_sampled.product(left, right, rows, columns, along=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    turned = left.t().contiguous(), right.t().contiguous()
    assert same_bits(cuda_sampled.product(*turned, rows, columns, along=1), found)
    entries = At(flat, (height, width)).entries
    torch.testing.assert_close(sampled.reference(left, right, entries), found)
    assert cuda_sampled.product(left, right, rows[:0], columns[:0], along=0).shape == (0,)


def test_a_product_that_is_not_finite_where_it_need_not_be() -> None:
    left, right = torch.ones(200, 2, device=DEVICE), torch.ones(200, 2, device=DEVICE)
    right[199, 1] = math.nan
    rows, columns = (torch.tensor(x, device=DEVICE) for x in ([0, 1], [0, 1]))
    assert cuda_sampled.product(left, right, rows, columns, 0).isfinite().tolist() == [True, False]


# Which kernels for what


def on(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """All that is asked of a tensor to find its kernels."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, is_contiguous=lambda: True)


def test_which_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_cuda", lambda: cuda)
    assert kernels.compiled_for(on("cuda:1"), on("cuda:1", torch.float16)) is cuda
    assert kernels.compiled_for(on("cuda:0"), on("cuda:1")) is None
    assert kernels.compiled_for(on("cuda:0"), on("cpu")) is None
    assert kernels.compiled_for(on("cuda:0", torch.float64)) is None
    assert kernels.compiled_for(on("mps")) is None
    assert kernels.compiled_for(torch.zeros(3)) not in (None, cuda)


@pytest.fixture
def anew() -> Iterator[None]:
    """Kernels as if nobody had asked for them yet."""
    kernels._cuda.cache_clear()
    yield
    kernels._cuda.cache_clear()


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("problem", [RuntimeError("Failed to find C compiler"), OSError("no gcc")])
def test_triton_that_cannot_compile_is_said_once(problem: Exception, monkeypatch: Any) -> None:
    def fails(device: str) -> None:
        raise problem

    monkeypatch.setattr(cuda, "try_out", fails)
    with pytest.warns(UnmaskWarning, match=f"({problem}).*plain torch"):
        assert kernels.compiled_for(on("cuda:0")) is None
    assert kernels.compiled_for(on("cuda:0")) is None


@pytest.mark.usefixtures("anew")
def test_without_triton_it_is_said_once(monkeypatch: Any) -> None:
    for name in ("cuda", "cuda_sampled", "triton_code"):
        monkeypatch.delitem(sys.modules, f"unmask.kernels.{name}")
        monkeypatch.delattr(kernels, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UnmaskWarning, match="pip install triton"):
        assert kernels.compiled_for(on("cuda:0")) is None
    assert kernels.compiled_for(on("cuda:0")) is None


def test_trying_out() -> None:
    cuda.try_out(DEVICE.type)


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from unmask.kernels import cuda, cuda_sampled, laws, triton_code

def ptx(kernel, constants, options={}, **types):
    names = kernel.arg_names
    types = {n: types.get(n, "constexpr" if n in constants else "i64") for n in names}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()})
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    return compile(source, target=target, options={**cuda.HOW, **options}).asm["ptx"]

floats = {name: "fp32" for name in ("exp", "eps", "cut")}
outs = {"state": "*i64", "out_index": "*i64", "out_theta": "*fp32", "out_grad": "*fp32"}
how = {"BLOCK": cuda.BLOCK, "PART": cuda.PART, "WIDE": True}
types = {"table": "*i64", "low": "i32", "lost": "i32", **floats, **outs}
for law in (*map(int, laws.PRODUCTS), laws.ANY, laws.FALLING):
    scan = ptx(triton_code.scan_kernel, how | {"LAW": law}, cuda.SCAN, **types)
    assert "ld.global.v4" in scan, "16 bytes at once"
    assert ".ftz" not in scan, "denormals as they are, which the bounds go by"
how = {"BLOCK": cuda.FEW, "WIDE": False}
ptx(triton_code.gather_kernel, {**how, "ADD": True}, table="*i64")
ptx(triton_code.scatter_kernel, {**how, "JUMP": True, "FAR": True}, table="*i64")
how = {"ENTRIES": cuda_sampled.ENTRIES, "TOKENS": cuda_sampled.TOKENS}
number = dict.fromkeys(("left", "right"), "*bf16")
ptx(cuda_sampled._dots, how, rows="*i32", columns="*i32", out="*fp32", **number)
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_they_compile_for_gpus(architecture: int, tmp_path: Any) -> None:
    """The compiler itself needs no GPU."""
    code = tmp_path / "compile_them.py"
    code.write_text(COMPILE)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, code, str(architecture)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("draw", [torch.randn, Tied.draw], ids=["distinct", "tied"])
@pytest.mark.parametrize("index", INTEGERS, ids=str)
def test_some_rows_are_as_good_as_the_table(
    draw: Callable[..., Tensor], index: torch.dtype
) -> None:
    """Where zeros can't win."""
    given = problem((300, 320), FLOATS[:2], index, draw=draw)
    *_, offset = given["offsets"]
    theta = given["thetas"][1].view(40, 8)
    some = torch.tensor([0, 7, 8, 39], device=DEVICE)
    few = Rows(some, given["grads"][1].view(40, 8)[some].mul(3).nan_to_num(), 40)
    dense = torch.zeros_like(theta).index_copy_(0, some, few.values).view(-1)
    taken = few.within(given["taken"][1] - offset)[1].to(index)
    first, second = pieces(given | {"grads": [given["grads"][0], dense]}, None)
    found = []
    for rows in (False, True):
        top = select.TopK(40, D3(1.0, 0.5), DEVICE)
        top.offer([first])
        assert top.passes_over_zeros(theta, few.values, offset)
        if rows:
            second = select.Piece("", 0, theta[some], few.values, taken, 0, len(taken))
            second = second._replace(places=partial(few.of_tensor, offset))
        top.offer([second])
        found.append(top.best())
    assert (found[0][0] >= offset).any()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
