"""A run is a function: train(config) -> metrics, evaluate(run folder) -> metrics."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from unmask import Delta, Increment, Method, UnmaskError
from unmask.recipes import choose, data, demo, models, presets, tasks
from unmask.recipes.config import OPTIONS, RunConfig
from unmask.recipes.data import Data
from unmask.recipes.folder import CONFIG, METRICS, RunFolder
from unmask.recipes.parse import parse_budget


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Fine-tune as asked, leave delta/, metrics.json and config.json in the run folder, and return
    the metrics.

    resume     go on from the folder's last whole checkpoint, to the very delta of an uninterrupted
               run; a finished run is only read, a missing one started
    overwrite  replace a run that lies in the folder, once the new one has taken a step
    console    where to draw progress (none: nowhere)
    """
    method = choose.method(config.method, parse_budget(config.budget), config.settings)
    _check_levels(config, method)
    if config.peft is not None and config.method == choose.HEAD:
        raise UnmaskError(
            f"--peft {config.peft} is there to be chosen from, but --method {choose.HEAD} trains "
            "the new head alone; leave one of them out"
        )
    config = placed(config)
    folder = RunFolder(Path(str(config.out)))
    goes_on = resume and folder.is_run
    if goes_on:
        _check_same(config, folder)
        if folder.finished:
            return folder.read(METRICS)
    else:
        folder.check_new(overwrite=overwrite)
    source = load_data(config)
    with calm():
        with _waiting(console, "loading the model"):
            from unmask.recipes.session import Session  # transformers takes seconds to import

            session = Session(config, folder, source)
            session.attach(method)
        if goes_on:
            folder.tidy()

        def claim() -> None:
            if not goes_on:
                folder.claim(config.to_dict(), overwrite=overwrite)

        last = folder.last_checkpoint() if goes_on else None
        with _waiting(console, "measuring before training"):
            session.begin(last, console, claim)
        session.train()
        with _waiting(console, "measuring after training"):
            metrics = session.report(session.keep(folder.delta))
        folder.write(METRICS, metrics)
        session.tuner.detach()
    return metrics


def evaluate(run: str | Path) -> dict[str, Any]:
    """The metric again, from the base model and the run's delta alone."""
    config, folder = saved(run), RunFolder(Path(run))
    if not folder.delta.is_dir():
        raise UnmaskError(
            f"{str(run)!r} has no delta/, so the run isn't finished; "
            f"`unmask train --resume --out {run}` goes on with it"
        )
    delta = Delta.load(folder.delta)
    source = load_data(config)
    with calm():
        from unmask.recipes.session import Session

        session = Session(config, folder, source)
        delta.apply(session.loaded.model)
        value, values = session.measure()
    task = session.task
    return {"task": task.name, "metric": task.metric, "value": value, "values": values}


def asked(given: Mapping[str, Any], *, resume: bool) -> RunConfig:
    """The config that the given fields make: new, or the resumed folder's varied by them."""
    for key, option in OPTIONS.items():
        if option in given and key in given.get("settings", ()):
            name = option.replace("_", "-")
            raise UnmaskError(f"--{name} and --set {key} are the same setting; give one of them")
    if resume and RunFolder(Path(given["out"])).is_run:
        return replace(saved(given["out"]), **given)
    if resume and not given.keys() - {"out", "settings"}:  # nothing says what to start instead
        raise UnmaskError(
            f"--resume continues the run in --out, but {given['out']!r} holds none; "
            "check the name, or say which run to start: --task, --model, ..."
        )
    return RunConfig(**given)


def begun(config: RunConfig) -> bool:
    """Whether the config's folder holds this very run, unfinished."""
    folder = RunFolder(Path(str(config.out)))
    try:
        same = saved(folder.path).to_dict() == config.to_dict()
    except UnmaskError:
        return False
    return same and not folder.finished


def finished(config: RunConfig) -> dict[str, Any] | None:
    """The metrics of the run in the config's folder, if that is at its end."""
    folder = RunFolder(Path(str(config.out)))
    if not (folder.is_run and folder.finished):
        return None
    _check_same(config, folder)
    return folder.read(METRICS)


def placed(config: RunConfig) -> RunConfig:
    """The config with a folder: the one named, or a new one."""
    return config if config.out else replace(config, out=str(free_folder(config)))


def saved(run: str | Path) -> RunConfig:
    """What the run in this folder was asked."""
    return replace(RunConfig.from_dict(RunFolder(Path(run)).read(CONFIG)), out=str(run))


def load_data(config: RunConfig) -> Data:
    """The rows that the config names, with the task's lengths as asked."""
    if config.train_file is not None:
        found = data.from_files(
            config.train_file, config.validation_file, config.text, config.label
        )
    else:
        task = tasks.named(str(config.task))
        if config.data_dir is not None:
            found = data.from_folder(task, config.data_dir)
        else:
            found = demo.spam() if task is tasks.sms_spam else data.from_hub(task)
    return replace(found, task=presets.fitted(found.task, config.epochs, config.max_length))


def free_folder(config: RunConfig) -> Path:
    """A folder under runs/ that says what the run is, and in which nothing lies yet."""
    task = config.task or Path(str(config.train_file)).name.split(".")[0]
    stem = f"{task}-{config.method}-seed{config.seed}"
    numbered = (Path("runs") / (stem if i == 1 else f"{stem}-{i}") for i in range(1, sys.maxsize))
    return next(path for path in numbered if not path.exists())


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """Silence the libraries' notes to developers, not our own warnings to the user."""
    with warnings.catch_warnings(), models.quiet():
        for module in ("torch", "transformers", "accelerate", "datasets", "huggingface_hub"):
            warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
        yield


def _waiting(console: Console | None, why: str) -> contextlib.AbstractContextManager[Any]:
    return console.status(why) if console else contextlib.nullcontext()


def _check_levels(config: RunConfig, method: Method) -> None:
    if config.save_at and not isinstance(method.strategy, Increment):
        raise UnmaskError(
            f"--save-at keeps deltas while the budget fills up, but {config.method} chooses "
            "its whole budget at the first step; use id3, or leave --save-at out"
        )


def _check_same(config: RunConfig, folder: RunFolder) -> None:
    """A resumed run is the same run."""
    asked, stored = config.to_dict(), saved(folder.path).to_dict()
    if different := [key for key in asked if asked[key] != stored[key]]:
        pairs = ", ".join(f"{key}={asked[key]!r} (it has {stored[key]!r})" for key in different)
        raise UnmaskError(
            f"--resume continues the run in {str(folder.path)!r} as it was begun, but was given "
            f"{pairs}; leave these out, or start a new run with another --out"
        )
