"""Every named method: one contract for all, an obvious dense version each, PEFT's where it has
one."""

import inspect
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unmask
from lockstep import assert_same_state, chosen, same_bits, same_tree, scalars, snapshot
from models import CONV, MLP, Case, Mlp, seeded
from reference import DenseReference, uniform
from unmask import methods

BUDGET, STEPS, SPLIT = 40, 14, 6
QUICK: Mapping[str, dict[str, Any]] = {  # so that a short run sees what is done now and then
    "fish": {"num_samples": 9},
    "sft_ag": {"every": 4, "window": 2, "rate": 0.5},
    "sft_ma": {"every": 4, "rate": 0.5, "first": 2},
    "lift": {"every": 4, "rank": 2},
    "lt_sft": {"lr": 1e-2},
    "diff_pruning": {"lr": 1e-2},
}
NEEDS_DATA = {"fish", "diff_pruning", "lt_sft"}
Weights = dict[str, Tensor]


def batches(count: int = 4, rows: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Inputs of the MLP, and their classes."""
    draw = seeded(7)
    return [
        (torch.randn(rows, 6, generator=draw), torch.randint(0, 3, (rows,), generator=draw))
        for _ in range(count)
    ]


def build(name: str, budget: unmask.method.Budget = BUDGET) -> unmask.Method:
    if name in ("bitfit", "full"):
        return getattr(methods, name)()
    return getattr(methods, name)(budget=budget, **QUICK.get(name, {}))


class Run:
    def __init__(
        self, method: unmask.Method, model: nn.Module | None = None, optimizer: Any =
        torch.optim.AdamW, steps: int = STEPS, **options: Any,
    ) -> None:  # fmt: skip
        self.model = MLP.build() if model is None else model
        self.base = snapshot(self.model)
        self.tuner = unmask.attach(
            self.model, method, steps=steps, calibration=batches(), **options
        )
        self.optimizer = self.tuner.optimizer(optimizer, lr=0.01)

    def train(self, first: int = 1, last: int = STEPS, case: Case = MLP) -> "Run":
        for step in range(first, last + 1):
            loss = case.loss(self.model, step)
            loss.backward()
            self.optimizer.step()
            self.tuner.report(loss.item())
            self.optimizer.zero_grad()
        return self

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save([self.tuner.state_dict(), self.optimizer.state_dict()], file)
        return file.getvalue()

    def load(self, data: bytes) -> "Run":
        tuner, optimizer = torch.load(io.BytesIO(data), weights_only=True)
        self.tuner.load_state_dict(tuner)
        self.optimizer.load_state_dict(optimizer)
        return self


def lets_go(method: unmask.Method) -> bool:
    """Whether scalars leave the set with the value they have, so that more than B are touched."""
    quotas = [method.strategy.quota(t, BUDGET, BUDGET, STEPS) for t in range(2, STEPS)]
    return any(quota.drop for quota in quotas) and not method.strategy.rewinds


# The contract


@pytest.mark.parametrize("gradients", ["dense", "streaming", "sampled"])
@pytest.mark.parametrize("name", methods.__all__)
def test_contract(name: str, gradients: str, tmp_path: Any) -> None:
    method = build(name)
    run = Run(method, gradients=gradients).train()
    tuner, budget = run.tuner, method.resolve(run.tuner.eligible.total, 1)

    assert len(tuner.slots) == budget == tuner.budget
    assert tuner.active >= budget
    assert tuner.active == budget or lets_go(method)
    assert sum(map(len, tuner.selected().values())) == tuner.active

    now = snapshot(run.model)
    for key, value in now.items():
        rest = torch.ones(value.numel(), dtype=torch.bool)
        rest[tuner.selected().get(key, torch.empty(0, dtype=torch.int64))] = False
        assert same_bits(value.flatten()[rest], run.base[key].flatten()[rest]), key

    tuner.delta().save(tmp_path)
    other = MLP.build()
    undo = unmask.Delta.load(tmp_path).apply(other)
    assert_same_state(snapshot(other), now)
    undo.apply(other)
    assert_same_state(snapshot(other), run.base)
    assert unmask.Delta.load(tmp_path).info["method"] == method.to_dict()

    stopped = Run(method, gradients=gradients).train(last=SPLIT)
    resumed = Run(method, gradients=gradients).load(stopped.save()).train(first=SPLIT + 1)
    assert_same_state(snapshot(resumed.model), now)
    assert chosen(resumed.tuner) == chosen(tuner)
    assert same_tree(resumed.tuner.state_dict(), tuner.state_dict())
    assert same_tree(resumed.optimizer.state_dict(), run.optimizer.state_dict())

    tuner.detach()
    assert_same_state(snapshot(run.model), run.base)


@pytest.mark.parametrize("name", methods.__all__)
def test_low_precision_and_other_shapes(name: str) -> None:
    """bf16 weights, a convolution, batch norm: the budget and the rest hold as well."""
    model = CONV.build().bfloat16()
    base = snapshot(model)
    data = [(torch.randn(4, 2, 8, 8, generator=seeded(i)).bfloat16(), torch.tensor([0, 1, 2, 1]))
            for i in range(2)]  # fmt: skip
    tuner = unmask.attach(model, build(name), steps=6, calibration=data)
    assert_same_state(snapshot(model), base)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in data * 3:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(tuner.slots) == tuner.budget
    tuner.detach()
    assert_same_state(snapshot(model), base)


@pytest.mark.parametrize("name", methods.__all__)
def test_as_json(name: str) -> None:
    method = build(name)
    assert unmask.Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method


@pytest.mark.parametrize("name", methods.__all__)
def test_in_words(name: str) -> None:
    told = methods.describe(name)
    assert told.name == name
    assert told.formula
    assert told.memory
    assert name == "full" or told.source


@pytest.mark.parametrize("name", methods.__all__)
def test_same_call_shape(name: str) -> None:
    parameters = inspect.signature(getattr(methods, name)).parameters
    assert next(iter(parameters)) == "budget"
    assert all(p.default is not p.empty for key, p in parameters.items() if key != "budget")
    assert getattr(unmask, name) is getattr(methods, name)


@pytest.mark.parametrize("name", methods.__all__)
def test_data_where_it_is_needed(name: str) -> None:
    if name not in NEEDS_DATA:
        unmask.attach(MLP.build(), build(name), steps=3)
        return
    model = MLP.build()
    before = snapshot(model)
    with pytest.raises(unmask.UnmaskError, match=r"needs data.*calibration="):
        unmask.attach(model, build(name), steps=3)
    with pytest.raises(unmask.UnmaskError, match="without a single batch"):
        unmask.attach(model, build(name), steps=3, calibration=[])
    assert_same_state(snapshot(model), before)
    assert all(p.requires_grad for p in model.parameters())


# Dense versions, written from the papers' formulas with whole tensors and plain loops.


def compare(method: unmask.Method, scores: Weights) -> None:
    """A static choice of the whole model's best, then training, against the dense reference."""
    reference = DenseReference(
        MLP.build(), budget=BUDGET, steps=STEPS, optimizer=torch.optim.AdamW, strategy="static",
        score=lambda name, weight, grad: scores[name], lr=0.01,
    )  # fmt: skip
    run = Run(method)
    for step in range(1, STEPS + 1):
        MLP.loss(reference.model, step).backward()
        reference.step()
        reference.zero_grad()
    run.train()
    assert chosen(run.tuner) == {n: i.tolist() for n, i in reference.selected().items()}
    assert_same_state(snapshot(run.model), snapshot(reference.model))


def top(scores: Tensor, count: int) -> Tensor:
    return scores.flatten().sort(descending=True, stable=True).indices[:count].sort().values


def loss_grads(model: nn.Module, x: Tensor, y: Tensor) -> Weights:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("grad_type", ["square", "absolute"])
@pytest.mark.parametrize("samples", [9, 1024])
def test_fish(grad_type: str, samples: int) -> None:
    model = MLP.build()
    rows = [(x[i], y[i]) for x, y in batches() for i in range(len(x))][:samples]
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in rows:
        for n, g in loss_grads(model, x[None], y[None]).items():
            total[n] += g**2 if grad_type == "square" else g.abs()
    scores = {n: t / len(rows) for n, t in total.items()}
    compare(unmask.fish(BUDGET, samples, grad_type=grad_type), scores)


def test_fish_of_sampled_labels_nears_the_expected_information() -> None:
    """Against the exact expectation over labels, Σ_y p(y|x) (∇ log p(y|x))²."""
    model = MLP.build()
    exact = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    rows = [row for x, _ in batches() for row in x]
    for x in rows:
        for y, p in enumerate(model(x[None]).softmax(-1).detach()[0]):
            for n, g in loss_grads(model, x[None], torch.tensor([y])).items():
                exact[n] += p * g**2 / len(rows)
    model.zero_grad()
    heuristic = unmask.Fisher(num_samples=10_000, sample_type="model")
    parameters = dict(model.named_parameters())
    found = heuristic.calibrate(model, parameters, batches() * 50)
    for n, wanted in exact.items():
        torch.testing.assert_close(found[n], wanted, rtol=0.25, atol=0.05 * wanted.max().item())
    again = heuristic.calibrate(model, parameters, batches() * 50)
    assert same_tree(found, again)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_lt_sft(optimizer: str) -> None:
    model = MLP.build()
    base = snapshot(model)
    dense = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-2)
    for x, y in batches() * 2:
        dense.zero_grad()
        F.cross_entropy(model(x), y).backward()
        dense.step()
    moved = {n: (p.detach() - base[n]).abs() for n, p in model.named_parameters()}
    compare(unmask.lt_sft(BUDGET, 1e-2, passes=2, optimizer=optimizer), moved)


