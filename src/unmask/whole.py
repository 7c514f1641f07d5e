"""What a run keeps whole: no scalars among others, but tensors, with what they were before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unmask.errors import UnmaskError

__all__ = ["WholeTensors"]


class WholeTensors:
    """Parameters trained in full, those drawn at random for this run, and running statistics.

    full    trained in full, outside the budget
    random  what no later process would draw again, so that a delta has to bring it along
    """

    def __init__(
        self, model: nn.Module, full: Mapping[str, Tensor], random: Mapping[str, Tensor]
    ) -> None:
        self._model, self.full, self.random = model, full, random
        self._base = _copies(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """All of them, as they are."""
        return {**self.full, **self.random, **self.statistics()}

    def statistics(self) -> dict[str, Tensor]:
        """Buffers that training changes by itself: running statistics of normalisation layers."""
        return {
            f"{prefix}.{name}" if prefix else name: buffer
            for prefix, module in self._model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for name, buffer in module.named_buffers(recurse=False)
        }

    def revert(self) -> None:
        """Give them the values that they had before training."""
        _copy(self.tensors(), self._base)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Their values now and before training."""
        return {"whole": _copies(self.tensors()), "whole_base": _copies(self._base)}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of a run that keeps others whole."""
        theirs, before, mine = (
            {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            for tensors in (state["whole"], state["whole_base"], self.tensors())
        )
        if theirs != mine or before != mine:
            odd = ", ".join(sorted(theirs.keys() ^ mine.keys())) or "shapes or dtypes"
            raise UnmaskError(
                f"the state and this run differ in what is kept whole ({odd}); "
                "attach() to the same model with the same train_fully="
            )

    @contextmanager
    def drawn_as(self, state: Mapping[str, Any]) -> Iterator[None]:
        """Be drawn as for the run of that state from now on, unless what follows fails."""
        drawn = _copies(self.random)
        _copy(self.random, {name: state["whole_base"][name] for name in drawn})
        try:
            yield
        except BaseException:
            _copy(self.random, drawn)
            raise

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        _copy(self.tensors(), state["whole"])
        self._base = _copies(state["whole_base"])


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _copy(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in values.items():
        into[name].copy_(tensor)
