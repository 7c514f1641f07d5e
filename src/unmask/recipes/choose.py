"""A method by name, its parts changed by dotted keys: `heuristic.exp=1`, `schedule.every=10`."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any

import unmask
from unmask import Heuristic, Method, Schedule, Scope, Strategy, UnmaskError, methods
from unmask.methods import Description
from unmask.recipes import presets
from unmask.recipes.config import METHOD_PARTS
from unmask.recipes.parse import convert
from unmask.recipes.presets import Budget

HEAD = "head"  # the baseline of the recipes: train the new head, leave the pretrained model alone
PARTS = (Heuristic, Strategy, Schedule, Scope)
# Where a method has nothing to say by itself, a field alone may choose the class that has it:
# `schedule.every=10` is a Strided. What a method's heuristic and strategy are makes the method.
OPEN = (Schedule, Scope)

Asked = dict[str, Any]  # field -> what is asked of it, Asked again; "" -> the value or the class


def method(name: str, budget: Budget, settings: Mapping[str, Any]) -> Method:
    """The named method with that budget and the dotted settings put in.

    >>> method("id3", 1000, {"heuristic.exp": "1", "schedule.every": "10"}).strategy
    Increment(schedule=Strided(every=10))
    >>> method("sparse_adapter", 1000, {"method.pruner": "magnitude", "scope.rows": "1"}).scope
    Units(rows=1, columns=None)
    """
    asked = _tree(settings)
    if name == HEAD:
        if asked:
            raise UnmaskError(
                f"--set {next(iter(asked))}: --method {HEAD} chooses nothing, so it has no settings"
            )
        return methods.full()
    if name not in methods.__all__:
        near = get_close_matches(name, methods.__all__, 1)
        raise UnmaskError(
            f"no method is called {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; "
            f"there are {', '.join(methods.__all__)}, and {HEAD} (the new head alone)"
        )
    own = asked.pop("method", {})
    _check_once(own, settings)
    built: Method = getattr(methods, name)(budget=budget, **_arguments(name, own))
    changed: Method = _changed(built, Method, asked, "")
    return changed


def catalogue() -> list[Description]:
    """Every method in words."""
    said = "The new head alone, whole; the pretrained weights stay as they are."
    head = Description(HEAD, said, "the head's gradient and optimiser state", "baseline")
    return [*map(methods.describe, methods.__all__), head]


def reachable(name: str) -> dict[str, Any]:
    """Every key of the method's for --set, with what it is unless set.

    >>> reachable("id3")["heuristic.exp"]
    2.0
    """
    built = method(name, presets.budget(name), {})
    if name == HEAD:
        return {}
    own = {f"method.{key}": default for key, (default, _) in _parameters(name).items()}
    return own | {k: v for k, v in _walk(built, "").items() if k.split(".")[0] in METHOD_PARTS}


def _tree(settings: Mapping[str, Any]) -> Asked:
    tree: Asked = {}
    for key, value in settings.items():
        path = key.split(".")
        if path[0] not in METHOD_PARTS:
            continue
        if not all(path) or path == ["method"]:
            raise UnmaskError(f"--set {key}={value}: no such key; write <part>.<field>=<value>")
        node = tree
        for field in ["strategy", *path] if path[0] == "schedule" else path:
            node = node.setdefault(field, {})
        if node.setdefault("", value) != value:
            raise UnmaskError(f"--set {key}={value}, and {node['']!r} as well; give one of them")
    return tree


def _check_once(own: Asked, settings: Mapping[str, Any]) -> None:
    """Refuse a parameter that is given by the method's name for it and by its part's, too."""
    for key in settings:
        first, _, last = key.rpartition(".")
        if last in own and first != "method" and key.split(".")[0] in METHOD_PARTS:
            raise UnmaskError(f"--set method.{last} and --set {key} both set {last}; give one")


def _arguments(name: str, own: Asked) -> dict[str, Any]:
    """Keyword arguments of the named method, as asked."""
    known = _parameters(name)
    for key in own:
        if key not in known:
            allowed = ", ".join(f"method.{k}" for k in known) or "none"
            raise UnmaskError(
                f"--set method.{key}: {name} has no parameter {key!r}; there are {allowed}, and "
                f"the keys of its parts, which `unmask methods {name}` lists"
            )
    return {key: _value(*known[key], asked, f"method.{key}") for key, asked in own.items()}


def _parameters(name: str) -> dict[str, tuple[Any, Any]]:
    """The named method's own parameters: their defaults and types."""
    build = getattr(methods, name)
    hints, declared = typing.get_type_hints(build), inspect.signature(build).parameters
    return {key: (p.default, hints[key]) for key, p in declared.items() if key != "budget"}


