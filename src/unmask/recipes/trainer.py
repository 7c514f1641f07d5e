"""transformers.Trainer with three promises: whole checkpoints, a data order that depends on seed
and epoch alone, and measurements that leave no trace in the run."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from unmask import Tuner
from unmask.integrations.transformers import training_loss
from unmask.recipes.folder import PROGRESS, RunFolder, whole_folder, write_json
from unmask.recipes.manifest import MANIFEST, manifest


class RunTrainer(transformers.Trainer):
    """A stock Trainer but for how it saves, orders and measures.

    progress   what the run has measured so far; goes into every checkpoint
    """

    def __init__(
        self, folder: RunFolder, progress: Callable[[], dict[str, Any]], **options: Any
    ) -> None:
        self.folder, self.progress = folder, progress
        self._staging: Path | None = None
        existed = folder.path.exists()
        super().__init__(**options)
        if not existed:  # the trainer makes it at once, a run with its first step
            with contextlib.suppress(OSError):  # only one of several processes can
                folder.path.rmdir()
        self.remove_callback(transformers.PrinterCallback)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """All files of a checkpoint under a temporary name, flushed, then renamed: a kill leaves
        whole checkpoints only."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final = self.folder.path / name
        before = self.state.best_model_checkpoint
        with whole_folder(final) as staging:
            # The trainer appends the checkpoint's name to the output folder.
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            for part in (inner := staging / name).iterdir():
                part.rename(staging / part.name)
            inner.rmdir()
            if self.state.best_global_step == self.state.global_step:
                before = str(final.resolve())
            self.state.best_model_checkpoint = before
            self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
            write_json(staging / PROGRESS, self.progress())
            write_json(staging / MANIFEST, manifest(staging))
        self.folder.rotate(final, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The delta only: the tokenizer is the base model's, the arguments stand in config.json."""
        model: Any = self.model
        model.save_pretrained(output_dir or self.args.output_dir)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        lengths = [len(row["input_ids"]) for row in rows]
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGrouped(lengths, size, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        return SequentialSampler(eval_dataset)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Measure; the run's random state stays as it was."""
        with random_state_kept():
            return super().evaluation_loop(*args, **options)


class LengthGrouped(Sampler[int]):
    """Row numbers such that a batch holds rows of like length, in an order that is a function of
    seed and epoch: shuffle, sort within every 16 batches, shuffle the batches."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        shuffle = random.Random(f"{self.seed} {self.epoch}")
        rows = list(range(len(self.lengths)))
        shuffle.shuffle(rows)
        size, pool = self.batch_size, 16 * self.batch_size
        cut = math.floor(len(rows) / size) * size  # the rows of a last, short batch stay last
        batches = []
        for start in range(0, cut, pool):
            alike = sorted(rows[start : min(start + pool, cut)], key=self.lengths.__getitem__)
            batches += [alike[i : i + size] for i in range(0, len(alike), size)]
        shuffle.shuffle(batches)
        return iter([row for batch in batches for row in batch] + rows[cut:])


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn within, the generators go on as if nothing had been."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class Start(transformers.TrainerCallback):
    """Calls `begin` once, after the first step: till then a run may turn out not to work.

    done   whether that step has been taken
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin, self.done = begin, False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before anything of this step is kept."""
        if not self.done:
            self.begin()
            self.done = True


class Recorder(transformers.TrainerCallback):
    """What a run measured on its way: the curve, and the series of deltas along the budget.

    levels   shares of the budget still to come, rising
    measure  gives the metric now, first
    keep     called with a level's share, stores the delta
    """

    def __init__(
        self,
        tuner: Tuner,
        levels: Sequence[float],
        measure: Callable[[], tuple[float, dict[str, float]]],
        keep: Callable[[float], None],
    ) -> None:
        self.tuner, self.measure, self.keep = tuner, measure, keep
        self.levels = sorted(levels)
        self.history: list[dict[str, Any]] = []
        self.series: list[dict[str, Any]] = []

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from what a checkpoint had recorded."""
        self.history, self.series = progress["history"], progress["series"]
        done = {entry["share"] for entry in self.series}
        self.levels = [level for level in self.levels if level not in done]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Note losses and metrics with the step and the scalars unmasked at it."""
        kept = {k: v for k, v in (logs or {}).items() if k.startswith("eval_")}
        if (loss := training_loss(logs)) is not None:
            kept["loss"] = loss
        noise = ("runtime", "per_second", "preparation_time")
        kept = {k: v for k, v in kept.items() if not k.endswith(noise)}
        if kept:
            active = {"step": state.global_step, "active": self.tuner.active}
            self.history.append(active | kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep a delta for each level that this step has reached."""
        while self.levels and self.tuner.active >= round(self.levels[0] * self.tuner.budget):
            share = self.levels.pop(0)
            self.keep(share)
            self.series.append(
                {
                    "share": share,
                    "step": state.global_step,
                    "active": self.tuner.active,
                    "value": self.measure()[0],
                }
            )


class Ranks(transformers.TrainerCallback):
    """AdaLoRA's own part of a step: ranks move between layers, and a checkpoint remembers how.

    adalora  PEFT's tuner
    """

    KEPT = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    def __init__(self, adalora: Any, tuner: Tuner, optimizer: torch.optim.Optimizer) -> None:
        self.adalora, self.tuner = adalora, tuner
        self.config = adalora.peft_config["default"]
        optimizer.register_state_dict_post_hook(self._add)
        optimizer.register_load_state_dict_pre_hook(self._take)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Prune by the gradients at hand; what is pruned is so for the tuner, too."""
        self.adalora.update_and_allocate(state.global_step + 1)
        self.tuner.reread()

    def _add(self, _: Any, state: dict[str, Any]) -> None:
        kept = {name: dict(getattr(self.adalora.rankallocator, name)) for name in self.KEPT}
        state["ranks"] = {**kept, "pattern": self.config.rank_pattern}

    def _take(self, _: Any, state: dict[str, Any]) -> None:
        if (ranks := state.pop("ranks", None)) is not None:
            self.config.rank_pattern = ranks["pattern"]
            for name in self.KEPT:
                setattr(self.adalora.rankallocator, name, ranks[name])
