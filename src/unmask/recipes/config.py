"""What a run was asked: one frozen dataclass, read from and written to config.json."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from unmask.errors import UnmaskError
from unmask.recipes import demo, presets, tasks
from unmask.recipes.presets import Budget

# Training arguments that have an option of their own here, under the name of that option.
OPTIONS = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "seed": "seed",
    "output_dir": "out",
}
# What `peft` may put into the model.
WRAPPERS = ("lora", "adalora", "ia3", "pfeiffer", "houlsby")
# Training arguments that would undo what a run promises.
RESERVED = {
    "disable_tqdm": "the run draws its own progress",
    "do_train": "use `unmask train`",
    "do_eval": "use `unmask evaluate`",
    "do_predict": "use `unmask evaluate`",
    "push_to_hub": "upload the run's delta/ folder yourself",
    "resume_from_checkpoint": "use --resume",
    "restore_callback_states_from_checkpoint": "a resumed run goes on exactly as it was",
    "ignore_data_skip": "a resumed run goes on exactly as it was",
    "save_only_model": "a checkpoint must be fit for --resume",
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run gives; every default is a working one.

    task     a name from `unmask.recipes.tasks`; none for `train_file` or the embedded data
    model    a folder, a hub id, or (the default) the package that carries the embedded model
    budget   scalars (38000, "320K") or a share (0.001, "0.1%"); none: the method's own, or 38,000
    peft     modules of another method to put into the model and choose from, "lora:r=8" say
    text     the text columns of `train_file`, one or two
    settings  the rest: fields of transformers.TrainingArguments, and dotted keys of the method
    save_at  shares of the budget at which a delta of the series is kept, in (0, 1]

    >>> RunConfig(budget="0.1%").budget, RunConfig(budget="320K").budget
    (0.001, 320000)
    """

    task: str | None = None
    model: str = demo.MODEL[0]
    method: str = "id3"
    budget: Budget | str | None = None
    peft: str | None = None
    data_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    text: tuple[str, ...] = ("text",)
    label: str = "label"
    epochs: float | None = None
    max_length: int | None = None
    lr: float | None = None
    batch_size: int = presets.PAPER_BATCH_SIZE
    seed: int = 0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    save_at: tuple[float, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    out: str | None = None

    def __post_init__(self) -> None:
        change = object.__setattr__
        settings = dict(self.settings)
        for key, option in OPTIONS.items():
            if key in settings:
                value = convert(settings.pop(key), _hints(RunConfig)[option], key)
                change(self, option, value)
        change(self, "settings", settings)
        own = presets.budget(self.method) if self.budget is None else self.budget
        change(self, "budget", parse_budget(own))
        for name in ("text", "include", "exclude", "save_at"):
            value = getattr(self, name)
            change(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.task is None and self.train_file is None and self.data_dir is None:
            change(self, "task", tasks.sms_spam.name)
        if self.lr is None:
            change(self, "lr", presets.learning_rate(self.method))
        for name in ("model", "data_dir", "train_file", "validation_file"):
            value = getattr(self, name)
            if value is not None and Path(value).exists():  # findable from anywhere, later
                change(self, name, str(Path(value).resolve()))
        self._check()

    def _check(self) -> None:
        if self.task is not None:
            tasks.named(self.task)
        if self.task is not None and self.train_file is not None:
            raise UnmaskError("both --task and --train-file were given; give one of them")
        if self.task is None and self.data_dir is not None:
            raise UnmaskError("--data-dir was given without --task; name the task to read there")
        if self.train_file is None and self.validation_file is not None:
            raise UnmaskError("--validation-file was given without --train-file; give both")
        if self.peft is not None:
            parse_wrapper(self.peft)
        for name in ("epochs", "max_length", "lr", "batch_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UnmaskError(f"{name}={value}; it must be above 0")
        if self.seed < 0:
            raise UnmaskError(f"seed={self.seed}; a seed is 0 or more")
        for share in self.save_at:
            if not 0 < share <= 1:
                raise UnmaskError(f"save_at={share:g}; levels are shares of the budget in (0, 1]")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        del plain["out"]  # a run folder may be moved
        return plain

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> RunConfig:
        """The config that `to_dict` described."""
        known = {f.name for f in fields(cls)}
        if unknown := described.keys() - known:
            raise UnmaskError(
                f"the config has {', '.join(sorted(unknown))}, which this unmask doesn't know; "
                "start the run anew, or use the version that made it"
            )
        return cls(**described)

    def training(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of transformers.TrainingArguments: `defaults`, then the user's."""
        from transformers import TrainingArguments

        hints = _hints(TrainingArguments)
        allowed = {k for k in hints if not k.startswith("_")} - RESERVED.keys() - OPTIONS.keys()
        chosen = dict(defaults)
        for key, value in self.settings.items():
            if key.partition(".")[0] in METHOD_PARTS:
                continue
            if key in RESERVED:
                raise UnmaskError(f"--set {key} isn't possible here: {RESERVED[key]}")
            if key == "warmup_ratio" and key not in hints:
                # transformers 5 spells a ratio as warmup_steps below 1.
                ratio = convert(value, float, key)
                if not 0 <= ratio < 1:
                    raise UnmaskError(
                        f"--set warmup_ratio={value}; it is a share, from 0 to below 1"
                    )
                chosen["warmup_steps"] = ratio
                continue
            if key not in allowed:
                raise UnmaskError(
                    f"--set {key}: no such key; {_near(key, allowed | {'warmup_ratio'})}"
                    "training keys are the fields of transformers.TrainingArguments, method keys "
                    "are dotted "
                    f"({', '.join(f'{part}.<field>' for part in METHOD_PARTS)})"
                )
            chosen[key] = convert(value, hints[key], key)
        return chosen


METHOD_PARTS = ("method", "heuristic", "strategy", "schedule", "scope")


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


def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _near(key: str, allowed: set[str]) -> str:
    near = get_close_matches(key, sorted(allowed), 3)
    return f"did you mean {' or '.join(near)}? " if near else ""
