"""Composing deltas, against doing the same with whole weight tensors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from tiny import write_model
from unmask import Overlap, cli, compose, distance, intersect, overlap, subtract
from unmask.delta import Delta, Sparse, fingerprint
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.recipes.combine import compose_folders


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)


def delta_of(model: nn.Module, share: float, seed: int, **rest) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    base, after = {}, {}
    for name, p in model.named_parameters():
        at = torch.rand(p.numel(), generator=generator).lt(share).nonzero().squeeze(1)
        if len(at):
            values = p.detach().view(-1)[at]
            step = torch.randn(len(at), generator=generator)
            moved = values + (step + step.sign() / 4).to(values.dtype)  # none rounds to no change
            base[name] = Sparse(p.shape, at, values)
            after[name] = Sparse(p.shape, at, moved)
    return Delta(after, base=fingerprint(base), **rest)


def weights(model: nn.Module, *deltas: Delta) -> dict[str, Tensor]:
    """The weights with each delta put on, one after the other, and taken off again."""
    undo = [delta.apply(model) for delta in deltas]
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    for one in reversed(undo):
        one.apply(model)
    return held


def dense(model: nn.Module, deltas: list[Delta]) -> dict[str, Tensor]:
    """All changes as whole tensors, a row a delta, in float64."""
    base = weights(model)
    each = [weights(model, delta) for delta in deltas]
    return {n: torch.stack([w[n].double() - b.double() for w in each]) for n, b in base.items()}


def ties(changes: Tensor, factors: Tensor) -> Tensor:
    """Sign election and disjoint mean, entry by entry."""
    out = torch.zeros(changes[0].shape, dtype=torch.float64).view(-1)
    rows = changes.view(len(changes), -1)
    for i in range(rows.shape[1]):
        sign = 1.0 if rows[:, i].sum() >= 0 else -1.0
        agreeing = [float(w * c) for w, c in zip(factors, rows[:, i], strict=True) if c * sign > 0]
        out[i] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out.view(changes[0].shape)


def last(changes: Tensor, factors: Tensor) -> Tensor:
    out = torch.zeros(changes[0].shape, dtype=torch.float64)
    for change, factor in zip(changes, factors, strict=True):
        out = torch.where(change != 0, factor * change, out)
    return out


REFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda changes, factors: torch.tensordot(factors, changes, 1),
    "last": last,
    "ties": ties,
}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 99)), min_size=1, max_size=4),
    st.sampled_from(["sum", "last", "ties"]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_it_is_what_whole_weight_tensors_give(given_, conflicts, weighted, dtype):
    model = network(dtype)
    deltas = [delta_of(model, share, seed) for share, seed in given_]
    factors = [1.0, -0.5, 2.0, 0.25][: len(deltas)] if weighted else None
    before = weights(model)
    composed = compose(deltas, model, weights=factors, conflicts=conflicts)
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())
    wanted = {}
    for name, changes in dense(model, deltas).items():
        scale = torch.tensor(factors or [1.0] * len(deltas), dtype=torch.float64)
        wanted[name] = before[name].double() + REFERENCES[conflicts](changes, scale)
    for name, found in weights(model, composed).items():
        assert torch.allclose(
            found.double(), wanted[name], rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6
        )


def test_ties_is_peft_s():
    merging = pytest.importorskip("peft.utils.merge_utils")
    model = network()
    deltas = [delta_of(model, 1.0, seed) for seed in (1, 2, 3)]
    factors = torch.tensor([0.5, 1.0, 2.0])
    composed = weights(
        model, compose(deltas, model, weights=factors.tolist(), conflicts="ties", keep=0.4)
    )
    before = weights(model)
    flat = [
        torch.cat([(w - before[n]).view(-1) for n, w in weights(model, delta).items()])
        for delta in deltas
    ]
    wanted = merging.ties(flat, factors, density=0.4)
    found = torch.cat([(composed[n] - before[n]).view(-1) for n in before])
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("conflicts", ["sum", "last", "ties"])
def test_disjoint_deltas_compose_to_the_very_bits_of_both(conflicts):
    model = network()
    first, apart = (half(model, delta_of(model, 0.9, 1), parity) for parity in (0, 1))
    assert overlap(first, apart).shared == 0
    composed = compose([first, apart], model, conflicts=conflicts)
    for name, found in weights(model, composed).items():
        assert torch.equal(found, weights(model, first, apart)[name])
        assert not torch.equal(found, weights(model)[name])
    assert replace(compose([first], model, conflicts=conflicts), info={}) == first


def half(model: nn.Module, delta: Delta, parity: int) -> Delta:
    """The delta at even or at odd positions alone."""
    sparse, before = {}, {}
    for name, base in delta.verify(model).items():
        keep = base.indices % 2 == parity
        before[name] = Sparse(base.shape, base.indices[keep], base.values[keep])
        sparse[name] = replace(before[name], values=delta.sparse[name].values[keep])
    return Delta(sparse, base=fingerprint(before))


def test_subtracting_leaves_what_the_other_did_not_do():
    model = network()
    first, second = delta_of(model, 0.4, 1), delta_of(model, 0.4, 2)
    both = compose([first, second], model)
    left = weights(model, subtract(both, second, model))
    assert all(torch.allclose(left[n], w, atol=1e-6) for n, w in weights(model, first).items())


def test_overlap_distance_and_intersection():
    model = network()
    first, second = delta_of(model, 0.5, 1), delta_of(model, 0.5, 2)
    found = overlap(first, second)
    changes = dense(model, [first, second])
    shared = sum(int(((c[0] != 0) & (c[1] != 0)).sum()) for c in changes.values())
    assert found == Overlap(
        shared, first.active - shared, second.active - shared,
        shared / (first.active + second.active - shared),
    )  # fmt: skip
    squares = sum(float((c[0] - c[1]).square().sum()) for c in changes.values())
    assert distance(first, second, model) == pytest.approx(squares**0.5, rel=1e-5)
    assert distance(first, first, model) == 0
    both = intersect(first, second, model=model)
    assert both.active == shared
    assert overlap(both, first).first == overlap(both, second).first == 0
    empty = Delta({}, base=fingerprint({}))
    assert overlap(empty, empty).jaccard == 1
    assert intersect(first, empty, model=model).active == 0


def test_one_delta_takes_the_other_s_place_or_nothing_happens():
    model = network()
    head = {"1.bias": torch.arange(4.0)}
    first = delta_of(model[0], 0.5, 1)
    first = Delta({f"0.{n}": p for n, p in first.sparse.items()}, head, base="0" * 64)
    first = replace(first, base=fingerprint(_read(first, model)))
    second = delta_of(model, 0.5, 2)
    before = weights(model)
    undo = first.apply(model)
    now = weights(model)
    undo = second.apply(model, instead_of=undo)
    assert all(torch.equal(now_, before_) for now_, before_ in zip(
        weights(model).values(), weights(network(), second).values(), strict=True))  # fmt: skip
    undo = first.apply(model, instead_of=undo)
    assert all(torch.equal(now[n], w) for n, w in weights(model).items())
    with pytest.raises(UnmaskError, match="wrong base"):
        replace(second, base="0" * 64).apply(model, instead_of=undo)
    assert all(torch.equal(now[n], w) for n, w in weights(model).items())
    undo.apply(model)
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())


def _read(delta: Delta, model: nn.Module) -> dict[str, Sparse]:
    held = dict(model.named_parameters())
    return {
        n: Sparse(p.shape, p.indices, held[n].detach().view(-1)[p.indices])
        for n, p in delta.sparse.items()
    }


def test_of_whole_tensors_the_last_stays():
    model = network()
    first, second = (
        delta_of(model[0], 0.5, seed, full={"1.bias": torch.full((4,), float(seed))})
        for seed in (1, 2)
    )
    shared = {"base_model_name_or_path": "there", "head": {"class": "A"}, "budget": 1}
    first = replace(first, info=shared)
    second = replace(second, info=shared | {"budget": 2})
    with pytest.warns(UnmaskWarning, match=r"'1.bias' is stored whole in several"):
        composed = compose([first, second], model[0])
    assert composed.full["1.bias"].tolist() == [2] * 4
    assert composed.info["base_model_name_or_path"] == "there"
    assert composed.info["head"] == {"class": "A"}
    assert "budget" not in composed.info
    assert [one["budget"] for one in composed.info["composed"]] == [1, 2]
    sparse = delta_of(model[0], 1.0, 3)
    with pytest.raises(UnmaskError, match="stored whole in one"):
        compose(
            [sparse, replace(first, full={"bias": torch.ones(5)}, sparse={}, base=fingerprint({}))],
            model[0],
        )


def test_what_makes_no_sense_is_refused(tmp_path: Path):
    model = network()
    delta = delta_of(model, 0.5, 1)
    for arguments, message in (
        ({"deltas": []}, "no delta"),
        ({"weights": [1, 2]}, "as many"),
        ({"weights": [float("nan")]}, "finite"),
        ({"weights": ["a"]}, "finite"),
        ({"weights": [None]}, "finite"),
        ({"deltas": [1]}, "1 is no delta"),
        ({"deltas": delta}, "a list of deltas"),
        ({"conflicts": "mean"}, "sum, last, ties"),
        ({"keep": 0.5}, "for conflicts='ties'"),
        ({"keep": 0, "conflicts": "ties"}, "share"),
        ({"deltas": [replace(delta, base="0" * 64)]}, "wrong base"),
    ):
        with pytest.raises(UnmaskError, match=message):
            compose(**({"deltas": [delta], "model": model} | arguments))
    for wrong in (
        lambda: overlap(delta, "x"),
        lambda: distance(delta, None, model),
        lambda: subtract(delta, 3, model),
        lambda: intersect(delta, "x", model=model),
    ):
        with pytest.raises(UnmaskError, match="is no delta"):
            wrong()
    other = Delta({"0.weight": Sparse((1, 30), torch.tensor([0]), torch.ones(1))}, base="0" * 64)
    with pytest.raises(UnmaskError, match="different bases"):
        overlap(delta, other)


# On disk and on the command line


def folders(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A tiny BERT on disk and two deltas of it that name it as theirs."""
    transformers = pytest.importorskip("transformers")
    base = write_model(tmp_path / "base")
    made = []
    for seed in (1, 2):
        encoder = transformers.BertModel.from_pretrained(base)
        delta = delta_of(encoder, 0.1, seed, info={"base_model_name_or_path": str(base)})
        made.append(delta.save(tmp_path / f"delta{seed}"))
    return base, made


