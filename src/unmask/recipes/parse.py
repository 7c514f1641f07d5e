"""What is written on a command line as what it means, or a word on what is wrong with it."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from unmask.errors import UnmaskError
from unmask.recipes import presets
from unmask.recipes.presets import Budget

# What `--peft` may put into the model.
WRAPPERS = ("lora", "adalora", "ia3", "pfeiffer", "houlsby")


def parse_budget(budget: Budget | str | None) -> Budget:
    """Scalars or a share, also as written on a command line: 38000, 38_000, 320K, 0.1%, 0.001."""
    if budget is None or not isinstance(budget, str):
        return presets.BUDGET if budget is None else budget
    text = budget.strip().replace("_", "").replace(",", "")
    units = {"K": 1_000, "M": 1_000_000, "B": 1_000_000_000}
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        if text[-1:].upper() in units:
            return round(float(text[:-1]) * units[text[-1].upper()])
        return float(text) if set(text) & set(".eE") else int(text)
    except (ValueError, OverflowError):
        raise UnmaskError(
            f"budget={budget!r}; a budget is a number of scalars (38000, 320K) or a share of the "
            "eligible ones (0.001, 0.1%)"
        ) from None


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """Every `key=value` as an entry; a key has one value.

    >>> parse_settings(["schedule.every=10", "max_steps=500"])
    {'schedule.every': '10', 'max_steps': '500'}
    """
    settings: dict[str, str] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise UnmaskError(f"--set {text!r}; write --set key=value, as in --set max_steps=500")
        if settings.setdefault(key, value) != value:
            raise UnmaskError(f"--set {key}={value} and --set {key}={settings[key]}; give one")
    return settings


def parse_wrapper(text: str) -> tuple[str, dict[str, list[str]]]:
    """`kind:key=value,key=value` in parts; a value with commas is several.

    >>> parse_wrapper("lora:r=8,target=query,value")
    ('lora', {'r': ['8'], 'target': ['query', 'value']})
    """
    kind, _, rest = text.partition(":")
    if kind not in WRAPPERS:
        near = get_close_matches(kind, WRAPPERS, 1)
        raise UnmaskError(
            f"--peft {text!r}: nothing is called {kind!r}"
            f"{f' (did you mean {near[0]!r}?)' if near else ''}; there are {', '.join(WRAPPERS)}, "
            "with settings as in lora:r=8,target=all-linear"
        )
    options: dict[str, list[str]] = {}
    for piece in rest.split(",") if rest else []:
        key, equals, value = (part.strip() for part in piece.partition("="))
        if equals and key in options:
            raise UnmaskError(f"--peft {text}: {key} is given twice; write {key}=one,other for two")
        if equals and key and value:
            options[key] = [value]
        elif options and key and not equals:
            options[next(reversed(options))].append(key)
        else:
            raise UnmaskError(
                f"--peft {text}: {piece!r} is no key=value; write as in lora:r=8,target=all-linear"
            )
    return kind, options


def parse_levels(text: str) -> tuple[float, ...]:
    """`10%,25%,100%` as shares.

    >>> parse_levels("10%, 25%, 1.0")
    (0.1, 0.25, 1.0)
    """
    try:
        return tuple(
            float(level.strip().rstrip("%")) / (100 if level.strip().endswith("%") else 1)
            for level in text.split(",")
        )
    except ValueError:
        raise UnmaskError(f"--save-at {text!r}; write levels as in 10%,25%,50%,100%") from None


def convert(value: Any, hint: Any, key: str, option: str = "--set") -> Any:
    """`value`, a string perhaps, as the type that `hint` asks for; refused if it isn't one."""
    kinds = _kinds(hint)
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if type(None) in kinds:
            return None
    elif isinstance(value, bool) or (bool in kinds and isinstance(value, str)):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if bool in kinds and (known := words.get(str(value).lower())) is not None:
            return known
    for kind in (int, float):
        if kind in kinds and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = kind(value)
            except (ValueError, OverflowError):
                continue
            if number == value or isinstance(value, str):
                return number
    if isinstance(value, str) and typing.get_args(hint) == (str, ...):
        return tuple(part.strip() for part in value.split(","))
    structured = [kind for kind in kinds if kind in (dict, list, tuple)]
    if isinstance(value, str) and structured:
        try:
            if isinstance(parsed := json.loads(value), tuple(structured)):
                return parsed
        except ValueError:
            pass
    if isinstance(value, tuple(structured)) or (isinstance(value, str) and str in kinds):
        return value
    names = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds if kind is not type(None)))
    raise UnmaskError(f"{option} {key}={value!r}: {key} must be {names}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value as JSON has it is what a type hint asks for.

    >>> fits(["a"], tuple[str, ...]), fits([1], tuple[str, ...]), fits(1, float), fits(True, int)
    (True, False, True, False)
    """
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if kind is tuple:
        return isinstance(value, list | tuple) and all(fits(part, parts[0]) for part in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else kind or hint)


def _kinds(hint: Any) -> list[type]:
    """The plain classes that a type hint allows."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    if typing.get_origin(hint) is typing.Literal:
        return [type(option) for option in typing.get_args(hint)]
    origin = typing.get_origin(hint) or hint
    if isinstance(origin, type):
        return [str] if issubclass(origin, str) else [origin]
    return [str]
