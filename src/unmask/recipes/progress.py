"""One line that moves: step, loss, unmasked scalars, time gone and time left."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from unmask import Tuner
from unmask.integrations.transformers import training_loss


class ProgressBar(TrainerCallback):
    """Draws the run on a rich console; without a terminal it says a line every tenth of the run."""

    def __init__(self, tuner: Tuner, console: Console) -> None:
        self.tuner, self.console = tuner, console
        self.loss = "-"
        self.due = 0
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start drawing, at the step where the run stands."""
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("unmasked {task.fields[active]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bar.start()
        self.row = self.bar.add_task(
            "", total=state.max_steps, completed=state.global_step, loss=self.loss, active="0"
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Remember the newest loss; without a terminal, say where the run stands."""
        if (loss := training_loss(logs)) is None:
            return
        self.loss = f"{loss:.3f}"
        if self.bar is None and state.global_step >= self.due:
            self.due = state.global_step + max(1, state.max_steps // 10)
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  loss {self.loss}  "
                f"unmasked {self.tuner.active:,}",
                highlight=False,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move on by a step."""
        if self.bar is not None:
            active = f"{self.tuner.active:,}"
            self.bar.update(self.row, completed=state.global_step, loss=self.loss, active=active)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the finished bar standing."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
