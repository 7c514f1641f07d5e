"""Whole runs as a Python function, on a tiny model: what they leave, and how they go on."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tiny
import unmask
from unmask import Delta, UnmaskError
from unmask.integrations.transformers import training_loss
from unmask.recipes import RunConfig, choose, evaluate, models, parse, saved, train
from unmask.recipes.folder import RunFolder, whole_folder
from unmask.recipes.trainer import LengthGrouped, Recorder, random_state_kept

pytestmark = pytest.mark.filterwarnings("default")  # of the libraries beneath a Trainer

PROMISED = {
    "task", "model", "method", "budget", "active", "trainable", "metric", "before", "value", "best",
    "steps", "updates", "seed", "lr", "train_seconds", "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {**tiny.asked(tmp_path_factory.mktemp("given")), "budget": 500}


def files(delta: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in delta.iterdir()}


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="session")
def finished(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything on: levels, measurements on the way, checkpoints."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    settings = {"eval_strategy": "steps", "eval_steps": "5", "save_steps": "4"}
    train(RunConfig(**given, save_at=(0.1, 0.5, 1.0), settings=settings, out=str(out)))
    return out


def test_a_run_learns_and_leaves_what_it_promised(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics.keys() >= PROMISED
    assert metrics["metric"] == "matthews"
    assert metrics["value"] > metrics["before"] + 0.2
    assert metrics["best"] >= metrics["value"]
    assert metrics["active"] == metrics["budget"] == 500
    assert metrics["trainable"] == 500 + 2 * 16 + 2
    assert metrics["updates"] == sum(500 * t // 20 for t in range(1, 21))
    for key in ("loss", "eval_matthews"):
        assert [entry["step"] for entry in metrics["history"] if key in entry] == [5, 10, 15, 20]
    assert not [part.name for part in finished.rglob(".*")], "no temporary file stays"


def test_a_delta_of_a_run_knows_its_model(finished: Path) -> None:
    delta = Delta.load(finished / "delta")
    assert delta.active == 500
    assert set(delta.full) == {"classifier.weight", "classifier.bias"}
    assert delta.info["head"]["class"] == "BertForSequenceClassification"


def test_evaluate_measures_the_same_from_base_and_delta(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert evaluate(finished)["value"] == metrics["value"]


def test_the_series_holds_each_level_with_its_metric(finished: Path) -> None:
    series = json.loads((finished / "metrics.json").read_text())["series"]
    assert [(e["share"], e["step"], e["active"]) for e in series] == [
        (0.1, 2, 50), (0.5, 10, 250), (1.0, 20, 500),
    ]  # fmt: skip
    for entry in series:
        delta = Delta.load(finished / "series" / f"{100 * entry['share']:g}")
        assert delta.active == entry["active"]
    whole = Delta.load(finished / "series" / "100")
    assert whole == Delta.load(finished / "delta")


def test_a_run_is_the_same_twice_and_measuring_leaves_no_trace(
    finished: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    train(RunConfig(**given, out=str(tmp_path / "again")))
    assert files(tmp_path / "again" / "delta") == files(finished / "delta")


def test_checkpoints_hold_no_model_and_rotate(finished: Path) -> None:
    checkpoints = RunFolder(finished).checkpoints()
    assert [c.name for c in checkpoints] == ["checkpoint-16", "checkpoint-20"]
    size = sum(f.stat().st_size for f in checkpoints[0].iterdir())
    assert size < 60 * 500 + 40_000
    assert (checkpoints[0] / "adapter_config.json").is_file()


@pytest.mark.parametrize("stop", [3, 7, 10, 19])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    stop: int, finished: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": "5", "save_steps": "5"}
    asked = RunConfig(
        **given, save_at=(0.1, 0.5, 1.0), settings=settings, out=str(tmp_path / "run")
    )
    with tiny.interrupted(stop):
        train(asked)
    assert not (tmp_path / "run" / "metrics.json").exists()
    with pytest.raises(UnmaskError, match="holds an unfinished run; --resume continues it"):
        train(asked)
    metrics = train(asked, resume=True)
    assert files(tmp_path / "run" / "delta") == files(finished / "delta")
    whole = json.loads((finished / "metrics.json").read_text())
    assert metrics["series"] == whole["series"]
    assert metrics["before"] == whole["before"]
    assert train(asked, resume=True) == metrics, "a finished run is only read"


def test_a_killed_process_leaves_whole_checkpoints_to_go_on_from(
    given: dict[str, Any], tmp_path: Path
) -> None:
    asked = RunConfig(
        **given | {"epochs": 10}, settings={"save_steps": "3"}, out=str(tmp_path / "a")
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = (
        "import json, sys; from unmask.recipes import RunConfig, train;"
        "train(RunConfig(**json.loads(sys.argv[1]), out=sys.argv[2]))"
    )
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(asked.to_dict()), str(killed)], env=environment
    )
    try:
        deadline = time.monotonic() + 300  # importing transformers on a busy machine
        while not (killed / "checkpoint-6").exists() and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "metrics.json").exists()
    for checkpoint in RunFolder(killed).checkpoints():
        Delta.load(checkpoint)
        torch.load(checkpoint / "optimizer.pt", weights_only=True)
        assert (checkpoint / "progress.json").is_file()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(asked)
        train(saved(killed), resume=True)
    finally:
        torch.set_num_threads(threads)
    assert files(killed / "delta") == files(tmp_path / "a" / "delta")


def test_resume_without_a_run_starts_one_and_refuses_another(
    given: dict[str, Any], tmp_path: Path
) -> None:
    asked = RunConfig(**given | {"epochs": 1}, out=str(tmp_path / "run"))
    assert train(asked, resume=True)["steps"] == 10
    with pytest.raises(UnmaskError, match=r"was given lr=0\.5 \(it has 0\.05\)"):
        train(replace(asked, lr=0.5), resume=True)


def test_overwrite_replaces_runs_only(given: dict[str, Any], tmp_path: Path) -> None:
    asked = RunConfig(**given | {"epochs": 1}, out=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    train(asked)
    with pytest.raises(UnmaskError, match="holds a finished run"):
        train(asked)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "series").mkdir()
    assert train(asked, overwrite=True)["steps"] == 10
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "series").exists()
    precious = tmp_path / "mine" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(UnmaskError, match="holds no run, so it is left alone"):
        train(replace(asked, out=str(precious.parent)), overwrite=True)
    assert precious.read_text() == "years of work"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": "0"}, "steps=0; give the number"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr.*--set lr_scheduler_type"),
        ({"gradient_accumulation_steps": "0"}, "--set gradient_accumulation_steps=0"),
        ({"per_device_eval_batch_size": "0"}, "--set per_device_eval_batch_size=0"),
        ({"eval_accumulation_steps": "0"}, "--set eval_accumulation_steps=0"),
        ({"dataloader_num_workers": "-1"}, "num_workers option should be non-negative"),
        ({"report_to": "nobody"}, "nobody is not supported"),
        ({"optim": "adamw_torch", "optim_args": "x"}, "--set optim_args=x"),
        ({"metric_for_best_model": "foo"}, "foo: task 'train' is measured by matthews and loss"),
        ({"load_best_model_at_end": "true"}, "save and eval strategy to match"),
    ],
)
def test_a_start_that_fails_loses_nothing(
    settings: dict[str, Any], message: str, finished: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = contents(tmp_path / "run")
    for out in (tmp_path / "run", tmp_path / "new"):
        with pytest.raises(UnmaskError, match=message) as told:
            train(RunConfig(**given, settings=settings, out=str(out)), overwrite=True)
        assert "\n" not in str(told.value)
    assert contents(tmp_path / "run") == before
    assert not (tmp_path / "new").exists()


def test_only_what_fails_before_the_first_step_is_laid_to_settings(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Recorder, "on_step_end", fail)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        train(RunConfig(**given, settings={"max_steps": "2"}, out=str(tmp_path / "a")))
    assert (tmp_path / "a" / "config.json").is_file()
    monkeypatch.setattr(Recorder, "on_train_begin", fail)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        train(RunConfig(**given, out=str(tmp_path / "b")))
    assert not (tmp_path / "b").exists()


def test_the_head_alone_changes_no_pretrained_weight(given: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    metrics = train(RunConfig(**given | {"method": "head", "budget": None}, out=str(out)))
    delta = Delta.load(out / "delta")
    assert delta.active == metrics["active"] == metrics["budget"] == metrics["updates"] == 0
    assert metrics["trainable"] == 34
    assert evaluate(out)["value"] == metrics["value"]


@pytest.mark.parametrize("method", ["full", "bitfit", "repeat_d3", "pafi"])
def test_other_methods_run_and_evaluate(method: str, given: dict[str, Any], tmp_path: Path) -> None:
    budget = None if method in ("full", "bitfit") else 300
    asked = given | {"method": method, "budget": budget, "epochs": 1}
    metrics = train(RunConfig(**asked, out=str(tmp_path / "run")))
    assert evaluate(tmp_path / "run")["value"] == metrics["value"]
    with pytest.raises(UnmaskError, match="--save-at keeps deltas while the budget fills up"):
        train(RunConfig(**asked, save_at=(0.5,), out=str(tmp_path / "levels")))
    assert not (tmp_path / "levels").exists()


@pytest.mark.parametrize(
    "settings",
    [{"bf16": "true"}, {"optim": "sgd"}, {"warmup_ratio": "0.1", "max_grad_norm": "0.5"}],
)
def test_training_arguments_do_what_they_say(
    settings: dict[str, Any], given: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    metrics = train(RunConfig(**given, settings=settings, out=str(tmp_path / "run")))
    assert evaluate(tmp_path / "run")["value"] == metrics["value"]
    assert files(tmp_path / "run" / "delta") != files(finished / "delta")


def test_regression_on_pairs_from_a_data_folder(given: dict[str, Any], tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("validation", 1)):
        made = [
            {"sentence1": row["text"], "sentence2": "good", "label": 5.0 * (row["label"] == "pos")}
            for row in tiny.rows(64, seed)
        ]
        (tmp_path / "stsb").mkdir(exist_ok=True)
        tiny.write_rows(tmp_path / "stsb" / f"{split}.jsonl", made)
    asked = RunConfig(
        task="stsb", data_dir=str(tmp_path), model=given["model"], budget="10%", lr=0.01, epochs=4,
        settings={"gradient_accumulation_steps": "2"}, out=str(tmp_path / "run"),
    )  # fmt: skip
    metrics = train(asked)
    assert metrics["metric"] == "pearson_spearman"
    assert metrics["steps"] == 8
    assert evaluate(tmp_path / "run")["value"] == metrics["value"]


def test_the_best_checkpoint_can_be_the_result(given: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        "load_best_model_at_end": "true", "eval_strategy": "steps", "eval_steps": "4",
        "save_steps": "4", "save_total_limit": "1",
    }  # fmt: skip
    metrics = train(RunConfig(**given, settings=settings, out=str(tmp_path / "run")))
    assert metrics["value"] == metrics["best"]
    assert evaluate(tmp_path / "run")["value"] == metrics["value"]


def test_a_tokenizer_without_padding_pads_with_its_end_and_says_so(
    given: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(given["model"])
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    transformers.AutoModel.from_pretrained(given["model"]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.warns(unmask.UnmaskWarning, match="no padding token; using '\\[SEP\\]'"):
        train(RunConfig(**given | {"model": str(tmp_path), "epochs": 1}, out=str(tmp_path / "run")))


def test_merge_gives_the_model_that_was_trained(
    finished: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    delta = Delta.load(finished / "delta")
    models.merge(given["model"], delta, tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    named = dict(merged.named_parameters())
    for name, part in delta.sparse.items():
        assert torch.equal(named[name].detach().view(-1)[part.indices], part.values)
    assert torch.equal(named["classifier.weight"], delta.full["classifier.weight"])
    assert merged.config.id2label == {0: "neg", 1: "pos"}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "[PAD]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"method": "id4"},
            r"no method is called 'id4' \(did you mean 'id3'\?\); there are .*pafi",
        ),
        ({"budget": 10**9}, r"budget=1,000,000,000 exceeds the [\d,]+ scalars"),
        ({"budget": 0}, "budget=0"),
        ({"budget": "lots"}, "budget='lots'"),
        ({"model": "/no/such/folder"}, "no folder '/no/such/folder'"),
        ({"text": ("body",)}, r"no column 'body'; it has 'text', 'label'"),
        ({"lr": 0.0}, "lr=0.0; it must be above 0"),
        ({"lr": math.inf}, "lr=inf; it must be above 0, and finite"),
        ({"epochs": math.inf}, "epochs=inf"),
        ({"seed": 2**32}, "seed=4294967296; a seed is from 0 to 4294967295"),
        ({"max_length": 2}, "max_length=2 leaves no room for text beside the 2 marks"),
        ({"settings": {"deepspeed": "x.json"}}, "deepspeed isn't possible here"),
        ({"settings": {"label_names": '["foo"]'}}, "label_names isn't possible here"),
        ({"task": "rte"}, "both --task and --train-file"),
        ({"save_at": (2.0,)}, "save_at=2"),
        ({"settings": {"nonsense": "1"}}, "--set nonsense: no such key; .*TrainingArguments"),
        ({"settings": {"max_step": "1"}}, "did you mean max_steps"),
        ({"settings": {"max_steps": "ten"}}, "--set max_steps='ten': max_steps must be int"),
        ({"settings": {"bf16": "perhaps"}}, "bf16 must be bool"),
        ({"settings": {"output_dir": "x", "push_to_hub": "1"}}, "push_to_hub isn't possible here"),
        ({"settings": {"lr_scheduler_type": "wavy"}}, "settings don't fit together.*wavy"),
        ({"settings": {"optim": "adafactor"}}, "(?i)adafactor"),
        ({"settings": {"heuristic.epx": "1"}}, r"D3 has no 'epx'; there are heuristic\.exp"),
        ({"settings": {"heuristic.eps": "-1"}}, "eps=-1"),
        ({"settings": {"schedule.every": "x"}}, r"schedule\.every must be int"),
        ({"settings": {"schedule": "weekly"}}, "schedule=weekly: there are .*Strided.*Uniform"),
    ],
)
def test_a_mistake_is_told_and_leaves_no_folder(
    change: dict[str, Any], message: str, given: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(UnmaskError, match=message):
        train(RunConfig(**{**given, "out": str(out), **change}))
    assert not out.exists()


def test_settings_reach_method_and_trainer() -> None:
    built = choose.method("id3", 10, {"heuristic.exp": "0.5", "schedule.every": 4, "max_steps": 1})
    assert built == unmask.id3(10, exp=0.5, schedule=unmask.Strided(every=4))
    assert choose.method("id3", 10, {"heuristic": "Magnitude"}).heuristic == unmask.Magnitude()
    asked = RunConfig(settings={"learning_rate": "1e-4", "seed": "3", "warmup_ratio": "0.1"})
    assert (asked.lr, asked.seed) == (1e-4, 3)
    assert transformers.TrainingArguments(**asked.training({})).get_warmup_steps(100) == 10


PLATEAU = {
    "schedule": "Plateau", "schedule.parts": "4", "schedule.patience": "1",
    "schedule.tolerance": "1e9",  # no loss is low enough: every second report ends a share
}  # fmt: skip


def test_a_schedule_hears_the_losses_of_a_run(given: dict[str, Any], tmp_path: Path) -> None:
    settings = PLATEAU | {"logging_steps": "1"}
    metrics = train(RunConfig(**given, settings=settings, out=str(tmp_path / "run")))
    active = [entry["active"] for entry in metrics["history"] if "loss" in entry]
    assert active == [125, 125, 250, 250, 375, 375, *[500] * 14]


def test_reports_survive_an_interruption_between_logs(
    given: dict[str, Any], tmp_path: Path
) -> None:
    settings = PLATEAU | {"logging_steps": "3", "save_steps": "4", "schedule.tolerance": "0.1"}
    whole = RunConfig(**given, settings=settings, out=str(tmp_path / "whole"))
    history = train(whole)["history"]
    cut = replace(whole, out=str(tmp_path / "cut"))
    with tiny.interrupted(5):
        train(cut)
    assert train(cut, resume=True)["history"] == history  # its losses are what was reported
    assert files(tmp_path / "cut" / "delta") == files(tmp_path / "whole" / "delta")


@pytest.mark.parametrize(
    ("logs", "loss"),
    [({"loss": 0.5}, 0.5), ({"loss": "0.25"}, 0.25), ({"eval_loss": 1.0}, None),
     ({"loss": "n/a"}, None), (None, None)],
)  # fmt: skip
def test_a_logged_loss_may_be_written_out(logs: dict[str, Any] | None, loss: float | None) -> None:
    assert training_loss(logs) == loss


def test_a_config_survives_json() -> None:
    asked = RunConfig(method="full", settings={"max_steps": "3"}, save_at=(0.5,))
    assert (asked.task, asked.budget, asked.lr) == ("sms_spam", 1.0, 5e-5)
    assert RunConfig.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked
    with pytest.raises(UnmaskError, match="has colour"):
        RunConfig.from_dict({"colour": "red"})


@pytest.mark.parametrize("field", fields(RunConfig), ids=lambda field: field.name)
def test_a_config_of_the_wrong_types_is_refused(field: Any) -> None:
    for value in ([[1]], {"a": 1} if field.name != "settings" else 1, [None], True):
        with pytest.raises(UnmaskError, match=rf"the config has {field.name}=.*, which can't be"):
            RunConfig.from_dict({field.name: value})


@pytest.mark.parametrize(
    ("text", "budget"),
    [("38000", 38_000), ("38_000", 38_000), ("38,000", 38_000), ("320K", 320_000), ("0.1%", 0.001),
     ("0.5", 0.5), ("1", 1), ("1.0", 1.0), ("1.5M", 1_500_000)],
)  # fmt: skip
def test_budgets_are_read_as_written(text: str, budget: float) -> None:
    parsed = parse.parse_budget(text)
    assert parsed == budget
    assert type(parsed) is type(budget)


def test_every_method_is_in_the_catalogue() -> None:
    entries = {entry.name: entry for entry in choose.catalogue()}
    assert entries.keys() == {*unmask.methods.__all__, "head"}
    assert "2408.14470" in entries["id3"].source
    assert all(entry.formula and entry.memory for entry in entries.values())


def test_length_grouped_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = [i * 37 % 101 for i in range(103)]
    order = LengthGrouped(lengths, 8, seed=0)
    first = list(order)
    assert sorted(first) == list(range(103))
    assert first == list(LengthGrouped(lengths, 8, seed=0))
    order.set_epoch(1)
    assert first != list(order) != list(LengthGrouped(lengths, 8, seed=1))
    spreads = [
        max(batch) - min(batch)
        for i in range(0, 96, 8)
        for batch in [[lengths[row] for row in first[i : i + 8]]]
    ]
    assert sum(spreads) / len(spreads) < 20


def test_measuring_draws_nothing_from_the_run() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with random_state_kept():
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)


def test_measuring_that_fails_draws_nothing_either() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(KeyboardInterrupt), random_state_kept():
        random.random()
        np.random.rand()
        torch.rand(1)
        raise KeyboardInterrupt
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == states


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with whole_folder(tmp_path / "x") as staging:
            (staging / "a").write_text("a")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):
        with whole_folder(tmp_path / "x") as staging:
            (staging / "a").write_text(text)
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["two"]
