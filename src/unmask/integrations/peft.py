"""`UnmaskConfig`: selective fine-tuning as a method of PEFT, with all that PEFT does around it.

>>> from peft import get_peft_model
>>> model = get_peft_model(
...     torch.nn.Sequential(torch.nn.Linear(8, 8)), UnmaskConfig(budget=6, steps=3)
... )
>>> model.print_trainable_parameters()
trainable params: 6 || all params: 78 || trainable%: 7.6923

The adapter's scalars are the model's own: no layer is wrapped, and the base's weights require no
gradient, so an optimiser that anyone makes of the trainable parameters holds one short vector.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import merge_utils
from torch import Tensor, nn

import unmask
from unmask import methods
from unmask.delta import Delta
from unmask.errors import UnmaskError
from unmask.integrations import peft_registration, peft_targets
from unmask.integrations.peft_layer import NAME, SparseAdapters
from unmask.integrations.peft_run import loop_ended
from unmask.method import INNER, decode, encode

__all__ = ["UnmaskConfig", "UnmaskModel"]


@dataclass
class UnmaskConfig(PeftConfig):
    """Train the `budget` scalars of the targeted modules that `method` chooses.

    budget          scalars, or a share in (0, 1] of the eligible ones
    method          a name from `unmask` ("id3", "pafi", ...), or an `unmask.Method`
    method_kwargs   its parameters: {"exp": 1.0, "schedule": unmask.Strided(every=10)}
    steps           optimiser steps of the schedule; a transformers Trainer fills it in
    target_modules  names, a regular expression, "all-linear", or None for the whole model; a module
                    stands for all parameters in it, biases, norms and embeddings included
    exclude_modules, modules_to_save, layers_to_transform, layers_pattern  as in LoraConfig
    gradients       "streaming": each weight's gradient is consumed and freed as backward produces
                    it wherever accelerate (a Trainer) says that the pass ends a step; "dense": at
                    the step
    retired         set when saving: scalars that were trained once and aren't any more
    """

    budget: int | float | None = None
    method: Any = "id3"
    method_kwargs: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    gradients: str = "streaming"
    retired: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.method, unmask.Method):
            self.method = self.method.to_dict()
        if isinstance(self.method, Mapping):
            self.budget = self.method["budget"] if self.budget is None else self.budget
            self.method = {**self.method, "budget": self.budget}
        self.method_kwargs = {k: encode(v) for k, v in self.method_kwargs.items()}
        if self.gradients not in ("streaming", "dense"):
            raise UnmaskError(
                f"gradients={self.gradients!r}; in an UnmaskConfig it is one of streaming, dense "
                "('sampled' is unmask.attach()'s)"
            )
        self.build()

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """PEFT's way from a file to a config; what an `unmask.Delta` wrote is another matter."""
        if "checksum" in kwargs and "layout" in kwargs:
            raise UnmaskError(
                "this folder holds an unmask.Delta, not a PEFT adapter; apply it with "
                "unmask.Delta.load(folder).apply(model)"
            )
        return super().from_peft_type(**kwargs)  # type: ignore[no-untyped-call]

    def build(self) -> unmask.Method:
        """The method that this describes."""
        if isinstance(self.method, Mapping):
            return unmask.Method.from_dict(self.method)
        if self.method not in methods.__all__:
            raise UnmaskError(
                f"method={self.method!r}; there are {', '.join(sorted(methods.__all__))}, "
                "and any unmask.Method(...)"
            )
        make = getattr(methods, self.method)
        asked = dict(self.method_kwargs)
        if self.budget is not None:
            asked["budget"] = self.budget
        try:
            method: unmask.Method = make(**{k: decode(v, *INNER) for k, v in asked.items()})
        except TypeError as problem:
            raise UnmaskError(
                f"{self.method}{inspect.signature(make)} was given {asked}: {problem}; give "
                "UnmaskConfig(budget=..., method_kwargs={...})"
            ) from problem
        return method