def _changed(current: Any, base: type, asked: Asked, path: str) -> Any:
    """`current` with the class and the fields that are asked for, all at once."""
    inner = {field: more for field, more in asked.items() if field}
    if "" in asked:
        current = _made(base, asked[""], path)
    elif base in OPEN and not inner.keys() <= _hints(type(current)).keys():
        current = _fitting(base, inner) or current
    hints = _hints(type(current))
    for field in inner:
        if field not in hints:
            raise UnmaskError(_unknown(current, base, field, path))
    return replace(
        current,
        **{
            field: _value(getattr(current, field), hints[field], more, _join(path, field))
            for field, more in inner.items()
        },
    )


def _value(current: Any, hint: Any, asked: Asked, path: str) -> Any:
    """A field's new value: a part, changed, or what was written as the type that it must be."""
    for kind in (hint, *typing.get_args(hint)):
        if kind in PARTS:
            return _changed(current, kind, asked, path)
    if deeper := [field for field in asked if field]:
        raise UnmaskError(f"--set {path}.{deeper[0]}: {path} is a value and has no fields")
    return convert(asked[""], hint, path)


def _made(base: type, name: Any, path: str) -> Any:
    """The part of this name, with its defaults."""
    known = {candidate.lower(): kind for candidate, kind in _classes(base).items()}
    if str(name).lower() not in known:
        raise UnmaskError(f"--set {path}={name}: there are {', '.join(_classes(base))}")
    return known[str(name).lower()]()


def _fitting(base: type, fields: Asked) -> Any:
    """The one class that has all these fields, or from which all others with them inherit."""
    kinds = [kind for kind in _classes(base).values() if fields.keys() <= _hints(kind).keys()]
    first = [kind for kind in kinds if not any(issubclass(kind, k) for k in kinds if k is not kind)]
    return first[0]() if len(first) == 1 else None


def _unknown(current: Any, base: type, field: str, path: str) -> str:
    own = ", ".join(_join(path, each) for each in _hints(type(current))) or "none"
    owners = [name for name, kind in _classes(base).items() if field in _hints(kind)]
    other = (
        f"{', '.join(owners)} {'have' if len(owners) > 1 else 'has'} one, chosen by "
        f"--set {path}={owners[0]}"
        if owners
        else f"--set {path}=<class> chooses another of {', '.join(_classes(base))}"
    )
    return (
        f"--set {_join(path, field)}: {type(current).__name__} has no {field!r}; "
        f"there are {own}; {other}"
    )


def _walk(part: Any, path: str) -> dict[str, Any]:
    """Every key of a part, with its value; a part within stands for itself by its class."""
    found: dict[str, Any] = {}
    for field in _hints(type(part)):
        key, value = _join(path, field), getattr(part, field)
        inner = isinstance(value, PARTS)
        found[key] = type(value).__name__ if inner else value
        found |= _walk(value, key) if inner else {}
    return found


def _join(path: str, field: str) -> str:
    """A key as users write it: the schedule is at hand without its strategy."""
    bare = not path or (path, field) == ("strategy", "schedule")
    return field if bare else f"{path}.{field}"


def _classes(base: type) -> dict[str, Any]:
    """The library's concrete classes of a kind, by name."""
    public = {name: getattr(unmask, name) for name in unmask.__all__}
    return {
        name: kind
        for name, kind in public.items()
        if isinstance(kind, type) and issubclass(kind, base) and not inspect.isabstract(kind)
    }


def _hints(kind: Any) -> dict[str, Any]:
    """A dataclass's fields and their types."""
    if not is_dataclass(kind):
        return {}
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}
