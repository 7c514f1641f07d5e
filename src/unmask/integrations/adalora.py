"""AdaLoRA moves ranks between layers while it trains; here is how that goes with chosen scalars."""

from __future__ import annotations

from functools import partial
from typing import Any

from unmask.errors import UnmaskError
from unmask.tuner import Tuner

__all__ = ["follow_ranks"]


def follow_ranks(tuner: Tuner) -> None:
    """Let what AdaLoRA prunes be pruned: its `update_and_allocate` sets singular values to zero,
    and the tuner's own copies of them follow.

    Without it the next optimiser step would write the old values back. A pruned scalar keeps its
    slot and may grow again until the final budget is reached, as in AdaLoRA itself; one that isn't
    unmasked stays zero. AdaLoRA ranks by dense gradients, so attach(gradients="dense") it must be.

        tuner = unmask.attach(peft_model, unmask.id3(budget=10_000), steps=steps)
        follow_ranks(tuner)
        ...
        loss.backward()
        optimizer.step()
        peft_model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    """
    modules = tuner.model.modules()
    found: list[Any] = [m for m in modules if hasattr(type(m), "update_and_allocate")]
    if not found:
        raise UnmaskError(
            f"this {type(tuner.model).__name__} has no AdaLoRA in it; "
            "give the tuner of peft.get_peft_model(model, peft.AdaLoraConfig(...))"
        )
    for module in found:
        allocate = module.update_and_allocate

        def following(*args: Any, allocate: Any = allocate, **kwargs: Any) -> Any:
            if tuner.gradients != "dense":
                raise UnmaskError(
                    "AdaLoRA ranks by the weights' own gradients, and gradients="
                    f"{tuner.gradients!r} leaves none; attach(..., gradients='dense')"
                )
            result = allocate(*args, **kwargs)
            tuner.reread()
            return result

        vars(module)["update_and_allocate"] = following
        tuner.on_detach(partial(vars(module).pop, "update_and_allocate", None))
