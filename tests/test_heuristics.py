"""Heuristics: formulas, special cases, memories and what they cost."""

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import unmask
from lockstep import assert_same_state, chosen, same_tree, snapshot
from models import MLP, TRANSFORMER, seeded
from test_methods import Run, batches, lets_go
from unmask import Scalars, UnmaskError, Whole, heuristics

CLASSES = [
    kind
    for name in heuristics.__all__
    if inspect.isclass(kind := getattr(heuristics, name))
    and issubclass(kind, unmask.Heuristic)
    and kind is not unmask.Heuristic
]
B = 40
MEMORIES = [
    unmask.Accumulated(),
    unmask.Accumulated(unmask.D3(), of="gradient"),
    unmask.Smoothed(),
    unmask.Smoothed(unmask.Taylor(), decay=0.5, of="gradient"),
    unmask.Candidates(window=2, every=4),
    unmask.Cover(),
]


def some(count: int = 300, seed: int = 0) -> Scalars:
    theta, grad = (torch.randn(count, generator=seeded(seed + i)) for i in (0, 1))
    return Scalars(theta, grad, "layer.weight", 17, range(count), theta.square())


@pytest.mark.parametrize("kind", CLASSES)
def test_contract(kind: type[unmask.Heuristic]) -> None:
    """Default fields, equality, JSON, docs; any piece of a parameter gets the same numbers."""
    heuristic = kind()
    assert kind() == heuristic
    assert hash(kind()) == hash(heuristic)
    assert "H(θ" in str(kind.__doc__) or "S_t" in str(kind.__doc__)
    method = unmask.Method(heuristic, unmask.Increment(), 9)
    assert unmask.Method.from_dict(method.to_dict()) == method
    s = some()
    score = heuristic.score(s)
    assert score.dtype == torch.float32
    assert score.shape == s.theta.shape
    pick = torch.tensor([3, 5, 200, 299])
    piece = Scalars(s.theta[pick], s.grad[pick], s.name, s.offset, pick, s.seen[pick])
    assert torch.equal(heuristic.score(piece), score[pick])
    part = Scalars(s.theta[7:90], s.grad[7:90], s.name, s.offset, range(7, 90), s.seen[7:90])
    assert torch.equal(heuristic.score(part), score[7:90])


@pytest.mark.parametrize("kind", CLASSES)
def test_grows_a_set_and_resumes(kind: type[unmask.Heuristic]) -> None:
    method = unmask.Method(kind(), unmask.Increment(), B)
    run = Run(method).train()
    assert run.tuner.active == B
    half = Run(method).train(last=5)
    again = Run(method).load(half.save()).train(first=6)
    assert chosen(again.tuner) == chosen(run.tuner)
    assert_same_state(snapshot(again.model), snapshot(run.model))
    assert same_tree(again.tuner.state_dict(), run.tuner.state_dict())


# Special cases of D3, stated in its docstring and docs page


@given(st.floats(1e-3, 10.0), st.integers(0, 5))
def test_d3_with_exp_zero_is_the_gradient(eps: float, seed: int) -> None:
    s = some(seed=seed)
    assert torch.equal(unmask.D3(exp=0.0, eps=eps).score(s), unmask.Gradient().score(s))
    assert torch.equal(unmask.Gradient().score(s), s.grad.abs())


def test_d3_with_exp_minus_one_is_taylor_as_eps_vanishes() -> None:
    s = some()
    torch.testing.assert_close(unmask.D3(-1.0, 1e-30).score(s), unmask.Taylor().score(s))


def test_d3_with_growing_exp_is_the_smallest_magnitude() -> None:
    s = some(50)
    orders = [
        h.score(s).argsort(descending=True) for h in (unmask.D3(exp=200.0), unmask.Magnitude())
    ]
    assert {*orders[0][:5].tolist()} == {*orders[1][:5].tolist()}


def test_squared_gradient_orders_as_the_gradient() -> None:
    s = some()
    orders = [h.score(s).argsort() for h in (unmask.SquaredGradient(), unmask.Gradient())]
    assert torch.equal(*orders)


