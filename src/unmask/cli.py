"""The `unmask` command: parses, calls the recipes, prints; imports what is heavy when needed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from unmask import screens
from unmask.errors import UnmaskError
from unmask.screens import say, screen


class Commands(TyperGroup):
    """Turns a user's mistake into one message on standard error and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        warnings.showwarning = screens.note
        try:
            return super().invoke(ctx)
        except UnmaskError as mistake:
            say(f"Error: {' '.join(str(mistake).splitlines())}")
            raise typer.Exit(2) from mistake
        except OSError as problem:
            if isinstance(problem, BrokenPipeError):  # nobody listens any more
                raise
            path = problem.filename
            said = str(problem) if path is None else f"{problem.strerror}: {path}; check the path"
            say(f"Error: {' '.join(said.splitlines())}")
            raise typer.Exit(2) from problem


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune a model by training a chosen few of its own weights, and keep only those.",
)


def main() -> None:
    """Entry point of the installed command."""
    app(prog_name="unmask")


def _version(asked: bool) -> None:
    if asked:
        from unmask import __version__

        say(f"unmask {__version__}", screen)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    task: Annotated[
        str | None, typer.Option(help="A task's name, rte say. Default: the embedded sms_spam.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A hub id or a folder. Default: the embedded MiniLM.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="See `unmask methods`; `head` trains the new head alone.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Scalars (38000, 320K) or a share (0.1%). Default: 38000.")
    ] = None,
    peft: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:KEY=VALUE,...",
            help="Put modules into the model and choose from those: lora:r=8,target=all-linear, "
            "adalora, ia3, pfeiffer:reduction=16, houlsby.",
        ),
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="A folder with <task>/{train,validation}.jsonl.gz.")
    ] = None,
    train_file: Annotated[
        str | None, typer.Option(help="Your own rows: .jsonl, .csv or .tsv, also .gz.")
    ] = None,
    validation_file: Annotated[
        str | None, typer.Option(help="Rows to measure on. Default: a tenth of --train-file.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text column of your file; twice for pairs.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Label column of your file.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Default: the task's.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens. Default: the task's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Default: 1e-3, 5e-5 for full.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: 16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: 0.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Parameters to choose from, a shell pattern.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Parameters to spare, a shell pattern.")
    ] = None,
    save_at: Annotated[
        str | None, typer.Option(help="Keep deltas on the way: 10%,25%,50%,100% of the budget.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Fields of transformers.TrainingArguments (max_steps=500) and the method's own "
            "(heuristic.exp=1, schedule.every=10). Repeatable.",
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Default: a new folder in runs/.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.")
    ] = False,
) -> None:
    """Fine-tune; with no option at all, the embedded model on the embedded data, offline."""
    given: dict[str, Any] = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("resume", "overwrite")
    }
    if resume and (overwrite or out is None):
        raise UnmaskError("--resume goes with --out, the folder of the run, without --overwrite")
    from unmask.recipes import parse, run

    if text is not None:
        given["text"] = tuple(column for names in text for column in names.split(","))
    if settings is not None:
        given["settings"] = parse.parse_settings(settings)
    if save_at is not None:
        given["save_at"] = parse.parse_levels(save_at)
    config = run.placed(run.asked(given, resume=resume))
    if resume and (done := run.finished(config)) is not None:
        say(f"the run in {config.out} is finished", screen)
        screens.summary(config.out, done)
        return
    say(f"{config.method} on {config.task or config.train_file}, into {config.out}", screen)
    try:
        metrics = run.train(config, resume=resume, overwrite=overwrite, console=screen)
    except KeyboardInterrupt:
        say(
            f"stopped; to go on: unmask train --resume --out {config.out}"
            if run.begun(config)
            else "stopped before the first step; nothing was written"
        )
        raise typer.Exit(130) from None
    screens.summary(config.out, metrics)


