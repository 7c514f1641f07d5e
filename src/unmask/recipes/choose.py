"""A method by name, its parts changed by dotted keys: `heuristic.exp=1`, `schedule.every=10`."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from types import ModuleType
from typing import Any, NamedTuple

from unmask import Method, heuristics, methods, schedules, scopes, strategies
from unmask.errors import UnmaskError
from unmask.recipes import presets
from unmask.recipes.config import METHOD_PARTS, convert
from unmask.recipes.presets import Budget

HEAD = "head"  # the baseline of the recipes: train the new head, leave the pretrained model alone
PARTS: dict[str, ModuleType] = {
    "heuristic": heuristics,
    "strategy": strategies,
    "schedule": schedules,
    "scope": scopes,
}


def method(name: str, budget: Budget, settings: Mapping[str, Any]) -> Method:
    """The named method with that budget and the dotted settings put in.

    >>> method("id3", 1000, {"heuristic.exp": "1", "schedule.every": "10"}).strategy
    Increment(schedule=Strided(every=10))
    """
    if name == HEAD:
        return methods.full()
    if name not in methods.__all__:
        near = get_close_matches(name, methods.__all__, 1)
        raise UnmaskError(
            f"no method is called {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; "
            f"there are {', '.join(methods.__all__)}, and {HEAD} (the new head alone)"
        )
    built: Method = getattr(methods, name)(budget=budget)
    for key, value in settings.items():
        part, dot, field = key.partition(".")
        if part not in METHOD_PARTS:
            continue
        holder = built.strategy if part == "schedule" else built
        if (current := getattr(holder, part, None)) is None:
            raise UnmaskError(f"--set {key}: {type(holder).__name__} has no {part}")
        new: Any = _changed(current, part, field, value, key) if dot else _made(part, value)
        if part == "schedule":
            part, new = "strategy", replace(holder, schedule=new)  # type: ignore[type-var]
        built = replace(built, **{part: new})
    return built


class Entry(NamedTuple):
    """A method as `unmask methods` lists it."""

    name: str
    formula: str
    memory: str
    source: str


def catalogue() -> list[Entry]:
    """Every method, from its docstring and its parts."""
    entries = []
    for name in methods.__all__:
        build = getattr(methods, name)
        said, _, source = (inspect.getdoc(build) or "").partition("Source:")
        built: Method = build(budget=presets.budget(name))
        plain = (" ".join(part.split()) for part in (said, _memory(built), source))
        entries.append(Entry(name, *plain))
    said = "The new head alone, whole; the pretrained weights stay as they are."
    return [*entries, Entry(HEAD, said, "the head's gradient and optimiser state", "baseline")]


def _memory(built: Method) -> str:
    # The values, their base, their slots (two int64) and AdamW's two moments.
    kept = f"32 bytes x {'B' if built.budget == presets.BUDGET else 'N'}"
    more = getattr(built.heuristic, "memory", "")
    if not built.heuristic.uses_gradient:
        return f"{kept}; {more or 'no gradient to choose'}"
    when = "the first" if isinstance(built.strategy, strategies.Static) else "every"
    return f"{kept}; {more or f'reads all gradients at {when} step'}"


def _changed(current: Any, part: str, field: str, value: Any, key: str) -> Any:
    """`current` with one field changed; a class that alone has the field takes the place of one
    that lacks it (`schedule.every` makes Uniform a Strided)."""
    if field not in _fields(type(current)):
        owners = [c for c in _classes(part).values() if field in _fields(c)]
        if len(owners) != 1:
            allowed = [f"{part}.{f}" for c in _classes(part).values() for f in _fields(c)]
            raise UnmaskError(
                f"--set {key}: {type(current).__name__} has no {field!r}; there are "
                f"{', '.join(dict.fromkeys(allowed)) or 'none'}, and --set {part}=<class> with "
                f"{', '.join(_classes(part))}"
            )
        current = _made(part, owners[0].__name__)
    hints = typing.get_type_hints(type(current))
    return replace(current, **{field: convert(value, hints[field], key)})


def _made(part: str, name: Any) -> Any:
    """The part of this name, with its defaults."""
    known = {candidate.lower(): kind for candidate, kind in _classes(part).items()}
    if str(name).lower() not in known:
        raise UnmaskError(f"--set {part}={name}: there are {', '.join(_classes(part))}")
    try:
        return known[str(name).lower()]()
    except TypeError as problem:
        raise UnmaskError(
            f"--set {part}={name}: {name} can't be made from defaults alone ({problem}); "
            "build the method in Python"
        ) from problem


def _classes(part: str) -> dict[str, Any]:
    """The concrete classes of a module of parts, by name."""
    exported = {name: getattr(PARTS[part], name) for name in PARTS[part].__all__}
    base = exported[part.capitalize()]
    return {
        name: kind
        for name, kind in exported.items()
        if isinstance(kind, type) and issubclass(kind, base) and kind is not base
    }


def _fields(kind: Any) -> list[str]:
    return [f.name for f in fields(kind)] if is_dataclass(kind) else []
