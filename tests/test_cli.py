"""The command line: what it prints, what it leaves, and how it says no."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

import tiny
import unmask
from unmask import Delta
from unmask.cli import app
from unmask.recipes import demo, hub
from unmask.recipes.session import Session
from unmask.recipes.trainer import Recorder

DEEP = "[" * 100_000
pytestmark = pytest.mark.filterwarnings("default")  # of the libraries beneath a Trainer


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one message of a command that fails by the user's mistake."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`rte` as in a --data-dir."""
    home = tmp_path_factory.mktemp("rows")
    (home / "rte").mkdir()
    for split, seed in (("train", 0), ("validation", 1)):
        made = [
            {"sentence1": r["text"], "sentence2": "good", "label": int(r["label"] == "pos")}
            for r in tiny.rows(40, seed)
        ]
        tiny.write_rows(home / "rte" / f"{split}.jsonl", made)
    return home


@pytest.fixture(scope="session")
def command(model: Path, rows: Path) -> Sequence[object]:
    return (
        "train", "--task", "rte", "--model", model, "--method", "id3", "--budget", 300,
        "--data-dir", rows, "--epochs", 2, "--lr", "1e-2", "--batch-size", 8, "--seed", 0,
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained(command: Sequence[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    result = run(*command, "--out", out, "--save-at", "50%,100%")
    assert result.exit_code == 0, result.output
    for said in ("accuracy before", "accuracy after", "300 of", "file size", str(out), "next"):
        assert said in result.output
    assert re.search(r"step 10/10 +loss \d\.\d+ +unmasked 300", result.output)
    assert result.stderr == ""
    return out


def test_a_run_leaves_config_metrics_delta_and_series(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert (metrics["task"], metrics["method"], metrics["budget"]) == ("rte", "id3", 300)
    assert json.loads((trained / "config.json").read_text())["budget"] == 300
    assert Delta.load(trained / "delta").active == 300
    assert {folder.name for folder in (trained / "series").iterdir()} == {"50", "100"}


def test_evaluate_prints_the_metric_again(trained: Path) -> None:
    value = json.loads((trained / "metrics.json").read_text())["value"]
    result = run("evaluate", trained)
    assert result.exit_code == 0
    assert result.stdout == f"rte validation: accuracy {value:.6f}\n"


def test_resume_of_a_finished_run_says_so(trained: Path, command: Sequence[object]) -> None:
    for asked in (["train"], [*command, "--save-at", "50%,100%"]):
        result = run(*asked, "--out", trained, "--resume")
        assert result.exit_code == 0, result.output
        assert "is finished" in result.output


def test_resume_refuses_to_become_another_run(trained: Path) -> None:
    assert "seed=7 (it has 0)" in refused("train", "--out", trained, "--seed", 7, "--resume")
    assert "--resume goes with --out" in refused("train", "--resume")


@pytest.mark.parametrize("part", ["", "delta"])
def test_inspect_shows_the_allotment(trained: Path, part: str) -> None:
    result = run("inspect", trained / part)
    assert result.exit_code == 0
    assert "300 scalars in" in result.stdout
    assert "classifier.weight" in result.stdout
    report = json.loads(run("inspect", trained / part, "--json").stdout)
    assert report["active"] == sum(row["changed"] for row in report["allotment"]) == 300
    assert report["info"]["task"] == "rte"
    assert len(report["base"]) == 64


def test_apply_writes_a_plain_model(trained: Path, model: Path, tmp_path: Path) -> None:
    result = run("apply", model, trained / "delta", "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    whole = Delta.load(trained / "delta").full
    assert torch.equal(merged.classifier.weight, whole["classifier.weight"])
    assert "isn't empty" in refused("apply", model, trained / "delta", "--out", tmp_path / "merged")


def test_a_delta_for_another_base_is_refused(trained: Path, tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", seed=1)
    message = refused("apply", other, trained / "delta", "--out", tmp_path / "merged")
    assert "wrong base" in message
    assert not (tmp_path / "merged").exists()


def test_a_flipped_bit_is_refused(trained: Path, tmp_path: Path) -> None:
    for file in (trained / "delta").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "damaged" in refused("inspect", tmp_path)


def test_resume_needs_a_run(command: Sequence[object], tmp_path: Path) -> None:
    message = refused("train", "--resume", "--out", tmp_path / "typo")
    assert "typo' holds none; check the name" in message
    assert not (tmp_path / "typo").exists()
    # A job that may be started again says --resume from the first time on.
    assert run(*command, "--resume", "--out", tmp_path / "run").exit_code == 0
    assert (tmp_path / "run" / "metrics.json").exists()


def test_a_stop_names_the_way_on_if_there_is_one(
    command: Sequence[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (*command, "--out", tmp_path / "run")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Session, "__init__", stop)
        result = run(*asked)
    assert result.exit_code == 130
    assert result.stderr == "stopped before the first step; nothing was written\n"
    monkeypatch.setattr(Recorder, "on_step_end", stop)
    result = run(*asked)
    assert result.stderr == f"stopped; to go on: unmask train --resume --out {tmp_path / 'run'}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", "{}", "isn't what a run wrote"),
        ("metrics.json", '{"active": "x", "parameters": 0}', "isn't what a run wrote"),
        pytest.param("metrics.json", DEEP, "metrics.json can't be read", id="deep metrics"),
        pytest.param("config.json", DEEP, "config.json can't be read", id="deep config"),
        ("config.json", '{"task": -1}', "the config has task=-1, which can't be"),
    ],
)
def test_a_damaged_run_is_told(
    name: str, content: str, message: str, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    assert message in refused("train", "--resume", "--out", tmp_path / "run")
    if name == "config.json":
        assert message in refused("evaluate", tmp_path / "run")


def test_an_existing_run_is_refused_unless_overwritten(
    command: Sequence[object], tmp_path: Path
) -> None:
    asked = (*command, "--set", "max_steps=2", "--out", tmp_path / "run")
    assert run(*asked).exit_code == 0
    assert "--resume continues it, --overwrite starts it anew" in refused(*asked)
    assert run(*asked, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "rtt"), "did you mean 'rte'?"),
        (("--method", "lora"), "no method is called 'lora'"),
        (("--budget", "10M"), "budget=10,000,000 exceeds"),
        (("--budget", "0"), "budget=0"),
        (("--budget", "-5"), "budget=-5"),
        (("--budget", "150%"), "budget=1.5"),
        (("--data-dir", "nowhere"), "has no nowhere"),
        (("--model", "./nowhere"), "no folder './nowhere'"),
        (("--set", "max_steps"), "write --set key=value"),
        (("--set", "maxsteps=1"), "did you mean max_steps"),
        (("--set", "max_steps=1", "--set", "max_steps=2"), "give one"),
        (("--set", "learning_rate=1"), "--lr and --set learning_rate are the same"),
        (("--set", "heuristic.epx=1"), "D3 has no 'epx'; there are heuristic.exp, heuristic.eps"),
        (("--set", "scope=PerRow"), "there are Bounded, Global, PerLayer, PerTensor, Units"),
        (("--peft", "prefix"), "there are lora, adalora, ia3, pfeiffer, houlsby"),
        (("--peft", "pfeiffer:r=8"), "there are after, reduction, std"),
        (("--save-at", "ten"), "10%,25%,50%,100%"),
        (("--include", "nothing*"), "include='nothing*' matches none"),
    ],
)
def test_mistakes_are_told(
    options: Sequence[str], message: str, command: Sequence[object], tmp_path: Path
) -> None:
    assert message in refused(*command, "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_mistakes_about_folders_are_told(
    command: Sequence[object], model: Path, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    within = tmp_path / "file" / "x"
    assert "Not a directory" in refused("apply", model, trained, "--out", within)
    assert "file' is no folder that can be written to" in refused(*command, "--out", within)
    assert "no run folder" in refused("evaluate", tmp_path)
    assert "no delta" in refused("inspect", tmp_path)
    for command in (("inspect",), ("evaluate",), ("train", "--model")):
        assert "name too long" in refused(*command, "a" * 300)


def test_a_hub_name_without_a_network_is_told_at_once(
    command: Sequence[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub.reachable.cache_clear()
    try:
        message = refused(*command, "--out", tmp_path / "run", "--model", "google-bert/nothing")
    finally:
        hub.reachable.cache_clear()
    assert "can't be reached; give --model a folder" in message


def test_without_a_name_a_run_gets_a_new_folder(
    command: Sequence[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run(*command, "--set", "max_steps=1").exit_code == 0
    assert {f.name for f in Path("runs").iterdir()} == {"rte-id3-seed0", "rte-id3-seed0-2"}


def test_methods_lists_each_with_its_source() -> None:
    result = run("methods")
    assert result.exit_code == 0
    for name in (*unmask.methods.__all__, "head"):
        assert name in result.stdout


def test_methods_lists_what_a_method_can_be_set_to() -> None:
    result = run("methods", "sft_ma")
    assert result.exit_code == 0
    for line in ("--set method.rate=0.2", "--set strategy.every=20", "--set scope.by=size"):
        assert f"{line}\n" in result.stdout
    assert "no method is called 'sft'" in refused("methods", "sft")


def test_a_run_inside_adapters(command: Sequence[object], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = (*command, "--budget", 50, "--peft", "pfeiffer:reduction=4", "--out", out)
    settings = ("--set", "scope.by=even", "--set", "heuristic.exp=0", "--set", "max_steps=3")
    result = run(*asked, *settings)
    assert result.exit_code == 0, result.output
    assert re.search(r"50 of [\d,]+ scalars \(.*\) inside pfeiffer:reduction=4", result.output)
    assert run("evaluate", out).exit_code == 0
    assert "with pfeiffer:reduction=4 in it" in run("inspect", out).stdout
    assert "is finished" in run(*asked, *settings, "--resume").stdout
    assert "can't be merged" in refused("apply", model, out, "--out", tmp_path / "merged")
    assert json.loads((out / "config.json").read_text())["peft"] == "pfeiffer:reduction=4"


@pytest.mark.parametrize("command", ["", "train", "evaluate", "inspect", "apply", "methods"])
def test_help_on_every_level(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version_and_usage_errors() -> None:
    assert run("--version").stdout == f"unmask {unmask.__version__}\n"
    assert run("trian").exit_code == 2
    assert run("train", "--epochs", "many").exit_code == 2


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unmask", "--version"], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.stdout == f"unmask {unmask.__version__}\n", done.stderr


def test_the_demo_runs_offline(tmp_path: Path) -> None:
    if any(find_spec(package[1]) is None for package in (demo.MODEL, demo.MESSAGES)):
        pytest.skip("the demo extra isn't installed")
    result = run("train", "--set", "max_steps=2", "--max-length", 8, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "38,000 of 22,713,986 scalars (0.17%)" in result.output