@app.command()
def evaluate(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Measure a run again, from the base model and its delta."""
    from unmask.recipes.run import evaluate as measure

    for part, value in (found := measure(run))["values"].items():
        say(f"{found['task']} {part}: {found['metric']} {value:.6f}", screen)


@app.command()
def inspect(
    delta: Annotated[Path, typer.Argument(help="A delta's folder, or a run's.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a delta changes: budget, tensors, bytes, base, allotment."""
    from unmask.delta import Delta

    path = _delta_folder(delta)
    found = Delta.load(path)
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    report = {
        "active": found.active,
        "tensors": len(found.sparse),
        "bytes": size,
        "base": found.base,
        "whole": {name: list(tensor.shape) for name, tensor in found.full.items()},
        "buffers": {name: list(tensor.shape) for name, tensor in found.buffers.items()},
        "allotment": [
            {"name": row.name, "shape": list(row.shape), "changed": row.changed, "share": row.share}
            for row in found.tensors
        ],
        "info": dict(found.info),
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    screens.delta(found, path, size)


@app.command()
def apply(
    model: Annotated[str, typer.Argument(help="The base: a folder or a hub id.")],
    delta: Annotated[Path, typer.Argument(help="A delta's folder, or a run's.")],
    folder: Annotated[Path, typer.Option("--out", help="Where to write the model.")],
) -> None:
    """Write a plain model folder with the delta merged in, for from_pretrained."""
    from unmask.delta import Delta

    loaded = Delta.load(_delta_folder(delta))
    from unmask.recipes import models
    from unmask.recipes.run import calm

    with calm():
        merged = models.merge(model, loaded, folder)
    say(f"{type(merged).__name__} with the delta merged in, written to {folder}", screen)


@app.command()
def compose(
    deltas: Annotated[list[Path], typer.Argument(help="Deltas of one base: folders, or runs'.")],
    folder: Annotated[Path, typer.Option("--out", help="Where to write the delta.")],
    model: Annotated[
        str | None, typer.Option(help="The base. Default: what the deltas name as theirs.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One for each delta: 1,-0.5. Default: 1 each.")
    ] = None,
    conflicts: Annotated[
        str, typer.Option(help="Where several change one scalar: sum, last or ties.")
    ] = "sum",
    keep: Annotated[
        float, typer.Option(help="ties: the share of each delta's changes kept, largest first.")
    ] = 1.0,
) -> None:
    """Write several deltas of one base as one."""
    from unmask.recipes import combine
    from unmask.recipes.run import calm

    paths = [_delta_folder(path) for path in deltas]
    with calm():
        composed = combine.compose_folders(
            paths,
            folder,
            model=model,
            weights=None if weights is None else combine.parse_weights(weights),
            conflicts=conflicts,
            keep=keep,
        )
    say(
        f"{len(paths)} deltas as one, {composed.active:,} scalars, written to {folder}; "
        f"unmask inspect {folder}",
        screen,
    )


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="One of them, with all that --set reaches of it.")
    ] = None,
) -> None:
    """List every method with its formula, what it keeps in memory, and its source."""
    from unmask.recipes import choose

    described = {row.name: row for row in choose.catalogue()}
    if name is None:
        screens.methods(described.values())
    else:
        keys = choose.reachable(name)
        screens.method(described[name], keys)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A hub id or a folder; its config.json will do.")],
    method: Annotated[str, typer.Option(help="See `unmask methods`.")] = "id3",
    budget: Annotated[
        str | None, typer.Option(help="Scalars (38000, 320K) or a share (0.1%).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 128,
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="Where it will train: cpu or cuda.")] = "cpu",
    peft: Annotated[
        str | None,
        typer.Option(metavar="KIND:KEY=VALUE,...", help="Choose from modules put in, as in train."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="The method's own keys, as in train."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Say which modes fit in so much: 24GB, 80GiB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what training will take in memory, by part and mode, from the model's config alone."""
    from unmask.recipes import parse, presets
    from unmask.recipes import plan as planner
    from unmask.recipes.run import calm

    room = None if memory is None else planner.parse_memory(memory)
    scalars = parse.parse_budget(presets.budget(method) if budget is None else budget)
    keys = parse.parse_settings(settings or ())
    with calm():
        found = planner.plan(
            model, method, scalars, batch_size, sequence_length, dtype, device, keys, peft
        )
    fitting = () if room is None else found.fitting(room)
    if as_json:
        print(json.dumps(found.to_dict() | ({} if room is None else {"fits": fitting}), indent=2))
        return
    screens.plan(found, memory, fitting)


def _delta_folder(path: Path) -> Path:
    """A run's folder stands for its delta."""
    inside = path / "delta"
    return inside if inside.is_dir() and not (path / "adapter_config.json").exists() else path