def test_magnitude_taylor_biases() -> None:
    s = some()
    assert torch.equal(unmask.Magnitude(largest=True).score(s), s.theta.abs())
    assert torch.equal(unmask.Magnitude().score(s), -s.theta.abs())
    assert torch.equal(unmask.Taylor().score(s), (s.theta * s.grad).abs())
    assert unmask.Biases().score(s).eq(0).all()
    bias = Scalars(s.theta, s.grad, "layer.bias", 0, s.flat)
    assert unmask.Biases().score(bias).eq(1).all()
    method = unmask.Method(unmask.Biases(), unmask.Static(), 27)
    assert chosen(unmask.attach(MLP.build(), method)) == {
        f"{n}.bias": list(range(k)) for n, k in (("first", 12), ("second", 12), ("classifier", 3))
    }


# Principal weights


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7), (4, 3, 2, 2), (8,), ()])
@pytest.mark.parametrize("rank", [1, 2, 5, 99])
def test_principal_weights_are_those_of_a_truncated_svd(shape: tuple[int, ...], rank: int) -> None:
    w = torch.randn(shape, generator=seeded(3))
    near = unmask.Principal(rank).survey(None, Whole(w, torch.zeros_like(w), "w", 1, 0.1))
    wanted = w
    if len(shape) > 1:
        u, s, v = torch.linalg.svd(w.reshape(len(w), -1).double(), full_matrices=False)
        wanted = (u[:, :rank] @ s[:rank].diag() @ v[:rank]).float().reshape(shape)
    torch.testing.assert_close(near, wanted, rtol=1e-4, atol=1e-5)


# Memories


def trajectory(
    run: Run, steps: int = 6
) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Tensor]]]:
    """Weights and gradients of each step, then the step."""
    for step in range(1, steps + 1):
        MLP.loss(run.model, step).backward()
        named = dict(run.model.named_parameters())
        yield step, {n: p.detach().clone() for n, p in named.items()}, {
            n: p.grad.clone() for n, p in named.items() if p.grad is not None
        }  # fmt: skip
        run.optimizer.step()
        run.optimizer.zero_grad()


def kept(run: Run) -> dict[str, Tensor]:
    return run.tuner.state_dict()["seen"]


def sgd(heuristic: unmask.Heuristic, **options: object) -> Run:
    method = unmask.Method(heuristic, unmask.Increment(unmask.Strided(every=3)), B)
    return Run(method, optimizer=torch.optim.SGD, **options)


@pytest.mark.parametrize("of", ["score", "gradient"])
def test_accumulated_and_smoothed_by_hand(of: str) -> None:
    """They see every step's gradients, also of steps that choose nothing."""
    inner = unmask.D3(exp=1.0)
    sums, means = sgd(unmask.Accumulated(inner, of)), sgd(unmask.Smoothed(inner, 0.7, of))
    for run, decay, share in ((sums, 1.0, 1.0), (means, 0.7, 0.3)):
        wanted: dict[str, Tensor] = {}
        for _, weights, grads in trajectory(run):
            for n, g in grads.items():
                new = g if of == "gradient" else g.abs() / (weights[n].abs() + 1)
                wanted[n] = wanted.get(n, torch.zeros_like(g)) * decay + new * share
        for n, tensor in kept(run).items():
            torch.testing.assert_close(tensor, wanted[n].flatten())


def test_smoothing_without_decay_is_the_score_itself() -> None:
    for inner in (unmask.D3(), unmask.Gradient(), unmask.Taylor()):
        for of in ("score", "gradient"):
            plain = Run(unmask.Method(inner, unmask.Increment(), B)).train()
            same = Run(unmask.Method(unmask.Smoothed(inner, 0.0, of), unmask.Increment(), B))
            assert chosen(same.train().tuner) == chosen(plain.tuner)


