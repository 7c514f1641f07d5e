"""Which optimisers can drive a vector of scalars: those that treat each entry by itself."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from unmask.errors import UnmaskError

# Recognised by name for the sake of a reason; whatever isn't here has to pass the trial below.
REASONS = {
    "Muon": "it orthogonalises matrices",
    "Shampoo": "it preconditions with a matrix's row and column statistics",
    "SOAP": "it preconditions with a matrix's row and column statistics",
    "Adafactor": "it factors second moments into a matrix's rows and columns",
    "CAME": "it factors second moments into a matrix's rows and columns",
    "LBFGS": "it uses inner products of whole gradients and calls the model several times a step",
    "SparseAdam": "it takes sparse gradients only",
    "Lamb": "it scales a tensor's update by the norm of the tensor",
    "LARS": "it scales a tensor's update by the norm of the tensor",
}


def check(
    optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]
) -> dict[str, float]:
    """Refuse an optimiser that isn't element-wise: one whose update of a scalar depends on others.

    The scalars of a selection lie in one vector of no shape, so such an update would have no
    meaning. Known ones are refused by name; any other steps twice on four scalars, once among
    neighbours with other gradients, and must move them alike. Returns the state that it keeps of a
    scalar that had no gradient yet, by name: what a slot must be set to before it is used anew.
    """
    if not (
        isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
    ):
        raise UnmaskError(
            f"optimizer() was given {optimizer_class!r}; give a class derived from "
            "torch.optim.Optimizer"
        )
    name = optimizer_class.__name__
    for known, reason in REASONS.items():
        if name.lower().endswith(known.lower()):
            raise _refusal(name, reason)
    (alone, state), (among, _) = (_trial(optimizer_class, options, f) for f in (1.0, 100.0))
    if not torch.equal(alone, among):
        raise _refusal(name, "its update of one scalar depends on the gradients of the others")
    return state


def _trial(
    optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any], factor: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Where four scalars end after two steps beside others, whose gradients are scaled; and the
    state of a last one, which is 0 and has gradient 0, as an empty slot."""
    values = torch.nn.Parameter(torch.tensor([0.5, -0.25, 2.0, -1.0, 1.0, 0.5, -2.0, 0.25, 0.0]))
    gradient = torch.tensor([0.1, -0.3, 0.02, 0.5, 0.2, 0.1, 0.3, -0.4, 0.0])
    gradient[4:] *= factor
    try:
        optimizer = optimizer_class([values], **options)
    except (TypeError, ValueError) as problem:
        raise UnmaskError(
            f"{optimizer_class.__name__} refused its arguments {options or '(none)'}: {problem}"
        ) from problem
    rng = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                torch.manual_seed(0)
                values.grad = gradient.clone()
                optimizer.step()
    except Exception as problem:
        raise _refusal(
            optimizer_class.__name__, f"a step on a plain vector failed: {problem}"
        ) from problem
    finally:
        torch.set_rng_state(rng)
    state = {k: v for k, v in optimizer.state[values].items() if isinstance(v, torch.Tensor)}
    empty = {k: float(v[-1]) for k, v in state.items() if v.shape == values.shape}
    return values.detach()[:4].clone(), empty


def _refusal(name: str, reason: str) -> UnmaskError:
    return UnmaskError(
        f"{name} can't train chosen scalars: {reason}, and they form one vector without a shape; "
        "use an element-wise optimiser such as AdamW, SGD or RMSprop"
    )
