"""The training of one sparse adapter inside PEFT, by a loop and an optimiser that don't know of it.

Only the vector requires a gradient for all to see. The weights that it is chosen from require one
during a forward pass, so that they are part of the graph, and during backward, so that their
gradients arrive, are consumed, and are gone: no one ever finds a `.grad` in them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from unmask.eligible import Eligible
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.processes import check_whole, wrapper
from unmask.tuner import Tuner, Values


class Run:
    """A tuner whose vector is an adapter's, and whose optimiser is anyone's."""

    def __init__(
        self,
        name: str,
        root: nn.Module,
        config: Any,
        eligible: Eligible,
        vector: Values,
        batches: Iterable[Any] | None,
        steps: int | None,
        slots: Mapping[str, Tensor],
    ) -> None:
        method = config.build()
        chosen = method.strategy.once and len(slots["index"]) == len(vector)
        self.name, self.eligible, self.streaming = name, eligible, config.gradients == "streaming"
        self._open = False  # whether a backward pass is under way
        self.require(True)  # as hooks ask
        try:
            self.tuner = Tuner(
                root, method, steps, eligible, {}, batches, "streaming", None, vector, chosen
            )
            for tensor in eligible.tensors:
                self.tuner.on_detach(tensor.register_hook(self._arriving).remove)
        finally:
            self.require(False)

    def enter(self) -> None:
        """A forward pass begins, of which there will be a backward pass."""
        if wrapper() is not None:
            raise UnmaskError(
                "an UnmaskConfig consumes gradients before DistributedDataParallel averages them "
                "over the processes; with several, use unmask.attach() on the plain model, and "
                "wrap that"
            )
        check_whole(self.tuner.model, self.eligible.tensors)
        self.tuner.last_pass(self.streaming and _last())
        self.require(True)

    def leave(self, output: Any) -> None:
        """It has ended."""
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._arriving)
        self.require(False)

    def require(self, flag: bool) -> None:
        """Whether the weights require a gradient."""
        for tensor in self.eligible.tensors:
            tensor.requires_grad_(flag)

    def _arriving(self, _: Tensor) -> None:
        """A gradient is on its way to the weights, or to one of them."""
        if not self._open:
            self._open = True
            self.require(True)
            Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._open = False
        self.require(False)

    def take_up(self, slots: Mapping[str, Tensor], progress: Tensor) -> None:
        """Go on where a run stood that left these."""
        step, updates, handed_out = progress.tolist()
        state = {**self.tuner.state_dict(), "step": step, "updates": updates}
        state["slots"] = {**slots, "handed_out": torch.tensor(handed_out)}
        self.tuner.load_state_dict(state)
        method = self.tuner.method
        done = method.strategy.once and self.tuner.active >= self.tuner.budget
        if not done and any(map(method.heuristic.watches, range(1, step + 1))):
            warnings.warn(
                f"adapter {self.name!r} goes on without what {type(method.heuristic).__name__} "
                f"remembers of its {step} steps so far: an adapter doesn't hold that; "
                "unmask.attach() and tuner.state_dict() do",
                UnmaskWarning,
                stacklevel=2,
            )

    def progress(self) -> Tensor:
        """How far it has come."""
        handed_out = self.tuner.slots.handed_out
        return torch.tensor([self.tuner.step, self.tuner.updates, handed_out])


_left: list[weakref.ref[Any]] = []  # the data loader of the last loop that has ended


def loop_ended() -> None:
    """A Trainer has ended, perhaps within an epoch: accelerate doesn't notice that."""
    loader = _open_loader()
    _left[:] = [] if loader is None else [weakref.ref(loader)]


def _last() -> bool:
    """Whether accelerate, if it runs the loop, says that the pass under way ends a step."""
    loader = _open_loader()
    if loader is None or any(loader is left() for left in _left):
        return False
    from accelerate.state import GradientState

    return bool(GradientState().sync_gradients)


def _open_loader() -> Any:
    """The data loader that accelerate, if anyone asked it to, believes to be in the middle of."""
    try:
        from accelerate.state import GradientState
    except ImportError:
        return None
    return GradientState().active_dataloader if GradientState._shared_state else None


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in whatever a forward returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
    elif is_dataclass(output):
        yield from _tensors(list(vars(output).values()))
