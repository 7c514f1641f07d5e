"""`--peft`: runs that choose from other methods' modules, and everything that reads such a run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from unmask import Delta, UnmaskError
from unmask.integrations import adapters
from unmask.recipes import RunConfig, evaluate, models, train, wrappers
from unmask.recipes.combine import compose_folders
from unmask.recipes.trainer import Ranks

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("default")  # of the libraries beneath a Trainer

HEAD = {"classifier.weight", "classifier.bias"}
KINDS = {
    "lora": "lora:r=4,alpha=8,target=all-linear,dropout=0.1",
    "dora": "lora:r=2,target=query,value,dora=true",
    "adalora": "adalora:r=4,target_r=2",
    "ia3": "ia3",
    "pfeiffer": "pfeiffer:reduction=4",
    "houlsby": "houlsby:reduction=4,std=0.1",
}


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("wrapped")
    return {**tiny.asked(home), "budget": 100, "settings": {"save_steps": "5"}}


@pytest.fixture(scope="session")
def runs(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished run of a kind."""
    home, done = tmp_path_factory.mktemp("runs"), {}

    def run(kind: str) -> Path:
        if kind not in done:
            train(RunConfig(**given, peft=KINDS[kind], out=str(home / kind)))
            done[kind] = home / kind
        return done[kind]

    return run


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(4, 28).reshape(3, 8)).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_chooses_from_the_modules_alone(
    kind: str, runs: Callable[[str], Path], given: dict[str, Any]
) -> None:
    metrics = json.loads((runs(kind) / "metrics.json").read_text())
    assert (metrics["peft"], metrics["active"], metrics["head"]) == (KINDS[kind], 100, 34)
    delta = Delta.load(runs(kind) / "delta")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(given["model"])
    assert set(delta.full) >= HEAD
    assert not (set(delta.sparse) | set(delta.full)) & (set(weights(base)) - HEAD)
    assert evaluate(runs(kind))["value"] == metrics["value"]
    assert metrics["steps"] == 20


@pytest.mark.parametrize("kind", ["lora", "adalora", "houlsby"])
@pytest.mark.parametrize("stop", [7, 12])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    kind: str, stop: int, given: dict[str, Any], tmp_path: Path
) -> None:
    long_memory = "adalora:r=4,target_r=1,beta1=0.99,beta2=0.99"
    peft = long_memory if kind == "adalora" else KINDS[kind]
    whole = RunConfig(**given | {"budget": 0.5}, peft=peft, out=str(tmp_path / "whole"))
    train(whole)
    cut = replace(whole, out=str(tmp_path / "cut"))
    with tiny.interrupted(stop):
        train(cut)
    train(cut, resume=True)
    assert Delta.load(tmp_path / "cut" / "delta") == Delta.load(tmp_path / "whole" / "delta")
    with pytest.raises(UnmaskError, match="was given peft='ia3'"):
        train(replace(cut, peft="ia3"), resume=True)


def test_adalora_has_the_loss_that_peft_gives_it(given: dict[str, Any]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(given["model"]).eval()
    batch = {"input_ids": torch.arange(4, 28).reshape(3, 8), "labels": torch.tensor([0, 1, 0])}
    plain = model(**batch).loss
    tuner = wrappers.wrap(KINDS["adalora"], model, steps=8)
    assert model(**batch).loss == tuner(**batch).loss > plain  # PEFT calls forward without hooks


def test_adalora_prunes_to_its_final_ranks(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []

    def on_train_end(self: Ranks, *_: Any, **__: Any) -> None:
        values = [p for n, p in self.tuner.model.named_parameters() if ".lora_E." in n]
        left.append(sum(int(p.count_nonzero()) for p in values))
        left.append(len(values))

    monkeypatch.setattr(Ranks, "on_train_end", on_train_end)
    asked = given | {"budget": 1.0}
    train(RunConfig(**asked, peft="adalora:init_r=4,target_r=1", out=str(tmp_path / "run")))
    nonzero, tensors = left
    assert 0 < nonzero <= tensors


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "ia3"])
def test_apply_merges_into_a_plain_model(
    kind: str, runs: Callable[[str], Path], given: dict[str, Any], tmp_path: Path
) -> None:
    delta = Delta.load(runs(kind) / "delta")
    wrapped = models.built(given["model"], delta)
    fresh = logits(wrapped)
    delta.apply(wrapped)
    models.merge(given["model"], delta, tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(given["model"])
    assert weights(merged).keys() == weights(plain).keys()
    torch.testing.assert_close(logits(merged), logits(wrapped), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), fresh, atol=1e-2)


