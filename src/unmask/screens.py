"""What the commands print: tables, summaries and plain lines on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from unmask.errors import UnmaskError

if TYPE_CHECKING:  # torch takes a second, and --help has no use for it
    from unmask.delta import Delta
    from unmask.methods import Description
    from unmask.recipes.plan import Plan

screen, err = Console(), Console(stderr=True)


def say(text: str, console: Console = err) -> None:
    """A plain line, never wrapped: paths and commands must survive copying."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def note(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A warning as one line."""
    ours = category.__name__ == "UnmaskWarning"
    say(f"note: {message}" if ours else f"{category.__name__}: {message}")


def summary(folder: str | None, m: Mapping[str, Any]) -> None:
    """What a run gave, and what to do next."""
    try:
        rows = _results(folder, m)
    except (LookupError, TypeError, ValueError, ArithmeticError) as problem:
        raise UnmaskError(
            f"metrics.json in {str(folder)!r} isn't what a run wrote ({problem!r}); "
            f"`unmask evaluate {folder}` measures again"
        ) from problem
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"{name:<{width}}  {value}", screen)


def _results(folder: str | None, m: Mapping[str, Any]) -> list[tuple[str, str]]:
    share = m["active"] / m["parameters"]
    inside = f" inside {m['peft']}" if m.get("peft") else ""
    return [
        (f"{m['metric']} before", f"{m['before']:.4f}"),
        (f"{m['metric']} after", f"{m['value']:.4f}   (best measured {m['best']:.4f})"),
        ("changed", f"{m['active']:,} of {m['parameters']:,} scalars ({share:.2%}){inside}"),
        ("new head", f"{m['head']:,} scalars"),
        ("file size", f"{_bytes(m['delta_bytes'])} (full model: {_bytes(m['model_bytes'])})"),
        ("time", f"{m['train_seconds']:.0f} s for {m['steps']:,} steps on {m['device']}"),
        *((f"at {e['share']:.0%} of budget", f"{e['value']:.4f}") for e in m["series"]),
        ("run", str(folder)),
        ("next", f"unmask inspect {folder}"),
        ("", f"unmask evaluate {folder}"),
    ]


def delta(found: Delta, path: Path, size: int) -> None:
    """What a delta changes, a row a tensor."""
    table = Table("tensor", "shape", "changed", "share", title=f"{path}")
    table.columns[0].overflow = "fold"
    for column in table.columns[2:]:
        column.justify = "right"
    for row in found.tensors:
        table.add_row(row.name, _shape(row.shape), f"{row.changed:,}", f"{row.share:.3%}")
    for name, tensor in (*found.full.items(), *found.buffers.items()):
        table.add_row(name, _shape(tensor.shape), "whole", "")
    screen.print(table)
    base = found.info.get("base_model_name_or_path") or "a model without a name"
    inside = f" with {found.info['peft']} in it" if "peft" in found.info else ""
    say(
        f"{found.active:,} scalars in {len(found.sparse)} tensors, {len(found.full)} whole, "
        f"{_bytes(size)}; base {base}{inside}, fingerprint {found.base[:12]}",
        screen,
    )


def methods(described: Iterable[Description]) -> None:
    """A row a method."""
    table = Table("method", "what is trained", "memory", "source", show_lines=True)
    for row in described:
        table.add_row(*row)
    screen.print(table)
    say(
        "B: the budget; N: all eligible scalars. Memory: beyond the weights, with AdamW.\n"
        "unmask methods NAME lists what --set reaches of it.",
        screen,
    )


def method(described: Description, keys: Mapping[str, Any]) -> None:
    """One method in words, and its keys for --set."""
    for name, said in zip(described._fields, described, strict=True):
        say(f"{name:<8} {said}", screen)
    for key, value in keys.items():
        say(f"--set {key}={value}", screen)


def plan(found: Plan, memory: str | None, fitting: Sequence[str]) -> None:
    """Bytes by part and mode, and which modes fit into `memory`."""
    from unmask.recipes.plan import PARTS

    inside = f" in {found.peft}" if found.peft else ""
    title = f"{found.method}{inside} on {found.parameters:,} parameters in {found.dtype}, MB"
    table = Table("", *(row.mode for row in found.rows), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in (*PARTS, "peak"):
        table.add_row(part, *(f"{getattr(row, part) / 1e6:,.1f}" for row in found.rows))
    if memory is not None:
        fits = ["yes" if row.mode in fitting else "no" for row in found.rows]
        table.add_row(f"fits in {memory}", *fits)
    screen.print(table)
    size = f"{found.batch_size} x {found.sequence_length} tokens"
    notes = [
        f"{found.budget:,} of {found.eligible:,} scalars, {size}, AdamW.",
        "Each part at its largest; the peak is all of them at the worst moment.",
        "Without the interpreter and its libraries.",
    ]
    if found.device == "cpu":
        notes.append(
            "On Linux the C library holds up to a half more unless MALLOC_MMAP_THRESHOLD_=65536 "
            "is set, with which steps take longer."
        )
    if found.resting is not None:
        notes.append(f"sampled, steps that choose nothing: peak {found.resting / 1e6:,.1f} MB.")
    if found.before is not None:
        notes.append(
            f"Not counted: before training, {found.method} needs {found.before}, "
            "N being the scalars that it may choose from."
        )
    for note in notes:
        say(note, screen)


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"