def test_diff_pruning() -> None:
    """θ = θ_0 + z⊙w written out with functional calls; the noise is drawn in the same order."""
    model = MLP.build()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    w = {n: torch.zeros_like(p, requires_grad=True) for n, p in base.items()}
    a = {n: torch.full_like(p, 5.0, requires_grad=True) for n, p in base.items()}

    def gate(location: Tensor) -> Tensor:
        return torch.clamp(torch.sigmoid(location) * 3 - 1.5, 0, 1)

    groups = [{"params": list(w.values()), "lr": 1e-2}, {"params": list(a.values()), "lr": 0.1}]
    adam = torch.optim.AdamW(groups, weight_decay=0.0)
    draw = seeded(3)
    for x, y in batches() * 3:
        adam.zero_grad()
        theta = {}
        for n in base:
            u = torch.rand(base[n].shape, generator=draw).clamp(1e-6, 1 - 1e-6)
            theta[n] = base[n] + gate(torch.log(u / (1 - u)) + a[n]) * w[n]
        loss = F.cross_entropy(torch.func.functional_call(model, theta, (x,)), y)
        open_gates = sum(torch.sigmoid(g).sum() for g in a.values())
        (loss + 1e-3 * open_gates).backward()
        adam.step()
    scores = {n: (gate(a[n]) * w[n]).abs().detach() for n in base}
    found = unmask.DiffPruning(1e-2, penalty=1e-3, passes=3, seed=3).calibrate(
        model, dict(model.named_parameters()), batches()
    )
    for n in base:
        torch.testing.assert_close(found[n], scores[n], rtol=1e-3, atol=1e-6)
    compare(unmask.diff_pruning(BUDGET, 1e-2, penalty=1e-3, passes=3, seed=3), found)