def test_folders_compose_on_the_command_line(tmp_path: Path):
    base, made = folders(tmp_path)
    run = CliRunner()
    asked = ["compose", *map(str, made), "--out", str(tmp_path / "both"), "--weights", "1,0.5"]
    done = run.invoke(cli.app, asked)
    assert done.exit_code == 0, done.output
    encoder = transformers_model(base)
    wanted = compose([Delta.load(path) for path in made], encoder, weights=[1, 0.5])
    assert Delta.load(tmp_path / "both") == wanted
    assert wanted.info["base_model_name_or_path"] == str(base)
    assert f"{wanted.active:,} scalars" in done.output
    for more, message in (
        ([], "isn't empty"),
        (["--out", str(tmp_path / "x"), "--weights", "a"], "1,-0.5"),
        (["--out", str(tmp_path / "x"), "--weights", "1"], "finite weights"),
        (["--out", str(tmp_path / "x"), "--conflicts", "mean"], "sum, last, ties"),
        (["--out", str(tmp_path / "x"), "--model", str(tmp_path / "none")], "no folder"),
    ):
        done = run.invoke(cli.app, asked + more)
        assert done.exit_code == 2, (message, done.output)
        assert message in done.output.replace("\n", " ")
    assert not (tmp_path / "x").exists()


