"""What a run was asked: one frozen dataclass, read from and written to config.json."""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from unmask.errors import UnmaskError
from unmask.recipes import demo, presets, tasks
from unmask.recipes.parse import convert, fits, parse_wrapper
from unmask.recipes.parse import parse_budget as parse_budget
from unmask.recipes.presets import Budget

# Training arguments that have an option of their own here, under the name of that option.
OPTIONS = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "seed": "seed",
    "output_dir": "out",
}
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
    "batch_eval_metrics": "the task's metric is over all rows at once",
    "prediction_loss_only": "the task's metric needs the predictions",
    "dataloader_drop_last": "rows would be left out of the metric, too",
    "label_names": "the task says what the labels are",
    "deepspeed": "weights must be whole in every process",
    "fsdp": "weights must be whole in every process",
    "fsdp_config": "weights must be whole in every process",
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
            if value is not None and not 0 < value <= sys.float_info.max:
                raise UnmaskError(f"{name}={value}; it must be above 0, and finite")
        if not 0 <= self.seed < 2**32:
            raise UnmaskError(f"seed={self.seed}; a seed is from 0 to {2**32 - 1}")
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
        hints = _hints(cls)
        for name, value in described.items():
            if not fits(value, hints[name]):
                raise UnmaskError(
                    f"the config has {name}={value!r}, which can't be; put back what "
                    "`unmask train` wrote, or start the run anew"
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


def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _near(key: str, allowed: set[str]) -> str:
    near = get_close_matches(key, sorted(allowed), 3)
    return f"did you mean {' or '.join(near)}? " if near else ""