@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby"])
def test_apply_says_what_cannot_be_merged(
    kind: str, runs: Callable[[str], Path], given: dict[str, Any], tmp_path: Path
) -> None:
    delta = Delta.load(runs(kind) / "delta")
    with pytest.raises(UnmaskError, match=f"inside {kind} adapters, which have a nonlinearity"):
        models.merge(given["model"], delta, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    wrapped = models.built(given["model"], delta)
    delta.apply(wrapped)
    by_hand = transformers.AutoModelForSequenceClassification.from_pretrained(given["model"])
    adapters.add(by_hand, kind, reduction=4)  # type: ignore[arg-type]
    delta.apply(by_hand)
    assert torch.equal(logits(by_hand), logits(wrapped))


def test_deltas_in_the_same_modules_compose(runs: Callable[[str], Path], tmp_path: Path) -> None:
    delta = runs("lora") / "delta"
    composed = compose_folders([delta, delta], tmp_path / "both", conflicts="last")
    assert composed.info["peft"] == KINDS["lora"]
    assert composed.sparse.keys() == Delta.load(delta).sparse.keys()


@pytest.mark.parametrize("spared", ["key,value", ".*[.](key|value)"])
def test_the_head_and_what_is_spared_stay_as_they_are(spared: str, given: dict[str, Any]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(given["model"])
    wrappers.wrap(f"lora:target=all-linear,exclude={spared}", model, steps=1)
    names = {name for name in weights(model) if ".lora_" in name}
    assert any(".query." in name for name in names)
    assert not any(".key." in name or ".value." in name or "classifier" in name for name in names)
    assert set(weights(model)) >= HEAD


@pytest.mark.parametrize("method", ["pafi", "full"])
def test_adalora_with_methods_of_every_kind(
    method: str, given: dict[str, Any], tmp_path: Path
) -> None:
    asked = given | {"method": method, "epochs": 1, "budget": 1.0 if method == "full" else 40}
    metrics = train(RunConfig(**asked, peft=KINDS["adalora"], out=str(tmp_path / "run")))
    assert evaluate(tmp_path / "run")["value"] == metrics["value"]
    with pytest.raises(UnmaskError, match="AdaLoRA ranks by the gradients of all"):
        train(RunConfig(**asked, peft="adalora", include="*lora_E*", out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (
            "lorra:r=8",
            r"nothing is called 'lorra' \(did you mean 'lora'\?\); there are lora, ",
        ),
        ("lora:r", "'r' is no key=value; write as in lora:r=8"),
        ("lora:=8", "'=8' is no key=value"),
        ("lora:r=8,r=4", "r is given twice"),
        ("lora:r=x", "r must be int"),
        ("lora:r=0", "--peft lora:r=0: .*integer value"),
        ("lora:rank=8", "lora has no 'rank'.*there are r, target_modules"),
        ("lora:dropout=0.1,lora_dropout=0.2", "lora_dropout is given twice"),
        ("lora:modules_to_save=pooler", "lora has no 'modules_to_save'"),
        ("lora:target=nothing", "are called dense, key, query, value$"),
        ("lora:target=classifier", "are called dense, key, query, value$"),
        ("adalora:r=4", "init_r=4 is below target_r=8"),
        ("adalora:dora=true,init_r=12", "AdaLoRA|ADALORA"),
        ("ia3:r=8", "ia3 has no 'r'"),
        ("pfeiffer:reduction=0", "reduction=0"),
        ("houlsby:width=3", "houlsby has no 'width'.*there are after, reduction, std"),
        ("pfeiffer:after=nothing", "is known to end a sublayer"),
    ],
)
def test_a_mistake_is_told_and_leaves_no_folder(
    peft: str, message: str, given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UnmaskError, match=message):
        train(RunConfig(**given, peft=peft, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_head_alone_has_no_use_for_modules(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="--method head trains the new head alone"):
        train(RunConfig(**given | {"method": "head"}, peft="ia3", out=str(tmp_path / "run")))


def test_a_method_of_data_and_one_of_biases_run_inside(
    given: dict[str, Any], tmp_path: Path
) -> None:
    for method in ("fish", "bitfit"):
        asked = given | {"method": method, "budget": 40, "epochs": 1}
        out = tmp_path / method
        metrics = train(RunConfig(**asked, peft="pfeiffer:reduction=4", out=str(out)))
        assert metrics["active"] == 40
        assert evaluate(out)["value"] == metrics["value"]
