"""UnmaskCallback: a stock `transformers.Trainer` trains, clips, saves and resumes selectively."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from unmask.delta import Delta, Sparse
from unmask.errors import UnmaskError
from unmask.processes import wrapper
from unmask.tuner import Tuner


class UnmaskCallback(TrainerCallback):
    """Makes a stock Trainer treat a selective run as what it is:

    - `tuner.steps`, if left out, is the trainer's number of optimiser steps;
    - `max_grad_norm` and the logged norm are over what is trained, not over the dense gradient;
    - logged losses are reported to the tuner, for schedules that go by them (`Plateau`);
    - a save writes the delta and an O(budget) optimiser file, not the model, until `detach()`;
    - `resume_from_checkpoint` and `load_best_model_at_end` read those back, on a fresh base too.

    Pass it with the tuner's optimiser: `Trainer(model, args, ..., optimizers=(optimizer, None),
    callbacks=[UnmaskCallback(tuner)])`.
    """

    def __init__(self, tuner: Tuner) -> None:
        if not isinstance(tuner, Tuner):
            raise UnmaskError(
                f"UnmaskCallback was given {tuner!r}; give the tuner that attach() returned"
            )
        self.tuner = tuner
        self._wrapper: nn.Module | None = None  # that the trainer has put around the model
        tuner.on_optimizer(lambda optimizer: _carry_state(tuner, optimizer))
        _speak_delta(tuner, tuner.model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the trainer drives this tuner, and tell the tuner for how long."""
        groups = kwargs["optimizer"].param_groups
        if not any(p is self.tuner.slots.values for group in groups for p in group["params"]):
            raise UnmaskError(
                "the trainer's optimiser isn't the tuner's; pass "
                "Trainer(..., optimizers=(tuner.optimizer(torch.optim.AdamW, lr=...), None))"
            )
        if self.tuner.steps is None:
            self.tuner.steps = state.max_steps
        self.tuner.on_detach(partial(self._show_all, kwargs["model"]))
        if args.world_size > 1:  # the trainer then asks the wrapper for parameters

            def follow(model: nn.Module, _: Any) -> None:
                if "parameters" in vars(model) and (ddp := wrapper()) is not None:
                    self._wrapper = ddp
                    ddp.__dict__["parameters"] = vars(model)["parameters"]

            self.tuner.on_detach(self.tuner.model.register_forward_pre_hook(follow).remove)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Until the optimiser has stepped, the trainer clips and measures what is trained."""
        trained = [self.tuner.slots.values, *self.tuner.full.values()]

        def parameters(recurse: bool = True) -> Iterator[Tensor]:
            return iter(trained)

        kwargs["model"].__dict__["parameters"] = parameters

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model's parameters are all its parameters again."""
        self._show_all(kwargs["model"])

    def _show_all(self, model: nn.Module) -> None:
        for module in (model, self._wrapper):
            if module is not None:
                module.__dict__.pop("parameters", None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where losses count, report before a save: what a checkpoint holds is then all of them."""
        if control.should_save and self.tuner.method.strategy.hear((), 0.0):
            control.should_log = True

    on_epoch_end = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the tuner the training loss, the mean since the last log."""
        if (loss := training_loss(logs)) is not None:
            self.tuner.report(loss)


def training_loss(logs: Mapping[str, Any] | None) -> float | None:
    """The loss in a trainer's log, if it has one; it may be written out, "0.25"."""
    try:
        return float((logs or {})["loss"])
    except (KeyError, TypeError, ValueError):
        return None


def _speak_delta(tuner: Tuner, model: nn.Module) -> None:
    """Until the tuner detaches, the model saves and loads what is trained, not itself."""
    load = model.load_state_dict

    def save_pretrained(save_directory: str | os.PathLike[str], *_: Any, **options: Any) -> None:
        if options.get("is_main_process", True):
            delta = tuner.delta()
            delta.save(save_directory)
            # Under the name, too, by which a trainer looks for weights to resume from.
            safetensors.torch.save_file(_as_state(delta), Path(save_directory) / SAFE_WEIGHTS_NAME)

    def load_state_dict(state: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        if BASE not in state:
            return load(state, *args, **options)
        tuner.adopt(_from_state(state, dict(model.named_parameters())))
        return _IncompatibleKeys([], [])

    for replacement in (save_pretrained, load_state_dict):
        model.__dict__[replacement.__name__] = replacement
        tuner.on_detach(partial(model.__dict__.pop, replacement.__name__, None))


def _carry_state(tuner: Tuner, optimizer: torch.optim.Optimizer) -> None:
    """Keep the tuner's state in the optimiser's, the only one that a trainer saves and loads."""

    def add(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state["unmask"] = tuner.state_dict()

    def take(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if (own := state.pop("unmask", None)) is not None:
            tuner.load_state_dict(own)

    tuner.on_detach(optimizer.register_state_dict_post_hook(add).remove)
    tuner.on_detach(optimizer.register_load_state_dict_pre_hook(take).remove)


BASE = "unmask.base"  # marks a state dict as a delta's; holds the fingerprint's 32 bytes


def _as_state(delta: Delta) -> dict[str, Tensor]:
    """A delta as a flat dict of tensors, the form in which a trainer passes weights around."""
    state = {BASE: torch.tensor(list(bytes.fromhex(delta.base)), dtype=torch.uint8)}
    for name, part in delta.sparse.items():
        state |= {f"indices.{name}": part.indices, f"values.{name}": part.values}
    state |= {f"full.{name}": tensor for name, tensor in delta.full.items()}
    return state | {f"buffers.{name}": tensor for name, tensor in delta.buffers.items()}


def _from_state(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Delta:
    groups: dict[str, dict[str, Tensor]] = {"indices": {}, "values": {}, "full": {}, "buffers": {}}
    for key, tensor in state.items():
        if key != BASE:
            group, _, name = key.partition(".")
            groups[group][name] = tensor
    if unknown := groups["indices"].keys() - parameters.keys():
        raise UnmaskError(f"the checkpoint changes {min(unknown)!r}, which this model doesn't have")
    sparse = {
        name: Sparse(tuple(parameters[name].shape), index, groups["values"][name])
        for name, index in groups["indices"].items()
    }
    base = bytes(state[BASE].tolist()).hex()
    return Delta(sparse, groups["full"], groups["buffers"], base=base)