@pytest.mark.parametrize("pruner", ["snip", "magnitude", "random"])
def test_sparse_adapter(pruner: str) -> None:
    model = MLP.build()
    MLP.loss(model, 1).backward()
    if pruner == "random":
        kept = chosen(unmask.attach(MLP.build(), unmask.random_mask(BUDGET, seed=4)))
        scores = {n: torch.zeros(p.numel()) for n, p in model.named_parameters()}
        for n, flat in kept.items():
            scores[n][flat] = 1.0
        scores = {n: scores[n].view_as(p) for n, p in model.named_parameters()}
    else:
        scores = {
            n: p.detach().abs() if pruner == "magnitude" else (p * p.grad).detach().abs()
            for n, p in model.named_parameters()
        }
    compare(unmask.sparse_adapter(BUDGET, pruner, seed=4), scores)


def parts(model: nn.Module, budget: int, claim: Callable[[Tensor], int]) -> dict[str, int]:
    """A budget shared out by Sainte-Laguë, one seat at a time."""
    claims = {n: claim(p) for n, p in model.named_parameters()}
    seats = dict.fromkeys(claims, 0)
    for _ in range(budget):
        free = [n for n, p in model.named_parameters() if seats[n] < p.numel()]
        seats[max(free, key=lambda n: claims[n] / (2 * seats[n] + 1))] += 1
    return seats


def sides(p: Tensor) -> int:
    return sum(p.shape) if p.ndim == 2 else 0