def test_opposite_gradients_cancel_in_a_sum_of_gradients_only() -> None:
    w, g = torch.ones(3), torch.tensor([1.0, -2.0, 0.5])
    for of, wanted in (("score", [2.0, 4.0, 1.0]), ("gradient", [0.0, 0.0, 0.0])):
        heuristic = unmask.Accumulated(of=of)
        state = None
        for step, sign in ((1, 1), (2, -1)):
            state = heuristic.observe(state, Whole(w, sign * g, "w", step, 0.5))
        s = Scalars(w, g, "w", 0, range(3), state)
        assert heuristic.score(s).tolist() == wanted


def test_cover_is_above_the_sum_of_squares() -> None:
    """SM3's guarantee: min(r_i, c_j) bounds the accumulated square of each gradient."""
    run = sgd(unmask.Cover())
    total: dict[str, Tensor] = {}
    for _, _, grads in trajectory(run):
        total = {n: total.get(n, 0) + g**2 for n, g in grads.items()}
    for n, state in kept(run).items():
        matrix = total[n].reshape(len(total[n]), -1)
        rows, columns = state.split(tuple(matrix.shape))
        assert (torch.minimum(rows[:, None], columns[None]) >= matrix - 1e-6).all()


def test_what_is_kept_is_as_large_as_it_says() -> None:
    numbers = {n: p.numel() for n, p in MLP.build().named_parameters()}
    total = sum(numbers.values())
    for heuristic in MEMORIES:
        run = sgd(heuristic)
        for _ in trajectory(run):
            pass
        held = sum(t.numel() * t.element_size() for t in kept(run).values())
        if isinstance(heuristic, unmask.Candidates):
            assert held <= 16 * (B + len(numbers))
        elif isinstance(heuristic, unmask.Cover):
            sides = (sum(p.shape) if p.ndim == 2 else 1 + len(p) for p in run.model.parameters())
            assert held == 4 * sum(sides)
        else:
            assert held == 4 * total


def test_candidates_watch_their_window_only() -> None:
    heuristic = unmask.Candidates(window=2, every=5)
    assert [t for t in range(1, 13) if heuristic.watches(t)] == [1, 2, 6, 7, 11, 12]
    assert not unmask.D3().watches(1)
    assert all(unmask.Cover().watches(t) for t in range(1, 9))


@pytest.mark.parametrize("heuristic", MEMORIES, ids=lambda h: type(h).__name__)
@pytest.mark.parametrize("gradients", ["dense", "streaming", "sampled"])
def test_a_step_is_remembered_once(heuristic: unmask.Heuristic, gradients: str) -> None:
    """However often the gradient is read, however it arrives, in however many passes."""
    plain = sgd(heuristic)
    for _ in trajectory(plain):
        pass
    run = sgd(heuristic, gradients=gradients, accumulation=2)
    for step in range(1, 7):
        for _ in range(2):
            (MLP.loss(run.model, step) / 2).backward()
        values = run.tuner.slots.values
        before = copy.deepcopy(kept(run))
        nn.utils.clip_grad_norm_(values, 1e9)
        assert same_tree(before, kept(run))  # in force with the step, not before
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert chosen(run.tuner) == chosen(plain.tuner)
    for n, tensor in kept(plain).items():
        torch.testing.assert_close(kept(run)[n], tensor)


@pytest.mark.parametrize("heuristic", MEMORIES, ids=lambda h: type(h).__name__)
def test_a_skipped_step_leaves_no_memory(heuristic: unmask.Heuristic) -> None:
    run = sgd(heuristic).train(last=1)
    before = copy.deepcopy(run.tuner.state_dict())
    MLP.loss(run.model, 2).backward()
    run.model.second.weight.grad[0, 0] = math.inf
    with pytest.warns(unmask.UnmaskWarning, match="step 2 was skipped"):
        run.optimizer.step()
    run.optimizer.zero_grad()
    assert same_tree(before, run.tuner.state_dict())


