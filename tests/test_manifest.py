"""A run goes on from its last whole checkpoint, and says which ones aren't."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from unmask import UnmaskError, UnmaskWarning
from unmask.recipes import RunConfig, saved, train
from unmask.recipes.folder import RunFolder
from unmask.recipes.manifest import flaw

pytestmark = pytest.mark.filterwarnings("default")  # of the libraries beneath a Trainer

PARTS = (
    "adapter_config.json", "adapter_model.safetensors", "manifest.json", "model.safetensors",
    "optimizer.pt", "progress.json", "rng_state.pth", "scheduler.pt", "trainer_state.json",
)  # fmt: skip


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    home = tmp_path_factory.mktemp("whole")
    settings = {"save_steps": "4", "save_total_limit": "2"}
    return RunConfig(
        **tiny.asked(home) | {"epochs": 1}, budget=100, settings=settings, out=str(home / "run")
    )


@pytest.fixture(scope="session")
def stopped(asked: RunConfig) -> Path:
    with tiny.interrupted(9):
        train(asked)
    return Path(str(asked.out))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_checkpoint_is_sealed(stopped: Path) -> None:
    folder = RunFolder(stopped)
    assert [c.name for c in folder.checkpoints()] == ["checkpoint-4", "checkpoint-8"]
    assert sorted(file.name for file in (stopped / "checkpoint-8").iterdir()) == [*PARTS]
    assert folder.last_checkpoint() == stopped / "checkpoint-8"


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("harm", [Path.unlink, cut, flip, Path.touch])
def test_a_harmed_checkpoint_is_passed_over(
    name: str, harm: Callable[[Path], None], stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    harm(tmp_path / "run" / "checkpoint-8" / name)
    if harm is Path.touch:  # a new date is no harm
        assert flaw(tmp_path / "run" / "checkpoint-8") is None
        return
    # Of a manifest with one bit wrong, any file may seem to be the harmed one.
    part = "" if name == "manifest.json" else name
    said = rf"checkpoint-8 isn't whole \({part}.*; going on from checkpoint-4"
    with pytest.warns(UnmaskWarning, match=said):
        assert RunFolder(tmp_path / "run").last_checkpoint() == tmp_path / "run" / "checkpoint-4"


def test_a_run_goes_on_from_the_next_older_to_the_same_bits(
    asked: RunConfig, stopped: Path, tmp_path: Path
) -> None:
    for name in ("run", "whole"):
        shutil.copytree(stopped, tmp_path / name)
    (tmp_path / "run" / "checkpoint-8" / "optimizer.pt").unlink()
    (tmp_path / "run" / "checkpoint-9").mkdir()
    said = r"checkpoint-9 isn't whole .*, checkpoint-8 isn't whole .*; going on from checkpoint-4"
    with pytest.warns(UnmaskWarning, match=said):
        train(saved(tmp_path / "run"), resume=True)
    train(saved(tmp_path / "whole"), resume=True)
    weights = [tmp_path / name / "delta/adapter_model.safetensors" for name in ("run", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    names = [c.name for c in RunFolder(tmp_path / "run").checkpoints()]
    assert names == ["checkpoint-8", "checkpoint-10"], "what was harmed is gone"


def test_without_a_whole_checkpoint_a_run_says_so(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    for number in (4, 8):
        (tmp_path / "run" / f"checkpoint-{number}" / "progress.json").write_text("{}")
    with pytest.raises(UnmaskError, match=r"no whole checkpoint.*progress\.json is damaged.*anew"):
        train(saved(tmp_path / "run"), resume=True)
