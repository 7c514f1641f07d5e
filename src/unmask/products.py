"""Products that autograd would keep for a parameter's gradient, computed again in backward instead.

A norm that a model brings itself ends in `weight * x̂`, a gated layer in `act(gate) @ weight` with
`act * gate`. For the weight's gradient autograd keeps that operand, as large as the activations,
though it is a product (or a quotient) whose factors are kept already, for gradients of their own.
So backward takes it from those once more: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from unmask.hooks import Hook, transformed

__all__ = ["factors", "watch"]

SCALING, GROUPED = "MulBackward0", "GroupedMmBackward0"
MAKING: dict[str, Callable[..., Tensor]] = {SCALING: torch.mul, "DivBackward0": torch.div}
# What keeps an operand for a gradient in the other: where it is, and which edge leads to it.
KEEPING: dict[str, tuple[tuple[str, int], ...]] = {
    SCALING: (("_raw_saved_self", 0), ("_raw_saved_other", 1)),
    "MmBackward0": (("_raw_saved_self", 0),),
    "AddmmBackward0": (("_raw_saved_mat1", 1),),
    "ConvolutionBackward0": (("_raw_saved_input", 0),),
    GROUPED: (("_raw_saved_self", 0),),  # experts' matrices
}
ADD, CAST, VIEW = "AddBackward0", "ToCopyBackward0", "ViewBackward0"
# What there may be between such an operation and the output, and how much of it.
BEHIND, STEPS = (ADD, CAST, VIEW, "UnsafeViewBackward0", "SumBackward1", "IndexBackward0"), 8
LEAST = 1 << 18  # bytes of what is worth making again, which takes 0.1 ms at the least


class _Like(NamedTuple):
    """What is kept in a product's place."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def make(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        with torch.no_grad():
            return MAKING[name](left, right).to(self.device, self.dtype).reshape(self.shape)


def watch(model: nn.Module, tensors: Collection[Tensor]) -> list[Callable[[], None]]:
    """Have modules keep no product for the gradients of these parameters of theirs, where its
    factors are kept and the module's output isn't small; returns what ends that."""
    wanted = set(map(id, tensors))
    ends = []
    for module in model.modules():
        own = wanted & set(map(id, module._parameters.values()))
        # PyTorch's other norms, and embeddings, keep none.
        foreign = not type(module).__module__.startswith("torch.nn.")
        if own and (foreign or isinstance(module, nn.Linear | nn.RMSNorm | _ConvNd)):
            ends.append(_look(module))
    return ends


def factors(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
    """How x is computed again, and from what, if autograd keeps that anyway and x isn't small."""
    product = _product(x.grad_fn) if x.nbytes >= LEAST else None
    if product is None:
        return None
    like, name = _Like.of(x), product.name()
    return lambda *kept: like.make(name, *kept), (product._saved_self, product._saved_other)


def _look(module: nn.Module) -> Callable[[], None]:
    """Look at this module's outputs, until one shows that there is no product in it."""

    def spare(_: nn.Module, __: None, output: Any) -> None:
        if not isinstance(output, Tensor) or output.nbytes < LEAST or transformed():
            return
        if _spare(output.grad_fn) is False:
            handle.remove()

    handle = module.register_forward_hook(Hook(spare, None))
    return handle.remove


def _spare(node: Any) -> bool | None:
    """Have the operation that an output ends with keep how its operands are made: whether there
    are such operands; None if it is no operation that would."""
    for _ in range(STEPS):
        if node is None or not (node.name() in BEHIND or _weighs_experts(node)):
            break
        node = node.next_functions[0][0]
    if node is None or node.name() not in KEEPING:
        return None
    found = False
    for place, edge in KEEPING[node.name()]:
        product = _product(node.next_functions[edge][0])
        if product is not None:
            _forget(getattr(node, place), product)
            found = True
    return found


def _weighs_experts(node: Any) -> bool:
    """Whether this multiplies what experts' matrices gave, maybe with a bias, by its weights."""
    if node.name() != SCALING:
        return False
    node = node.next_functions[0][0]
    if node is not None and node.name() == ADD:
        node = node.next_functions[0][0]
    return node is not None and node.name() == GROUPED


def _forget(saved: Any, product: Any) -> None:
    """Keep in the product's place what it is like."""

    def again(like: _Like) -> Tensor:
        return like.make(product.name(), product._saved_self, product._saved_other)

    try:
        saved.register_hooks(_Like.of, again)
    except RuntimeError:
        """Others see to what is saved here already: a checkpoint, an offload to other memory."""


def _product(node: Any) -> Any:
    """The product with gradients in both factors, which keeps both, that this node gives, casts or
    views; None if there is none. A factor that is repeated over dimensions that it doesn't have
    scales what may be a product itself: that isn't one of two kept tensors."""
    for passed in (VIEW, CAST, VIEW):
        if node is not None and node.name() == passed:
            node = node.next_functions[0][0]
    if node is None or node.name() not in MAKING:
        return None
    if any(edge is None for edge, _ in node.next_functions):
        return None
    dimensions = len(node._input_metadata[0].shape)
    like = all(len(e._input_metadata[n].shape) == dimensions for e, n in node.next_functions)
    # What others see to, as a checkpoint does, may be had once only; an older PyTorch can't say.
    saved = node._raw_saved_self, node._raw_saved_other
    ours = all(getattr(factor, "unpack_hook", True) is None for factor in saved)
    return node if like and ours else None
