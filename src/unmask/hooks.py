"""What is done around a module's forward: hooks that stay behind when it is copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

__all__ = ["Hook", "transformed"]


class Hook:
    """A module hook that stays behind when the module is copied or pickled.

    call  is given the module, `own` and, after forward, the output
    """

    def __init__(self, call: Callable[..., None], own: Any) -> None:
        self.call, self.own = call, own

    def __call__(self, module: nn.Module, _: Any, *output: Any) -> None:
        self.call(module, self.own, *output)

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return _left_behind, ()


def transformed() -> bool:
    """Whether torch is looking at the model's operations rather than running them."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _nothing(*_: Any) -> None:
    """What a copy has in place of a hook."""


def _left_behind() -> Callable[..., None]:
    return _nothing
