"""One run put together: data, model, tuner, trainer; measure, keep, report."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch.utils.data import DataLoader

import unmask
from unmask import Delta, Method, UnmaskError, attach
from unmask.delta import fingerprint
from unmask.integrations.transformers import UnmaskCallback
from unmask.recipes import choose, models, wrappers
from unmask.recipes.arguments import arguments, explained
from unmask.recipes.config import RunConfig
from unmask.recipes.data import Data
from unmask.recipes.folder import PROGRESS, RunFolder, whole_folder
from unmask.recipes.progress import ProgressBar
from unmask.recipes.trainer import Ranks, Recorder, RunTrainer, Start


class Session:
    """The parts of a run, made from its config; nothing is written until a step is taken."""

    def __init__(self, config: RunConfig, folder: RunFolder, source: Data) -> None:
        self.config, self.folder, self.source = config, folder, source
        self.task = source.task
        self.arguments = arguments(config, source.task, str(folder.path))
        self.loaded = models.load(config.model, self.task, config.seed)
        model = self.loaded.model.to(self.arguments.device)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.inside = config.peft and wrappers.wrap(config.peft, model, self._steps())
        self.seconds = 0.0  # of training, in all the run's processes
        self.before = 0.0

    def attach(self, method: Method) -> None:
        """Let the method choose among the pretrained weights, and train the new head whole."""
        config, head = self.config, self.loaded.head
        self.head_only = config.method == choose.HEAD
        if self.head_only and not head:
            raise UnmaskError(
                f"--method {choose.HEAD} trains a new head, but {config.model!r} has one; "
                "give a model without a head for this task, or another method"
            )
        self.tuner = attach(
            self.loaded.model,
            method,
            include=head if self.head_only else config.include,
            exclude=config.exclude,
            train_fully=() if self.head_only else head,
            calibration=self._batches(),
        )
        if hasattr(self.inside, "update_and_allocate"):
            wrappers.check_ranked(self.loaded.model)
        with explained(config):
            kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(self.arguments)
            options |= {"lr": config.lr, "weight_decay": self.arguments.weight_decay}
            self.optimizer = self.tuner.optimizer(kind, **options)

    def begin(
        self, checkpoint: Path | None, console: Console | None, claim: Callable[[], None]
    ) -> None:
        """Make the trainer, to go on from the checkpoint if there is one; `claim` is called when
        the first step is taken."""
        self.checkpoint = None if checkpoint is None else str(checkpoint)
        self.start = Start(claim)
        self.bar = ProgressBar(self.tuner, console) if console else None
        recorder = Recorder(self.tuner, self.config.save_at, self.measure, self.keep_level)
        callbacks: list[Any] = [self.start, UnmaskCallback(self.tuner)]
        if hasattr(self.inside, "update_and_allocate"):  # before the recorder looks
            callbacks.append(Ranks(self.inside, self.tuner, self.optimizer))
        callbacks += [recorder, *([self.bar] if self.bar else [])]
        with explained(self.config):
            self.trainer = self._trainer(optimizers=(self.optimizer, None), callbacks=callbacks)
            if self.checkpoint is None:
                self.before = self.measure()[0]
        if self.checkpoint is not None:
            done = RunFolder(Path(self.checkpoint)).read(PROGRESS)
            self.before, self.seconds = done["before"], done["train_seconds"]
            recorder.resume(done)
        self.recorder = recorder

    def train(self) -> None:
        """Take all steps that are left."""
        self._clock = time.perf_counter()
        try:
            with explained(self.config, unless=lambda: self.start.done):
                self.trainer.train(resume_from_checkpoint=self.checkpoint)
        finally:
            if self.bar:
                self.bar.close()
        self.seconds = self._elapsed()

    def measure(self) -> tuple[float, dict[str, float]]:
        """The task's metric on its first validation part, and on each by name."""
        if not hasattr(self, "trainer"):
            self.trainer = self._trainer()
        values = {}
        for part, rows in self._encoded.items():
            # Not evaluate(), which would answer the trainer's own call for it, due at this step.
            found = self.trainer.predict(rows).metrics or {}
            values[part] = float(found[f"test_{self.task.metric}"])
        return next(iter(values.values())), values

    def keep(self, path: Path) -> Delta:
        """Store what the run has changed so far."""
        delta = self.delta()
        with whole_folder(path) as staging:
            delta.save(staging)
        return delta

    def keep_level(self, share: float) -> None:
        """Store the delta of one level of the series."""
        self.keep(self.folder.series(share))

    def delta(self) -> Delta:
        """The tuner's delta, with what it takes to build the same model around it again."""
        delta = self.tuner.delta()
        if self.head_only:
            # The head was the eligible part here; it is no change to the pretrained model.
            trained = dict(self.loaded.model.named_parameters())
            delta = Delta({}, {n: trained[n] for n in self.loaded.head}, base=fingerprint({}))
        info: dict[str, Any] = {
            "base_model_name_or_path": self.config.model,
            "task": self.task.name,
            "head": models.described(self.loaded.model),
        }
        if self.config.peft is not None:
            info["peft"] = self.config.peft
        return replace(delta, info={**delta.info, **info})

    def report(self, delta: Delta) -> dict[str, Any]:
        """Everything a run is worth knowing for, as plain JSON."""
        value, values = self.measure()
        config, key = self.config, f"eval_{self.task.metric}"
        head = sum(delta.full[name].numel() for name in self.loaded.head)
        budget = 0 if self.head_only else self.tuner.budget
        return {
            "task": self.task.name,
            "model": config.model,
            "method": config.method,
            "peft": config.peft,
            "budget": budget,
            "active": 0 if self.head_only else self.tuner.active,
            "trainable": budget + head,
            "head": head,
            "parameters": self.parameters,
            "metric": self.task.metric,
            "before": self.before,
            "value": value,
            "values": values,
            "best": max([value, *(h[key] for h in self.recorder.history if key in h)]),
            "steps": self.trainer.state.global_step,
            "updates": 0 if self.head_only else self.tuner.updates,
            "seed": config.seed,
            "lr": config.lr,
            "batch_size": config.batch_size,
            "train_rows": len(self.source.train),
            "validation_rows": {part: len(rows) for part, rows in self.source.validation.items()},
            "train_seconds": self.seconds,
            "peak_memory_bytes": peak_memory(),
            "delta_bytes": sum(f.stat().st_size for f in self.folder.delta.iterdir()),
            "model_bytes": self.model_bytes,
            "device": str(self.trainer.args.device),
            "versions": {
                "unmask": unmask.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "series": self.recorder.series,
            "history": self.recorder.history,
        }

    def progress(self) -> dict[str, Any]:
        """What the run has measured so far, for its checkpoints."""
        return {
            "before": self.before,
            "train_seconds": self._elapsed(),
            "history": self.recorder.history,
            "series": self.recorder.series,
        }

    def _steps(self) -> int:
        """Optimiser steps of the run, as the trainer will count them."""
        asked = self.arguments
        if asked.max_steps > 0:
            return asked.max_steps
        batches = math.ceil(len(self.source.train) / asked.train_batch_size)
        epoch = max(1, math.ceil(batches / asked.gradient_accumulation_steps))
        return math.ceil(asked.num_train_epochs * epoch)

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._clock

    def _trainer(self, **options: Any) -> RunTrainer:
        rows = self.source.train if "callbacks" in options else self.source.train[:1]
        return RunTrainer(
            self.folder,
            self.progress,
            model=self.loaded.model,
            args=self.arguments,
            processing_class=self.loaded.tokenizer,
            train_dataset=models.encode(self.loaded, self.task, rows),
            eval_dataset=self._encoded[next(iter(self._encoded))],
            compute_metrics=self._compute_metrics,
            **options,
        )

    def _batches(self) -> DataLoader[Any]:
        """The training rows in their own order, for methods that look at data before training."""
        return DataLoader(
            models.encode(self.loaded, self.task, self.source.train),  # type: ignore[arg-type]
            batch_size=self.config.batch_size,
            collate_fn=transformers.DataCollatorWithPadding(self.loaded.tokenizer),
        )

    @cached_property
    def _encoded(self) -> dict[str, Any]:
        """The validation parts, short rows first: less padding, the same metric."""
        parts = self.source.validation.items()
        encoded = {part: models.encode(self.loaded, self.task, rows) for part, rows in parts}
        return {p: sorted(rows, key=lambda r: len(r["input_ids"])) for p, rows in encoded.items()}

    def _compute_metrics(self, predicted: Any) -> dict[str, float]:
        return {self.task.metric: self.task.score(predicted.predictions, predicted.label_ids)}


def peak_memory() -> int:
    """The most memory that this process held: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
