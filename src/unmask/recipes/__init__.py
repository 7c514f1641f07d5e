"""Whole runs: real models on real labelled text, as a Python function each.

from unmask.recipes import RunConfig, train
metrics = train(RunConfig(task="rte", data_dir="data", budget=38_000, out="runs/rte"))
"""

from unmask.recipes.config import RunConfig
from unmask.recipes.run import evaluate, saved, train
from unmask.recipes.tasks import Task

__all__ = ["RunConfig", "Task", "evaluate", "saved", "train"]
