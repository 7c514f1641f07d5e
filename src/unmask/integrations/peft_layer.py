"""`SparseAdapters`: all sparse adapters of one model, one of them in force in its own weights.

Nothing is wrapped. An adapter is which scalars, their values, and what the base has there. Putting
it in force writes the values into the model, taking it out writes the base back, both O(budget): a
forward is the base's own, and the base returns bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from unmask.errors import UnmaskError
from unmask.integrations.peft_run import Run
from unmask.integrations.peft_storage import EMPTY, Storage, write
from unmask.integrations.peft_weights import Weights

NAME = "unmask"  # under which the model holds its adapters
BEGINNING = -1  # no module's id: a method may run the model over data before it trains


class SparseAdapters(Storage, BaseTunerLayer):
    """The adapters of `root`, and which of them are in force."""

    adapter_layer_names = ("unmask_values",)
    other_param_names = (
        "unmask_indices", "unmask_retired", "unmask_progress", "unmask_digest",
        "base", "eligible", "configs", "batches",
    )  # fmt: skip

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.batches: dict[str, Iterable[Any]] = {}  # for methods that look at data first
        self.horizon: int | None = None  # a trainer's number of steps
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._weights = Weights(self)
        self._run: Run | None = None
        self._outermost: int | None = None  # the module whose forward is under way, by id
        self._loading: dict[str, Tensor | None] = {}
        self._root = (root,)  # in a tuple it isn't a submodule
        self._hooks = self._listen(root)

    def forward(self, x: Any = None) -> Any:
        """Nothing: the adapters act through the weights (a Sequential would call this)."""
        return x

    def set_content(self, name: str, index: Tensor, values: Tensor) -> None:
        """Make these sorted scalars, as many as the budget, all of the adapter."""
        self._park()
        self._weights.show(())
        with torch.no_grad():
            self.unmask_values[name].copy_(values)
        self.fill(name, index, values, values[:0], torch.tensor([0, 0, len(index)]))
        self.unmask_digest[name].zero_()
        self.accept(name, None)
        self.sync()

    def delete_adapter(self, adapter_name: str) -> None:
        self._park()
        self._weights.show(())
        super().delete_adapter(adapter_name)
        self.sync()

    # What is in force.

    def sync(self) -> None:
        """Bring the weights in line with what is active, enabled and merged."""
        for name in filter(self.loaded, list(self.eligible)):
            self._park()
            self._weights.forget(name)  # it was empty
            self._weights.show(())
            self.accept(name, None)
        active = [] if self.disable_adapters else self.active_adapters
        wanted = dict.fromkeys([*active, *self.merged_adapters])
        self._weights.show(tuple(name for name in wanted if name in self.eligible))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.sync()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.merged_adapters.clear()
        super().enable_adapters(enabled)
        self.sync()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep the adapters' values in the weights, whatever becomes active, until `unmerge`."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.eligible]
        for name in names:
            if safe_merge and not torch.isfinite(self.content(name).values).all():
                raise ValueError(f"the adapter {name} holds values that aren't finite")
        self.merged_adapters.extend(names)
        self.sync()

    def unmerge(self) -> None:
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.merged_adapters.clear()
        self.sync()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Leave the model with the adapters merged, or as its base was, and let go of it."""
        self._park()
        if merge:
            chosen = self.active_adapters if adapter_names is None else adapter_names
            self.merged_adapters.clear()
            self.merge(safe_merge, list(chosen))
        self._weights.show(tuple(self.merged_adapters) if merge else ())
        for hook in self._hooks:
            hook.remove()
        return nn.Identity()

    # Training.

    def _listen(self, root: nn.Module) -> list[Any]:
        """Hear of forward passes, of the model or one of its larger parts, and of loading."""
        parts = [root, *root.children()]
        parts += [part for child in parts[1:] for part in child.children()]
        hooks: list[Any] = []
        for part in dict.fromkeys(parts):
            hooks.append(part.register_forward_pre_hook(self._enter))
            hooks.append(part.register_forward_hook(self._leave, always_call=True))
        hooks.append(root.register_load_state_dict_pre_hook(self._before_load))
        hooks.append(root.register_load_state_dict_post_hook(self._after_load))
        return hooks

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._outermost is not None:
            return
        self.sync()
        name = self._trainable(module) if torch.is_grad_enabled() else None
        if name is not None:
            if self._run is None or self._run.name != name:
                self._outermost = BEGINNING
                try:
                    self._begin(name)
                finally:
                    self._outermost = None
            assert self._run is not None
            self._outermost = id(module)
            self._run.enter()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) == self._outermost:
            self._outermost = None
            if self._run is not None:
                self._run.leave(output)

    def _trainable(self, module: nn.Module) -> str | None:
        """The adapter that is being trained, if any."""
        shown = self._weights.shown
        names = [name for name in shown if self.unmask_values[name].requires_grad]
        if not names or self.merged_adapters:
            return None
        if len(shown) == 1:
            return names[0]
        if module.training:
            raise UnmaskError(
                f"adapters {', '.join(shown)} are active at once, which works for inference; "
                "to train, set_adapter() the one to be trained"
            )
        return None

    def _begin(self, name: str) -> None:
        """Start the adapter's run, or take it up again where its content says."""
        self._park()
        slots, config = self._as_slots(name), self.configs[name]
        self._run = Run(
            name, self._root[0], config, self.eligible[name], self.vector(name),
            self.batches.get(name), config.steps or self.horizon, slots,
        )  # fmt: skip
        if len(slots["index"]) or len(slots["retired"]):
            self._run.take_up(slots, self.unmask_progress[name])

    def _park(self) -> None:
        """End the run for now; what it trained is kept, and it can be taken up again."""
        if self._run is not None:
            self.refresh()
            self._run.tuner.release()
            self._run = None

    def refresh(self) -> None:
        """Put the state of the run where it is looked for."""
        if self._run is None:
            return
        slots = self._run.tuner.slots
        index = slots.index.new_full((len(slots.values),), EMPTY)
        index[slots.position] = slots.index
        index = torch.cat([index, slots.retired])
        base = torch.cat([slots.base, slots.retired_base])
        name = self._run.name
        known = self.unmask_retired[name]
        retired = slots.read(slots.retired) if name in self._weights.shown else known
        self.fill(name, index, base, retired, self._run.progress())

    def _as_slots(self, name: str) -> dict[str, Tensor]:
        """The content in the form of a tuner's state."""
        index, base = self.unmask_indices[name].to(torch.int64), self.base[name]
        values = self.unmask_values[name].detach().clone()
        current, position = index[: len(values)].sort()
        filled = current != EMPTY
        retired, order = index[len(values) :].sort()
        return {
            "values": values,
            "index": current[filled],
            "position": position[filled],
            "base": base[: len(values)].clone(),
            "retired": retired,
            "retired_base": base[len(values) :][order],
            "retired_values": self.unmask_retired[name][order],
        }

    # Loading and moving.

    def _before_load(self, root: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Something is about to be loaded into the model: its weights, adapters, or both."""
        mine, ours = f"{prefix}{NAME}.", {id(tensor) for tensor in self._weights.tensors()}
        names = [n for n, p in root.named_parameters(remove_duplicate=False) if id(p) in ours]
        whole = any(prefix + name in state for name in names)
        if not whole and not any(key.startswith(mine) for key in state):
            return
        self._park()
        self._weights.show(())
        self._loading = {}
        for name in self.eligible:
            base = state.pop(f"{mine}base.{name}", None)
            present = f"{mine}unmask_indices.{name}" in state
            if whole or present:
                self._loading[name] = base if whole else None
            for part in ("unmask_indices", "unmask_retired") if present else ():
                buffers, loaded = getattr(self, part), state[f"{mine}{part}.{name}"]
                if buffers[name].shape != loaded.shape:
                    buffers[name] = buffers[name].new_zeros(loaded.shape)

    def _after_load(self, root: nn.Module, incompatible: Any) -> None:
        loading, self._loading = self._loading, {}
        for name, base in loading.items():
            if base is not None:  # the weights that came along have an adapter in them
                self.accept(name, base)
                content = self.content(name)
                write(self.eligible[name], content.index, content.base)
        for name, base in loading.items():
            if base is None:
                self.accept(name, None)
        if loading:
            self.sync()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseAdapters:
        self._park()
        super()._apply(fn, recurse)
        return self

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """PEFT asks for this after loading; `accept` has done it."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has the adapters, not the run."""
        self._park()
        return {**self.__dict__, "_outermost": None}
