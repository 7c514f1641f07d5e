"""Embeddings' gradients by rows: streamed without ever being dense, and the dense mode's bits."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import unmask
from lockstep import METHODS, Largest, assert_same_state, chosen, same_tree, snapshot
from models import seeded
from unmask import rows
from unmask.intake import Intake

HEIGHT, WIDTH = 211, 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even a small table is looked at in several."""
    monkeypatch.setattr(rows, "BLOCK", 7 * WIDTH + 1)


def tokens(step: int, count: int = 8) -> Tensor:
    """Some of them several times, and padding."""
    drawn = torch.randint(0, HEIGHT, (2, count), generator=seeded(step))
    drawn[:, 0], drawn[1, 1:3] = 0, drawn[0, 1]
    return drawn


class Table(nn.Module):
    """A large table and a small one, a layer, and whatever else is asked for."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.table = nn.Embedding(HEIGHT, WIDTH, padding_idx=0, sparse=kind == "sparse")
        self.place = nn.Embedding(64, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, HEIGHT if kind == "tied" else 3)
        if kind == "tied":
            self.head.weight = self.table.weight
        if kind == "transposed":
            self.table.weight.data = self.table.weight.data.t().contiguous().t()

    def forward(self, given: Tensor) -> Tensor:
        x = self.table(given) + self.place(torch.arange(given.shape[1]))
        if self.kind == "thrice":
            x = x + self.table(given.flip(1)) * self.table(given + 1)
        if self.kind == "checkpointed":
            x = checkpoint(lambda y: self.table(y), given, use_reentrant=False) + x
        if self.kind == "elsewhere":
            x = x + F.embedding(given, self.table.weight) + self.table.weight[3]
        if self.kind == "many":
            x = x + self.table(torch.arange(HEIGHT)[:, None]).mean()
        return self.head(self.norm(x)).square().mean((1, 2))


KINDS = (
    "plain", "sparse", "tied", "transposed", "thrice", "checkpointed", "elsewhere", "many"
)  # fmt: skip


class Run:
    def __init__(self, method: unmask.Method, gradients: str, kind: str = "plain", **how: Any):
        dtype = how.pop("dtype", torch.float32)
        self.model = Table(kind).to(dtype)
        self.tuner = unmask.attach(self.model, method, steps=5, gradients=gradients, **how)
        self.optimizer = self.tuner.optimizer(torch.optim.AdamW, lr=1e-2)

    def train(self, steps: int = 5, passes: int = 1) -> "Run":
        for step in range(steps):
            for part in range(passes):
                self.model(tokens(10 * step + part)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


def assert_alike(*runs: Run) -> None:
    first, second = runs
    assert chosen(first.tuner) == chosen(second.tuner)
    assert_same_state(snapshot(first.model), snapshot(second.model))
    assert same_tree(first.optimizer.state_dict(), second.optimizer.state_dict())


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], bool]]:
    """(shape, whether it is sparse) of each gradient that streams."""
    seen = []
    stream = Intake._stream

    def spy(self: Intake, k: int, parameter: Tensor) -> None:
        if parameter.grad is not None:
            seen.append((tuple(parameter.shape), parameter.grad.is_sparse))
        stream(self, k, parameter)

    monkeypatch.setattr(Intake, "_stream", spy)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_dense_mode(name: str, passes: int, kind: str) -> None:
    runs = [Run(METHODS[name](30), mode, kind, accumulation=passes) for mode in MODES]
    assert_alike(*(run.train(passes=passes) for run in runs))


MODES = ("dense", "streaming")
OTHERS = {
    "strided": unmask.id3(30, schedule=unmask.Strided(every=2)),
    "per tensor": unmask.Method(unmask.D3(), unmask.Increment(), 30, scope=unmask.PerTensor()),
    "bounded": unmask.Method(unmask.D3(), unmask.Increment(), 30, scope=unmask.Bounded(floor=2)),
    "smoothed": unmask.Method(unmask.Smoothed(decay=0.5), unmask.Increment(), 30),
    "accumulated": unmask.Method(unmask.Accumulated(), unmask.Increment(), 30),
    "magnitude": unmask.pafi(30),
    "large first": unmask.id3(30, exp=-0.7),
    "drop and grow": unmask.Method(unmask.D3(), unmask.DropGrow(), 30),
    "rows": unmask.Method(unmask.D3(), unmask.Static(), 30, scope=unmask.Units()),
    "all": unmask.full(),
    "more than have a gradient": unmask.id3(600),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_of_any_method_and_dtype(name: str, dtype: torch.dtype) -> None:
    method = OTHERS[name]
    assert_alike(*(Run(method, mode, dtype=dtype).train() for mode in MODES))


@pytest.mark.parametrize("gradients", ["streaming", "sampled"])
def test_the_table_has_no_dense_gradient(gradients: str) -> None:
    run = Run(unmask.id3(30), gradients)
    with Largest(run.model.table.weight) as largest:
        run.train(3)
    assert 64 * WIDTH <= largest.size < HEIGHT * WIDTH


def test_sums_over_passes_hold_each_row_once() -> None:
    run = Run(unmask.id3(30), "streaming", accumulation=4)
    for _ in range(3):
        run.model(tokens(0)).sum().backward()
    held = [g for g in run.tuner._driver.intake._held.values() if g.is_sparse]
    assert sorted(g._nnz() for g in held) == [8, len(tokens(0).unique())]


def test_only_where_it_pays(arrived: list[Any]) -> None:
    """Not with many tokens; and of a tied table the layer has a whole gradient."""
    Run(unmask.id3(30), "streaming").train(1)
    assert ((HEIGHT, WIDTH), True) in arrived
    assert ((64, WIDTH), True) in arrived
    del arrived[:]
    run = Run(unmask.id3(30), "streaming", "tied")
    run.model(tokens(0, 40)).sum().backward()
    assert ((64, WIDTH), False) in arrived
    assert ((HEIGHT, WIDTH), False) in arrived
    del arrived[:]
    Run(unmask.id3(30), "dense").train(1)
    assert not arrived


def test_a_gradient_that_is_asked_for_is_dense() -> None:
    """As torch.autograd.grad() would return it without a tuner, to any order."""
    plain, streaming = Table(), Run(unmask.id3(30), "streaming").model
    found = []
    for model in (plain, streaming):
        loss = model(tokens(0)).sum()
        first = torch.autograd.grad(loss, model.table.weight, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), model.table.weight)[0]
        found.append((first, second))
    for expected, given in zip(*found, strict=True):
        assert given.layout is torch.strided
        assert torch.equal(expected, given)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_second_derivatives_on_the_way_to_grad() -> None:
    runs = [Run(unmask.id3(30), mode) for mode in MODES]
    for run in runs:
        run.model(tokens(0)).sum().backward(create_graph=True)
        run.optimizer.step()
    assert_alike(*runs)


def test_a_row_that_is_not_finite_skips_the_step() -> None:
    runs = [Run(unmask.id3(30), mode).train(1) for mode in MODES]
    for run in runs:
        (run.model(tokens(1)) * torch.inf).sum().backward()
        with pytest.warns(unmask.UnmaskWarning, match="skipped"):
            run.optimizer.step()
        run.optimizer.zero_grad()
        run.train(2)
    assert_alike(*runs)


def test_evaluation_is_left_alone_and_detaching_leaves_nothing() -> None:
    run = Run(unmask.id3(30), "streaming")
    with torch.no_grad():
        expected = Table()(tokens(0))
        assert torch.equal(run.model(tokens(0)), expected)
    run.tuner.detach()
    assert type(run.model.table.weight) is nn.Parameter
    assert not run.model.table._forward_pre_hooks
    assert not run.model.table._forward_hooks


def test_a_failing_forward_leaves_the_parameter_in_place() -> None:
    model = Run(unmask.id3(30), "streaming").model
    with pytest.raises(IndexError):
        model(torch.full((2, 8), HEIGHT))
    assert type(model.table.weight) is nn.Parameter


def test_under_autocast_and_a_gradient_scaler() -> None:
    runs = [Run(unmask.id3(30), mode) for mode in MODES]
    for run in runs:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = run.model(tokens(step)).sum()
            scaler.scale(loss).backward()
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
    assert_alike(*runs)


@pytest.mark.slow
def test_compiled_models() -> None:
    runs = [Run(unmask.id3(30), mode) for mode in MODES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for run in runs:
            compiled = torch.compile(run.model, backend="aot_eager", fullgraph=True)
            for step in range(3):
                compiled(tokens(step)).sum().backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
    assert_alike(*runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("padding", [-1, 5])
def test_a_look_up_is_the_embedding(padding: int, dtype: torch.dtype) -> None:
    weight = torch.randn(HEIGHT, WIDTH, generator=seeded(1)).to(dtype).requires_grad_()
    given, dy = tokens(2, 40), torch.randn(2, 40, WIDTH, generator=seeded(3)).to(dtype)
    given[:, 4:6] = 5
    expected = F.embedding(given, weight, None if padding < 0 else padding)
    out = rows.look_up(weight, given, padding)
    assert torch.equal(out, expected)
    expected.backward(dy)
    dense, weight.grad = weight.grad, None
    out.backward(dy)
    assert weight.grad is not None
    assert weight.grad.is_sparse
    assert torch.equal(weight.grad.to_dense(), dense)
    found = list(rows.Rows.of(weight.grad).blocks())
    assert [start for start, _ in found] == list(range(0, dense.numel(), 7 * WIDTH))
    assert torch.equal(torch.cat([block for _, block in found]), dense)


def test_parts_of_a_row_add_up_in_their_order() -> None:
    """Where two orders would give two results."""
    parts = torch.tensor([[1e8], [1.0], [-1e8], [2.0]])
    where = torch.tensor([[3, 3, 3, 1]])
    sparse = torch.sparse_coo_tensor(where, parts, (5, 1), check_invariants=True)
    found = rows.summed(sparse)
    assert found._indices().tolist() == [[1, 3]]
    assert found._values().flatten().tolist() == [2.0, 0.0]


@pytest.mark.parametrize("shape", [(9, 4), (9, 2, 3), (9, 1), (9,)], ids=str)
def test_rows_know_their_places(shape: tuple[int, ...]) -> None:
    some = torch.tensor([0, 3, 4, 8])
    values = torch.randn(4, *shape[1:], generator=seeded(0))
    few = rows.Rows(some, values, shape[0])
    dense = torch.zeros(shape).index_copy_(0, some, values).flatten()
    flat = torch.arange(0, len(dense), 2, dtype=torch.int32)
    there, at = few.within(flat)
    assert there.tolist() == [int(i) // few.width in some.tolist() for i in flat]
    assert torch.equal(values.flatten()[at], dense[flat[there].long()])
    assert torch.equal(few.of_tensor(5, at), flat[there] + 5)


@pytest.mark.parametrize("block", [1, 8, 9, 100])
def test_rows_split_know_their_own_places(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BLOCK", block)
    values = torch.randn(5, 4, generator=seeded(0))
    few = rows.Rows(torch.tensor([0, 3, 4, 7, 8]), values, 9)
    _, at = few.within(torch.tensor([1, 2, 5, 13, 15, 16, 19, 30, 31, 32, 35]))
    found = [(part.values.flatten()[own], len(part.rows)) for part, own in few.split(at)]
    assert torch.equal(torch.cat([own for own, _ in found]), values.flatten()[at])
    assert sum(length for _, length in found) == 5
    assert max(length for _, length in found) == min(5, max(1, block // 4))


@pytest.mark.parametrize("looked_up", [[], [5], [0, 1, 2, 210], list(range(0, 210, 2))], ids=len)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("others", [0.0, 1e-3, 2.0])
def test_ties_and_zeros_among_rows(looked_up: list[int], dtype: torch.dtype, others: float) -> None:
    """Kept scalars in and out of the rows, equal scores, -0.0, a threshold that stands or not."""

    def coarse(shape: tuple[int, ...], seed: int) -> Tensor:
        return (torch.randn(shape, generator=seeded(seed)).mul(4).round() / 4).to(dtype)

    found = []
    for mode in MODES:
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "table": nn.Embedding(HEIGHT, WIDTH)})
        model.to(dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(coarse(p.shape, p.numel()))
        tuner = unmask.attach(model, unmask.id3(300), steps=3, gradients=mode)
        optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)  # to which the sign of a 0 matters
        for step in range(3):
            rows_ = model["table"](torch.tensor(looked_up, dtype=torch.long))
            loss = (rows_ * coarse(rows_.shape, step)).sum()  # so that these are the gradient
            for p in model["a"].parameters():
                loss = loss + others * (p * coarse(p.shape, step)).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((chosen(tuner), snapshot(model), optimizer.state_dict()))
    (dense, weights, state), (given, theirs, its) = found
    assert dense == given
    assert_same_state(weights, theirs)
    assert same_tree(state, its)


def test_rows_that_are_not_there_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scores are a power law and zeros can't win any more."""
    pytest.importorskip("numba")
    seen = []
    blocks = rows.Rows.blocks
    monkeypatch.setattr(rows.Rows, "blocks", lambda self: seen.append(1) or blocks(self))
    few = [Run(unmask.id3(30), gradients).train(3) for gradients in ("dense", "streaming")]
    assert not seen
    assert_alike(*few)
    Run(unmask.id3(600), "streaming").train(5)
    assert seen
