"""Parameters that no checkpoint holds and no later process would draw again: LoRA's A, say."""

from __future__ import annotations

from torch import nn

__all__ = ["random_parts"]


def random_parts(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a library has put into the model with random values, by name.

    A module that does so names its own parts in `adapter_layer_names`, as PEFT's layers do. What is
    constant there (LoRA's B, all zeros) isn't random: any process makes it the same.
    """
    prefixes = tuple(
        f"{name}.{part}." if name else f"{part}."
        for name, module in model.named_modules()
        for part in getattr(module, "adapter_layer_names", ())
    )
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if f"{name}.".startswith(prefixes)
        and parameter.numel()
        and not parameter.is_meta
        and bool((parameter != parameter.flatten()[0]).any())
    }