@pytest.mark.parametrize("largest", [True, False])
def test_super_tuning(largest: bool) -> None:
    model = MLP.build()
    scores = {}
    seats = parts(model, BUDGET, lambda p: p.numel())
    for n, p in model.named_parameters():
        mask = torch.zeros(p.numel())
        mask[top(p.abs() if largest else -p.abs(), seats[n])] = 1.0
        scores[n] = mask.view_as(p)
    compare(unmask.super_tuning(BUDGET, largest), scores)


def test_shira() -> None:
    model = MLP.build()
    seats = parts(model, BUDGET, sides)
    run = Run(unmask.shira(BUDGET)).train()
    assert {n: len(i) for n, i in chosen(run.tuner).items()} == {
        n: s for n, s in seats.items() if s
    }
    again = Run(unmask.shira(BUDGET)).train()
    assert chosen(again.tuner) == chosen(run.tuner)
    assert chosen(Run(unmask.shira(BUDGET, seed=1)).tuner) != chosen(run.tuner)
    scores = {n: torch.zeros(p.numel()) for n, p in model.named_parameters()}
    for n, flat in chosen(run.tuner).items():
        scores[n][flat] = 1.0
    compare(unmask.shira(BUDGET), {n: scores[n].view_as(p) for n, p in model.named_parameters()})