def test_deltas_that_name_no_base_or_different_ones_need_a_model(tmp_path: Path):
    base, made = folders(tmp_path)
    nameless = replace(Delta.load(made[0]), info={}).save(tmp_path / "nameless")
    other = {"base_model_name_or_path": "elsewhere"}
    moved = replace(Delta.load(made[0]), info=other).save(tmp_path / "moved")
    for path, message in ((nameless, "doesn't say"), (moved, "'elsewhere'")):
        with pytest.raises(UnmaskError, match=message):
            compose_folders([made[1], path], tmp_path / "out")
        compose_folders([made[1], path], tmp_path / path.name / "out", model=str(base))


def transformers_model(base: Path) -> nn.Module:
    import transformers

    return transformers.BertModel.from_pretrained(base)


def test_a_distance_finer_than_the_base_can_tell():
    """Between weights far smaller than the base's, whose sum with it would round them off."""
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    at, one = torch.tensor([0]), model.weight.detach().view(-1)[:1]
    base = fingerprint({"weight": Sparse((1, 2), at, one)})
    first, second = (
        Delta({"weight": Sparse((1, 2), at, one * f)}, base=base) for f in (2e-3, 1e-3)
    )
    expected = float(first.sparse["weight"].values - second.sparse["weight"].values)
    assert (
        distance(first, second, model) == pytest.approx(expected) == distance(second, first, model)
    )


def test_a_share_to_keep_is_not_cut_by_a_last_digit():
    model = nn.Linear(100, 1, bias=False)
    at = torch.arange(100)
    delta = Delta(
        {"weight": Sparse((1, 100), at, model.weight.detach().view(-1) + 1.0 + at)},
        base=fingerprint({"weight": Sparse((1, 100), at, model.weight.detach().view(-1))}),
    )  # 0.29 · 100 is 28.999999999999996 in floats
    assert compose([delta], model, conflicts="ties", keep=0.29).active == 29
