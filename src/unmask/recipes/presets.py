"""Defaults, said once: the paper's Table 7 for its tasks, our own for the embedded demo."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from unmask import methods
from unmask.recipes.tasks import Task

Budget = int | float  # scalars, or a share of the eligible ones

BUDGET = 38_000  # 0.17 % of the embedded model, the share of the paper's 320K of 184M

PAPER_BATCH_SIZE = 16  # Table 7a, NLU

LEARNING_RATE = 1e-3
FULL_LEARNING_RATE = 5e-5


def budget(method: str) -> Budget:
    """All that is eligible where the method says so by itself (bitfit, full)."""
    build = getattr(methods, method, None) if method in methods.__all__ else None
    own: Any = inspect.signature(build).parameters["budget"].default if build else BUDGET
    chosen: Budget = BUDGET if own is inspect.Parameter.empty else own
    return chosen


def learning_rate(method: str) -> float:
    """A rate that works for the method on small encoders; the dense one needs it lower."""
    return FULL_LEARNING_RATE if method == "full" else LEARNING_RATE


def training(task: Task) -> dict[str, Any]:
    """What transformers.TrainingArguments get unless --set says otherwise."""
    return {
        "warmup_steps": 0.06,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "logging_steps": 5,
        "eval_strategy": "steps" if task.eval_steps else "no",
        "eval_steps": task.eval_steps,
        "per_device_eval_batch_size": 64,
        # A checkpoint is O(budget), a fifth of the run is what a kill may cost.
        "save_strategy": "steps",
        "save_steps": 0.2,
        "save_total_limit": 2,
        "metric_for_best_model": task.metric,
        "greater_is_better": True,
        "train_sampling_strategy": "group_by_length",
        "report_to": "none",
        "dataloader_pin_memory": False,
    }


def fitted(task: Task, epochs: float | None, max_length: int | None) -> Task:
    """The task with the lengths that the user asked for."""
    return replace(
        task,
        epochs=task.epochs if epochs is None else epochs,
        max_length=task.max_length if max_length is None else max_length,
    )
