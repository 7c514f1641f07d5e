"""The trainer's arguments: ours, then what the user set; what doesn't work with them, in words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import transformers

from unmask import UnmaskError
from unmask.recipes import presets
from unmask.recipes.config import METHOD_PARTS, RunConfig
from unmask.recipes.tasks import Task


def arguments(config: RunConfig, task: Task, folder: str) -> transformers.TrainingArguments:
    """What transformers.Trainer gets."""
    # Said outright, else the arguments refuse bf16 on a machine without an accelerator.
    defaults = presets.training(task) | {"use_cpu": not torch.accelerator.is_available()}
    chosen = config.training(defaults)
    with explained(config):
        made = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=task.epochs,
            per_device_train_batch_size=config.batch_size,
            learning_rate=float(config.lr or 0),
            seed=config.seed,
            disable_tqdm=True,
            log_level="error",
            **chosen,
        )
    best = made.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in (task.metric, "loss"):
        raise UnmaskError(
            f"--set metric_for_best_model={best}: task {task.name!r} is measured by {task.metric} "
            "and loss; give one of them"
        )
    return made


@contextlib.contextmanager
def explained(config: RunConfig, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """What fails within while there are training settings is laid to them, in one sentence.

    unless  whether, by then, they have been shown to work
    """
    given = [
        f"{key}={value}"
        for key, value in config.settings.items()
        if key.partition(".")[0] not in METHOD_PARTS
    ]
    try:
        yield
    except (ArithmeticError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as why:
        if isinstance(why, UnmaskError) or not given or unless():
            raise
        said = " ".join(str(why).split()).rstrip(".")
        raise UnmaskError(
            f"the training settings don't fit together: {said}; "
            f"given were --set {' --set '.join(given)}"
        ) from why