def test_a_parameter_without_gradient_counts_as_one_with_gradient_zero() -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    method = unmask.Method(unmask.Smoothed(decay=0.5), unmask.Increment(), 3)
    tuner = unmask.attach(model, method, steps=4)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.0)
    for layer in (0, 1):
        model[layer](torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    seen = tuner.state_dict()["seen"]
    assert seen["0.weight"].tolist() == [0.25] * 9
    assert seen["1.weight"].tolist() == [0.5] * 9


# What a user writes


@dataclass(frozen=True)
class Rare(unmask.Heuristic):
    """H(θ) = 1 / (1 + times its gradient was above a bound), from the docs page."""

    bound: float = 1e-3

    def observe(self, kept: Tensor | None, whole: Whole) -> Tensor:
        often = (whole.grad.abs() > self.bound).float()
        return often if kept is None else kept + often

    def score(self, s: Scalars) -> Tensor:
        return 1 / (1 + s.seen)


@dataclass(frozen=True)
class Placed(unmask.Heuristic):
    """Goes by all that it sees: the parameter's name, the scalar's place in it and in the model."""

    def score(self, s: Scalars) -> Tensor:
        place = s.flat if isinstance(s.flat, Tensor) else torch.arange(s.flat.start, s.flat.stop)
        return s.grad.abs() * (2.0 + torch.sin(s.index + 0.5 * place + len(s.name)))


@pytest.mark.parametrize("of", ["score", "gradient"])
def test_an_inner_heuristic_sees_what_it_sees_alone(of: str) -> None:
    """At one step, a mean without decay and a sum are the score itself."""
    for outer in (unmask.Smoothed(Placed(), 0.0, of), unmask.Accumulated(Placed(), of)):
        alone, within = (
            Run(unmask.Method(h, unmask.Static(), B)).train() for h in (Placed(), outer)
        )
        assert chosen(within.tuner) == chosen(alone.tuner)


def test_a_memory_of_ones_own() -> None:
    method = unmask.Method(Rare(), unmask.Increment(), B)
    assert method.to_dict()["heuristic"]["kind"] == "test_heuristics.Rare"
    assert unmask.Method.from_dict(method.to_dict()) == method
    run = Run(method).train()
    assert run.tuner.active == B
    assert not lets_go(method)
    model = TRANSFORMER.build()
    tuner = unmask.attach(model, method, steps=3)
    optimizer = tuner.optimizer(torch.optim.AdamW)
    TRANSFORMER.loss(model, 1).backward()
    optimizer.step()
    assert tuner.active == B // 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: unmask.Principal(rank=0),
        lambda: unmask.Smoothed(decay=1.0),
        lambda: unmask.Smoothed(of="weight"),
        lambda: unmask.Accumulated(inner=unmask.Magnitude()),
        lambda: unmask.Accumulated(inner=unmask.Smoothed()),
        lambda: unmask.Accumulated(inner=unmask.Fisher()),
        lambda: unmask.Calibrated(inner=unmask.Cover()),
        lambda: unmask.Smoothed(inner="D3"),  # type: ignore[arg-type]
        lambda: unmask.Smoothed(inner=unmask.D3),  # type: ignore[arg-type]
        lambda: unmask.Candidates(window=0),
        lambda: unmask.Candidates(window=1.5),
        lambda: unmask.Candidates(window=9, every=8),
        lambda: unmask.Fisher(num_samples=0),
        lambda: unmask.Fisher(sample_type="expect"),
        lambda: unmask.Fisher(grad_type="cube"),
        lambda: unmask.Movement(optimizer="Adamw"),
        lambda: unmask.Movement(optimizer="lr_scheduler"),
        lambda: unmask.Movement(lr=0.0),
        lambda: unmask.DiffPruning(passes=0),
    ],
)
def test_refused(make: object) -> None:
    with pytest.raises(UnmaskError, match="was asked for"):
        make()  # type: ignore[operator]


def test_calibrated_taylor_is_the_mean_gradient_s() -> None:
    model = MLP.build()
    method = unmask.Method(unmask.Calibrated(), unmask.Static(), B)
    tuner = unmask.attach(MLP.build(), method, calibration=batches())
    for x, y in batches():
        (nn.functional.cross_entropy(model(x), y) / len(batches())).backward()
    flat = torch.cat([(p * p.grad).abs().flatten() for p in model.parameters()])
    best = sorted(flat.sort(descending=True, stable=True).indices[:B].tolist())
    assert tuner.slots.index.tolist() == best