class UnmaskModel(BaseTuner):
    """What PEFT puts around the model: it finds the targets, the adapters do the rest."""

    prefix = "unmask_"
    tuner_layer_cls = SparseAdapters

    @property
    def adapters(self) -> SparseAdapters:
        """All sparse adapters of the model."""
        layer = getattr(self.model, NAME)
        assert isinstance(layer, SparseAdapters)
        return layer

    def delta(self, adapter_name: str = "default") -> Delta:
        """An adapter as an `unmask.Delta`, which needs no PEFT to be applied to the base."""
        return self.adapters.delta(adapter_name)

    def calibrate(self, batches: Iterable[Any], adapter_name: str = "default") -> None:
        """Give the batches that the method looks at before training (`fish`)."""
        self.adapters.batches[adapter_name] = batches

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
        **_: Any,
    ) -> None:
        """A new adapter: the weighted sum of what the others change, or PEFT's other ways to merge.

        "linear", "cat" and "svd" are one and the same here, the exact sum: nothing has a rank.
        """
        index, values = self._combined(
            adapters, weights, combination_type, density, majority_sign_method
        )
        first: Any = self.peft_config[adapters[0]]
        config = dataclasses.replace(first, budget=max(1, len(index)), retired=0)
        if adapter_name in self.peft_config:
            raise UnmaskError(f"there is an adapter {adapter_name!r} already; delete it first")
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        self.adapters.set_content(adapter_name, index, values)

    def _combined(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        combination: str,
        density: float | None,
        sign: str,
    ) -> tuple[Tensor, Tensor]:
        if unknown := set(names) - self.peft_config.keys():
            raise UnmaskError(
                f"there is no adapter {min(unknown)!r}; there are {[*self.peft_config]}"
            )
        if len(names) != len(weights) or not names:
            raise UnmaskError(
                f"{len(names)} adapters and {len(weights)} weights; give one for each"
            )
        index, changes, base = self.adapters.changes(names)
        factors = torch.tensor(weights, dtype=base.dtype, device=base.device)
        if combination in ("linear", "cat", "svd"):
            change = merge_utils.task_arithmetic(changes, factors)
        elif combination in ("ties", "dare_ties") and density is not None:
            merge = getattr(merge_utils, combination)
            change = merge(changes, factors, density, sign)
        elif combination in ("magnitude_prune", "dare_linear") and density is not None:
            change = getattr(merge_utils, combination)(changes, factors, density)
        else:
            raise UnmaskError(
                f"combination_type={combination!r}, density={density}; it is linear, or one of "
                "ties, dare_ties, dare_linear, magnitude_prune with a density in (0, 1)"
            )
        return index, base + change

    # What PEFT asks of a tuner.

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config: Any = self.peft_config[adapter_name]
        method = config.build()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        eligible = peft_targets.find(config, model, own=NAME)
        fresh = not hasattr(model, NAME)
        if fresh:
            model.add_module(NAME, SparseAdapters(model))
        active = adapter_name in self.active_adapters
        layer = getattr(model, NAME)
        layer.create(adapter_name, config, eligible, active and not config.inference_mode)
        if fresh:
            layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        asks = method.strategy.needs_steps and config.steps is None
        if (asks or config.gradients == "streaming") and not config.inference_mode:
            _listen_to_trainers()

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return peft_targets.verdict(peft_config, key)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is replaced."""

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, SparseAdapters):
            delattr(parent, child_name)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """A tied weight is one tensor, and its scalars are chosen once."""

    def _check_merge_allowed(self) -> None:
        """Merging writes into the model's own weights, tied or not."""

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(*args, **kwargs)
        return {key: tensor for key, tensor in found.items() if cls.prefix in key}


def _listen_to_trainers() -> None:
    """Have every transformers Trainer made from now on tell sparse adapters its number of steps,
    and when it has ended."""
    try:
        from transformers import TrainerCallback, trainer
    except (ImportError, RuntimeError):  # no trainer, so no need
        return
    if any(callback.__name__ == "TellSteps" for callback in trainer.DEFAULT_CALLBACKS):
        return

    class TellSteps(TrainerCallback):
        """The number of optimiser steps, for schedules that end with training; and that end."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for module in kwargs["model"].modules():
                if isinstance(module, SparseAdapters):
                    module.horizon = state.max_steps

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            loop_ended()

    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    callbacks.append(TellSteps)


PEFT_TYPE = peft_registration.register(NAME, UnmaskConfig, UnmaskModel, UnmaskModel.prefix)
