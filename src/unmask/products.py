"""Products that autograd would keep for a vector's gradient, computed again in backward instead.

A norm that a model brings itself ends in `weight * x̂`. For the weight's gradient autograd keeps x̂,
as large as the activations, though it is a product (or a quotient) whose factors are kept already,
for gradients of their own. So backward takes it from those once more: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unmask.hooks import Hook, transformed

__all__ = ["Made", "factors", "watch"]

Made = Callable[[Tensor, Tensor], Tensor]

MAKING: dict[str, Made] = {"MulBackward0": torch.mul, "DivBackward0": torch.div}
SCALING, CAST = "MulBackward0", "ToCopyBackward0"
BEHIND = ("AddBackward0", CAST)  # what may come between a scaling and its module's output


def watch(model: nn.Module, vectors: Collection[Tensor]) -> list[Callable[[], None]]:
    """Have modules keep no product for the gradients of these vectors of theirs, where its factors
    are kept; returns what ends that."""
    wanted = {id(vector) for vector in vectors if vector.dim() == 1}
    ends = []
    for module in model.modules():
        own = wanted & set(map(id, module._parameters.values()))
        if own and not type(module).__module__.startswith("torch.nn."):  # those keep none
            ends.append(module.register_forward_hook(Hook(_spare, None)).remove)
    return ends


def factors(x: Tensor) -> tuple[Made, tuple[Tensor, Tensor]] | None:
    """How x is computed again, and from what, if autograd keeps that anyway."""
    product = _product(x.grad_fn)
    if product is None:
        return None
    return partial(_make, product.name(), x.dtype), (product._saved_self, product._saved_other)


def _spare(_: nn.Module, __: None, output: Any) -> None:
    """Find the scaling that the output ends with; have it keep how its other operand is made."""
    node: Any = output.grad_fn if isinstance(output, Tensor) and not transformed() else None
    for _step in BEHIND:
        if node is not None and node.name() in BEHIND:
            node = node.next_functions[0][0]
    if node is None or node.name() != SCALING:
        return
    left, right = (_product(edge) for edge, _ in node.next_functions)
    if left is not None:
        _forget(node._raw_saved_self, left)
    if right is not None:
        _forget(node._raw_saved_other, right)


def _forget(saved: Any, product: Any) -> None:
    """Keep the product's dtype in its place."""

    def again(dtype: torch.dtype) -> Tensor:
        return _make(product.name(), dtype, product._saved_self, product._saved_other)

    try:
        saved.register_hooks(lambda tensor: tensor.dtype, again)
    except RuntimeError:
        """Others see to what is saved here already: a checkpoint, an offload to other memory."""


def _make(name: str, dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    with torch.no_grad():
        return MAKING[name](left, right).to(dtype)


def _product(node: Any) -> Any:
    """The product with gradients in both factors, which keeps both, that this node gives or casts;
    None if there is none."""
    if node is not None and node.name() == CAST:
        node = node.next_functions[0][0]
    if node is None or node.name() not in MAKING:
        return None
    return node if all(edge is not None for edge, _ in node.next_functions) else None
