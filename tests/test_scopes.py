"""Scopes: parts that add up, bounds that hold, units that are whole."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import unmask
from lockstep import chosen, scalars, snapshot
from models import ALL, LORA, MLP, TRANSFORMER, Case
from test_methods import Run
from unmask import UnmaskError
from unmask.allot import allot

SCOPES: dict[str, unmask.Scope] = {
    "global": unmask.Global(),
    "bounded": unmask.Bounded(floor=1, cap=0.5),
    "tensor": unmask.PerTensor(),
    "sides": unmask.PerTensor(by="sides"),
    "even": unmask.PerTensor(by="even"),
    "layer": unmask.PerLayer(),
    "patterns": unmask.PerLayer(patterns=("*weight",)),
    "layer-bounded": unmask.PerLayer(within=unmask.Bounded(cap=0.7)),
    "rows": unmask.Units(),
    "columns": unmask.Units(None, 1),
    "heads": unmask.Units(4, None),
    "blocks": unmask.Units(3, 5),
    "rows-per-tensor": unmask.PerTensor(within=unmask.Units()),
}
B = 40


def gradient_scores(case: Case, step: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    model = case.build()
    case.loss(model, step).backward()
    none = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    return model, none | {
        n: p.grad.abs() for n, p in model.named_parameters() if p.grad is not None
    }


def first_choice(scope: unmask.Scope, case: Case = MLP, budget: Any = B) -> dict[str, list[int]]:
    method = unmask.Method(unmask.Gradient(), unmask.Static(), budget, scope=scope)
    model = case.build()
    tuner = unmask.attach(model, method, steps=3)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    case.loss(model, 1).backward()
    optimizer.step()
    return chosen(tuner)


# Every scope, every way of choosing


@pytest.mark.parametrize("gradients", ["dense", "streaming"])
@pytest.mark.parametrize(
    "strategy",
    [unmask.Static(), unmask.Increment(), unmask.Repeat(), unmask.DropGrow(every=3, rate=0.5)],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("name", SCOPES)
def test_exact_and_resumable(name: str, strategy: unmask.Strategy, gradients: str) -> None:
    method = unmask.Method(unmask.D3(), strategy, B, scope=SCOPES[name])
    assert unmask.Method.from_dict(method.to_dict()) == method
    run = Run(method, gradients=gradients).train()
    assert len(run.tuner.slots) == B
    half = Run(method, gradients=gradients).train(last=5)
    again = Run(method, gradients=gradients).load(half.save()).train(first=6)
    assert chosen(again.tuner) == chosen(run.tuner)


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("name", SCOPES)
def test_every_model(name: str, case: Case) -> None:
    if case is LORA:
        pytest.importorskip("peft")
    model = case.build()
    budget = scalars(model) // 3
    picked = first_choice(SCOPES[name], case, budget)
    assert sum(map(len, picked.values())) == budget


@pytest.mark.parametrize("name", SCOPES)
def test_a_nan_anywhere_is_seen(name: str) -> None:
    method = unmask.Method(unmask.Gradient(), unmask.Increment(), 3, scope=SCOPES[name])
    for position in range(6):
        model = MLP.build()
        before = snapshot(model)
        tuner = unmask.attach(model, method, steps=3)
        optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
        MLP.loss(model, 1).backward()
        list(model.parameters())[position].grad.view(-1)[-1] = float("nan")
        with pytest.warns(unmask.UnmaskWarning, match="not finite"):
            optimizer.step()
        assert tuner.active == tuner.step == 0
        assert all(
            torch.equal(a, b)
            for a, b in zip(before.values(), model.state_dict().values(), strict=True)
        )


# allot


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 20), st.integers(0, 60)),
        min_size=1,
        max_size=8,
    ),
    st.data(),
)
def test_allot_is_sainte_lague(groups: list[tuple[int, int, int]], data: st.DataObject) -> None:
    claims = [c for c, _, _ in groups]
    least = [low for _, low, _ in groups]
    most = [low + more for _, low, more in groups]
    total = data.draw(st.integers(sum(least), sum(most)))
    parts = list(least)
    for _ in range(total - sum(least)):
        room = [i for i in range(len(parts)) if parts[i] < most[i]]
        claimants = [i for i in room if claims[i]]
        key = (lambda i: claims[i] / (2 * parts[i] + 1)) if claimants else (
            lambda i: most[i] / (2 * parts[i] + 1))  # fmt: skip
        parts[max(claimants or room, key=key)] += 1
    assert allot(total, claims, least, most) == parts


def test_allot_of_equal_claims() -> None:
    """18 / (2·55 + 1) = 6 / (2·18 + 1): the first has it."""
    claims, least, most = [0, 2, 13, 16, 18, 6], [11, 0, 0, 0, 0, 0], [11, 6, 40, 49, 56, 19]
    assert allot(180, claims, least, most) == [11, 6, 40, 49, 56, 18]


def test_allot_of_large_numbers() -> None:
    claims = [30_522 * 768, 768 * 768, 3072 * 768, 768] * 12
    parts = allot(320_000, claims, [0] * 48, claims)
    assert sum(parts) == 320_000
    exact = [320_000 * c / sum(claims) for c in claims]
    assert max(abs(p - e) for p, e in zip(parts, exact, strict=True)) < 1


def test_a_growing_budget_never_shrinks_a_part() -> None:
    claims = [7, 11, 3, 5, 2, 2]
    before = [0] * 6
    for total in range(1, 60):
        now = allot(total, claims, [0] * 6, [30] * 6)
        assert sum(now) == total
        assert all(a <= b for a, b in zip(before, now, strict=True))
        before = now


# Bounded


@pytest.mark.parametrize(
    ("floor", "cap"),
    [(0, 1.0), (3, 1.0), (0, 10), (2, 9), (0.05, 0.25), (0.01, 50), (0.5, 9), (20, 0.25)],
)
@pytest.mark.parametrize("case", [MLP, TRANSFORMER], ids=str)
def test_bounds_hold_and_the_rest_is_the_best(floor: float, cap: float, case: Case) -> None:
    model, scores = gradient_scores(case)
    picked = first_choice(unmask.Bounded(floor, cap), case)
    sizes = {n: p.numel() for n, p in model.named_parameters()}

    def size(bound: float, n: int) -> int:
        return min(n, bound) if isinstance(bound, int) else -int(-bound * n // 1)

    must, may = (
        [],
        [],
    )  # obvious: sort each tensor, take its floor, then the best of what caps leave
    start = 0
    for name, count in sizes.items():
        order = scores[name].flatten().sort(descending=True, stable=True).indices.tolist()
        flat = scores[name].flatten()
        mine = [(-flat[i].item(), start + i, name, i) for i in order]
        low = min(size(floor, count), size(cap, count))
        must += mine[:low]
        may += mine[low : max(low, size(cap, count))]
        start += count
    taken = sorted(must)[:B]
    taken += sorted(may)[: B - len(taken)]
    expected: dict[str, list[int]] = {}
    for _, _, name, i in taken:
        expected.setdefault(name, []).append(i)
    assert picked == {n: sorted(i) for n, i in expected.items()}


def test_without_bounds_it_is_global() -> None:
    assert first_choice(unmask.Bounded()) == first_choice(unmask.Global())


def test_bounds_hold_in_a_growing_set() -> None:
    run = Run(unmask.id3(B)).train()
    method = unmask.Method(unmask.D3(), unmask.Increment(), B, scope=unmask.Bounded(4, 8))
    bounded = Run(method).train()
    counts = {n: len(i) for n, i in chosen(bounded.tuner).items()}
    assert set(counts) == {n for n, _ in MLP.build().named_parameters()}
    assert all(min(4, p.numel()) <= counts[n] <= 8 for n, p in MLP.build().named_parameters())
    assert chosen(run.tuner) != chosen(bounded.tuner)


def test_refused() -> None:
    with pytest.raises(UnmaskError, match="leaves room for 6 more scalars, and 40"):
        first_choice(unmask.Bounded(cap=1))
    with pytest.raises(UnmaskError, match="leaves room"):
        first_choice(unmask.PerLayer(within=unmask.Bounded(cap=1)))
    for floor, cap in ((0.5, 0.1), (5, 4)):
        with pytest.raises(UnmaskError, match="above cap"):
            unmask.Bounded(floor=floor, cap=cap)
    for wrong in (-1, 1.5, float("nan")):
        with pytest.raises(UnmaskError, match="no floor or cap"):
            unmask.Bounded(cap=wrong)
        with pytest.raises(UnmaskError, match="no floor or cap"):
            unmask.Bounded(floor=wrong)
    with pytest.raises(UnmaskError, match="by='weight'"):
        unmask.PerTensor(by="weight")
    for within in (unmask.PerTensor(), unmask.PerLayer(), "Units", unmask.Units):
        with pytest.raises(UnmaskError, match=r"within=.*deals out no parts"):
            unmask.PerLayer(within=within)  # type: ignore[arg-type]
    with pytest.raises(UnmaskError, match="rows=0"):
        unmask.Units(rows=0)


# Per tensor, per layer


def test_per_tensor_is_the_top_of_each() -> None:
    _, scores = gradient_scores(MLP)
    for name, flat in first_choice(unmask.PerTensor()).items():
        order = scores[name].flatten().sort(descending=True, stable=True).indices
        assert flat == sorted(order[: len(flat)].tolist())


@pytest.mark.parametrize(
    ("scope", "groups"),
    [
        (unmask.PerLayer(), ["enc.0", "enc.0", "enc.1", "enc.1", "head", "head"]),
        (unmask.PerLayer(depth=1), ["enc", "enc", "enc", "enc", "head", "head"]),
        (
            unmask.PerLayer(patterns=("*.0.*", "*bias")),
            list("aababb")[:0] or ["0", "0", "", "b", "", "b"],
        ),
    ],
)
def test_what_a_layer_is(scope: unmask.PerLayer, groups: list[str]) -> None:
    model = nn.Sequential()
    model.enc = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    model.head = nn.Linear(5, 2)
    tuner = unmask.attach(model, unmask.id3(9), steps=3)
    found = scope.groups(tuner.eligible)
    order = list(dict.fromkeys(groups))
    assert found == [order.index(g) for g in groups]


def test_per_layer_is_the_top_of_each() -> None:
    model, scores = gradient_scores(MLP)
    picked = first_choice(unmask.PerLayer())
    for layer in ("first", "second", "classifier"):
        names = [n for n, _ in model.named_parameters() if n.startswith(layer)]
        flat = torch.cat([scores[n].flatten() for n in names])
        count = sum(len(picked.get(n, [])) for n in names)
        best = sorted(flat.sort(descending=True, stable=True).indices[:count].tolist())
        offset, found = 0, []
        for n in names:
            found += [offset + i for i in picked.get(n, [])]
            offset += scores[n].numel()
        assert found == best


# Units


def tiles(shape: torch.Size, cut: unmask.Units) -> list[list[int]]:
    """Flat indices of each unit, left to right, top to bottom."""
    height = shape[0] if len(shape) else 1
    width = max(1, shape.numel() // height)
    rows, columns = cut.rows or height, cut.columns or width
    return [
        [
            r * width + c
            for r in range(top, min(top + rows, height))
            for c in range(left, min(left + columns, width))
        ]
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]


@pytest.mark.parametrize("name", ["rows", "columns", "heads", "blocks"])
@pytest.mark.parametrize("budget", [1, 13, 40, 170, 278])
def test_units_are_whole_but_for_one(name: str, budget: int) -> None:
    cut = SCOPES[name]
    assert isinstance(cut, unmask.Units)
    model, scores = gradient_scores(MLP)
    units = []
    start = 0
    for n, p in model.named_parameters():
        for flat in tiles(p.shape, cut):
            mean = scores[n].flatten()[flat].double().mean().item()
            units.append((-mean, start + flat[0], n, flat))
        start += p.numel()
    expected: dict[str, list[int]] = {}
    left = budget
    for _, _, n, flat in sorted(units):
        values = scores[n].flatten()
        best = sorted(flat, key=lambda i: (-values[i].item(), i))[:left]
        left -= len(best)
        if best:
            expected.setdefault(n, []).extend(best)
    assert first_choice(cut, MLP, budget) == {n: sorted(i) for n, i in expected.items()}


def begun(model: nn.Module, picked: dict[str, list[int]], cut: unmask.Units) -> int:
    """How many units are neither untouched nor whole."""
    count = 0
    for n, p in model.named_parameters():
        mine = set(picked.get(n, []))
        count += sum(0 < len(mine & set(flat)) < len(flat) for flat in tiles(p.shape, cut))
    return count


@pytest.mark.parametrize(
    "strategy", [unmask.Increment(), unmask.DropGrow(every=3, rate=0.5), unmask.Repeat()]
)
@pytest.mark.parametrize("name", ["rows", "columns", "heads", "blocks"])
def test_at_most_one_unit_is_begun_at_any_time(name: str, strategy: unmask.Strategy) -> None:
    cut = SCOPES[name]
    assert isinstance(cut, unmask.Units)
    run = Run(unmask.Method(unmask.D3(), strategy, 50, scope=cut))
    for step in range(1, 12):
        run.train(step, step)
        slots, eligible = run.tuner.slots, run.tuner.eligible
        now = {
            eligible.names[k]: (slots.index[a:b] - eligible.offsets[k]).tolist()
            for k, a, b in eligible.split(slots.index)
        }
        assert begun(run.model, now, cut) <= 1


def test_single_scalars_as_units_are_the_global_choice() -> None:
    assert first_choice(unmask.Units(1, 1)) == first_choice(unmask.Global())


def test_a_share_is_rounded_up_once() -> None:
    model = nn.Linear(100, 1, bias=False)  # 0.07 · 100 is 7.000000000000001 in floats
    method = unmask.Method(
        unmask.Magnitude(), unmask.Static(), 7, scope=unmask.Bounded(floor=0.07, cap=0.07)
    )
    assert unmask.attach(model, method).active == 7
    with pytest.raises(UnmaskError, match="leaves room for 7"):
        unmask.attach(nn.Linear(100, 1, bias=False), replace(method, budget=8))


def test_one_pattern_as_a_plain_string() -> None:
    assert unmask.PerLayer(patterns="a.*") == unmask.PerLayer(patterns=("a.*",))  # type: ignore[arg-type]