def sgd(model: nn.Module) -> Iterator[tuple[int, dict[str, nn.Parameter], Weights]]:
    """Steps, with the parameters and their gradients; the caller changes the weights."""
    for step in range(1, STEPS + 1):
        model.zero_grad()
        MLP.loss(model, step).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            yield step, dict(model.named_parameters()), grads


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["sft_ag", "sft_ma"])
def test_spiel(name: str, decay: str) -> None:
    """Deltas per tensor: drop the least, back to the base, grow the best scored; plain SGD."""
    every, window, rate, lr = 4, 2, 0.5, 0.1
    model = MLP.build()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    seats = parts(model, BUDGET, lambda p: p.numel())
    active: dict[str, set[int]] = {n: set() for n in base}
    candidates: dict[str, Tensor] = {}
    sums: Weights = {}
    rows = {n: torch.zeros(len(p)) for n, p in base.items()}
    columns = {n: torch.zeros(p.numel() // len(p)) for n, p in base.items()}
    for step, weights, grads in sgd(model):
        phase = (step - 1) % every
        scores = {}
        for n, g in grads.items():
            if name == "sft_ag" and phase < window:
                flat = g.flatten()
                if phase == 0:
                    count = math.ceil(g.numel() * BUDGET / scalars(model))
                    candidates[n], sums[n] = top(flat.abs(), count), torch.zeros(g.numel())
                sums[n][candidates[n]] += flat[candidates[n]]
                scores[n] = sums[n].abs()
            if name == "sft_ma":
                cover = torch.minimum(rows[n][:, None], columns[n][None]) + g.view(len(g), -1) ** 2
                rows[n], columns[n] = cover.max(1).values, cover.max(0).values
                scores[n] = (rows[n].sqrt()[:, None] * columns[n].sqrt()[None]).flatten()
        if phase == window - 1:
            share = 1 - step / STEPS
            share = share if decay == "linear" else (1 + math.cos(math.pi * step / STEPS)) / 2
            drop = int(round(BUDGET * rate * share, 9)) if step > window else 0
            stay = dict(seats) if not drop else parts_of(BUDGET - drop, seats, base)
            if step == window:
                stay = dict.fromkeys(seats, 0)
            for n, w in weights.items():
                moved = (w - base[n]).flatten().abs()
                order = sorted(active[n], key=lambda i: (-moved[i].item(), i))
                kept = set(order[: stay[n]])
                free = [i for i in range(w.numel()) if i not in kept]
                best = sorted(free, key=lambda i: (-scores[n][i].item(), i))
                new = kept | set(best[: seats[n] - len(kept)])
                gone = torch.tensor(sorted(active[n] - new), dtype=torch.int64)
                w.view(-1)[gone] = base[n].flatten()[gone]
                active[n] = new
        for n, w in weights.items():
            flat = torch.tensor(sorted(active[n]), dtype=torch.int64)
            w.view(-1)[flat] = w.view(-1)[flat].add(grads[n].flatten()[flat], alpha=-lr)
    make = getattr(unmask, name)
    options = {"window": window} if name == "sft_ag" else {"first": window}
    run = Run(
        make(BUDGET, every=every, rate=rate, decay=decay, **options), optimizer=torch.optim.SGD
    )
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.train()
    assert chosen(run.tuner) == {n: sorted(a) for n, a in active.items() if a}
    assert_same_state(snapshot(run.model), snapshot(model))


def parts_of(total: int, seats: dict[str, int], base: Weights) -> dict[str, int]:
    """Sainte-Laguë again, with at most what each has now."""
    given = dict.fromkeys(seats, 0)
    for _ in range(total):
        free = [n for n in seats if given[n] < seats[n]]
        given[max(free, key=lambda n: base[n].numel() / (2 * given[n] + 1))] += 1
    return given


def test_lift() -> None:
    """Re-selected from an SVD of the weights as they are; momentum stays where a scalar stays."""
    every, rank, lr, beta = 4, 2, 0.1, 0.9
    model = MLP.build()
    seats = parts(model, BUDGET, sides)
    masks = {n: torch.zeros(p.numel(), dtype=torch.bool) for n, p in model.named_parameters()}
    momentum = {n: torch.zeros(p.numel()) for n, p in model.named_parameters()}
    for step, weights, grads in sgd(model):
        for n, w in weights.items():
            if (step - 1) % every == 0:
                mask = torch.zeros_like(masks[n])
                if w.ndim == 2:
                    u, s, v = torch.linalg.svd(w, full_matrices=False)
                    near = u[:, :rank] @ s[:rank].diag() @ v[:rank]
                    mask[top(near.abs(), seats[n])] = True
                momentum[n][~(mask & masks[n])] = 0.0
                masks[n] = mask
            m = masks[n]
            momentum[n][m] = momentum[n][m] * beta + grads[n].flatten()[m]
            w.view(-1)[m] = w.view(-1)[m].add(momentum[n][m], alpha=-lr)
    tuner = unmask.attach(run_model := MLP.build(), unmask.lift(BUDGET, rank, every))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=lr, momentum=beta)
    for step in range(1, STEPS + 1):
        MLP.loss(run_model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.active > BUDGET
    for n, p in run_model.named_parameters():
        torch.testing.assert_close(p, dict(model.named_parameters())[n])
    current = {
        n: tuner.slots.index[start:stop] - tuner.eligible.offsets[k]
        for k, start, stop in tuner.eligible.split(tuner.slots.index)
        for n in [tuner.eligible.names[k]]
    }
    assert {n: i.tolist() for n, i in current.items()} == {
        n: m.nonzero().flatten().tolist() for n, m in masks.items() if m.any()
    }


def test_the_rest() -> None:
    """pafi, bitfit, random_mask, full and the D3 methods have theirs in test_id3_exact."""
    scores = {n: -p.detach().abs() for n, p in MLP.build().named_parameters()}
    compare(unmask.pafi(BUDGET), scores)
    assert uniform(10, 3) == [3, 3, 4]


# Hugging Face PEFT's


class Wide(nn.Module):
    """Layers of a size that a sparsity of 7/8, exact in binary, divides without a remainder."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 20)
        self.second = nn.Linear(20, 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("largest", [True, False])
def test_super_tuning_is_pefts(largest: bool) -> None:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "SupertuningConfig"):
        pytest.skip("this PEFT has no Super-Tuning")
    torch.manual_seed(0)
    model = Wide()
    tuner = unmask.attach(model, unmask.super_tuning(0.125, largest), include="*weight")
    ours = chosen(tuner)
    tuner.detach()
    config = peft.SupertuningConfig(
        target_modules=["first", "second"], sparsity=0.875, select_top=largest
    )
    layers = dict(peft.get_peft_model(model, config).base_model.model.named_children())
    for name, layer in layers.items():
        theirs = layer.supertuning_indices["default"].long().sort().values.tolist()
        assert ours[f"{name}.weight"] == theirs


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shira_has_pefts_counts(rank: int) -> None:
    """PEFT draws from torch's generator, ours from a hash: equal in number, layer by layer."""
    masks = pytest.importorskip("peft.tuners.shira.mask_functions")
    model = Mlp()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    theirs = {n: int(masks.random_mask(m, rank, random_seed=0).sum()) for n, m in layers.items()}
    budget = sum(theirs.values())
    ours = chosen(unmask.attach(model, unmask.shira(budget)))
    assert {n: len(ours[f"{n}.weight"]) for n in layers} == theirs
