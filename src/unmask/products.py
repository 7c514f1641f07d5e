"""Products that autograd would keep beside what they are made of, computed again in backward.

A norm that a model brings itself ends in `weight * x̂`, a gated layer in `act(gate) @ weight` with
`act * gate`, attention with dropout in `(softmax * noise) @ values`. For one gradient autograd
keeps that operand, as large as the activations, though it is a product (or a quotient) of what is
kept already, for gradients of its own. So backward takes it from there once more: the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from unmask.hooks import Hook, transformed

__all__ = ["factors", "watch"]

# PyTorch's own modules that may keep a product; its other norms, and embeddings, don't.
KINDS = nn.Linear, nn.MultiheadAttention, nn.RMSNorm, _ConvNd
SCALING, GROUPED = "MulBackward0", "GroupedMmBackward0"
MAKING: dict[str, Callable[..., Tensor]] = {SCALING: torch.mul, "DivBackward0": torch.div}
GIVING = "SoftmaxBackward0", "SafeSoftmaxBackward0", "ReluBackward0"  # they keep what they give
# What keeps an operand for a gradient in the other: where it is, and which edge leads to it.
KEEPING: dict[str, tuple[tuple[str, int], ...]] = {
    SCALING: (("_raw_saved_self", 0), ("_raw_saved_other", 1)),
    "MmBackward0": (("_raw_saved_self", 0),),
    "AddmmBackward0": (("_raw_saved_mat1", 1),),
    "ConvolutionBackward0": (("_raw_saved_input", 0),),
    GROUPED: (("_raw_saved_self", 0),),  # experts' matrices
}
WEIGHING = "BmmBackward0"  # in attention, ahead of its last matrix: weights times values
ADD, CAST, VIEW, UNSAFE = "AddBackward0", "ToCopyBackward0", "ViewBackward0", "UnsafeViewBackward0"
TURN = "TransposeBackward0", "PermuteBackward0"
# What there may be, at most once each, between a product and the operation that keeps it; between
# that and the module's output; between attention and its last matrix; how much of the latter two.
BETWEEN = VIEW, "ExpandBackward0", CAST, VIEW
BEHIND = ADD, CAST, VIEW, UNSAFE, *TURN, "SumBackward1", "IndexBackward0", "_TapBackward"
JOINING = VIEW, UNSAFE, *TURN, "CloneBackward0"
STEPS = 8
LEAST = 1 << 18  # bytes of what is worth making again, which takes 0.1 ms at the least

Edge = tuple[Any, int]  # an operation, and which of its outputs


class _Like(NamedTuple):
    """What is kept in a product's place."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Any) -> _Like:
        return cls(torch.Size(x.shape), x.dtype, x.device)

    @classmethod
    def given(cls, edge: Edge) -> _Like:
        return cls.of(edge[0]._input_metadata[edge[1]])

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype).reshape(self.shape)


class _Recipe(NamedTuple):
    """How a tensor is made of some that autograd keeps.

    kept  operation and attribute of each
    """

    kept: tuple[tuple[Any, str], ...]
    make: Callable[..., Tensor]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(node, name) for node, name in self.kept)


def watch(model: nn.Module, tensors: Collection[Tensor]) -> list[Callable[[], None]]:
    """Have modules with any of these parameters keep no product, where what it is made of is kept
    and neither it nor the module's output is small; returns what ends that."""
    wanted = set(map(id, tensors))
    ends = []
    for module in model.modules():
        own = wanted & set(map(id, module._parameters.values()))
        foreign = not type(module).__module__.startswith("torch.nn.")
        if own and (foreign or isinstance(module, KINDS)):
            ends.append(_look(module))
    return ends


def factors(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
    """How x is computed again, and from what, if autograd keeps that anyway and x isn't small."""
    recipe = _product((x.grad_fn, x.output_nr)) if x.nbytes >= LEAST else None
    return None if recipe is None else (recipe.make, recipe.parts)


def _look(module: nn.Module) -> Callable[[], None]:
    """Look at this module's outputs, until one shows that there is no product in it; while nothing
    is dropped out, until the module is to be trained, as dropout makes products, too."""

    def spare(module: nn.Module, shown: list[bool], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(output, Tensor) or output.nbytes < LEAST or transformed():
            return
        if module.training in shown or _spare(output.grad_fn) is not False:
            return
        shown.append(module.training)
        if module.training:
            handle.remove()

    handle = module.register_forward_hook(Hook(spare, []))
    return handle.remove


def _spare(node: Any) -> bool | None:
    """Have the operation that an output ends with, and attention ahead of it, keep how operands are
    made: whether there are such operands; None if it is no operation that would."""
    node = _passed(node, lambda node: node.name() in BEHIND or _weighs_experts(node))
    if node is None or node.name() not in KEEPING:
        return None
    found = [_forget(node, place, edge) for place, edge in KEEPING[node.name()]]
    _, edge = KEEPING[node.name()][0]
    attention = _passed(node.next_functions[edge][0], lambda node: node.name() in JOINING)
    if attention is not None and attention.name() == WEIGHING:
        found.append(_forget(attention, "_raw_saved_self", 0))
    return any(found)


def _passed(node: Any, passing: Callable[[Any], bool]) -> Any:
    """Back from this operation, the first that isn't such a one, or else one that is."""
    for _ in range(STEPS):
        if node is None or not passing(node):
            break
        node = node.next_functions[0][0]
    return node


def _weighs_experts(node: Any) -> bool:
    """Whether this multiplies what experts' matrices gave, maybe with a bias, by its weights."""
    if node.name() != SCALING:
        return False
    node = node.next_functions[0][0]
    if node is not None and node.name() == ADD:
        node = node.next_functions[0][0]
    return node is not None and node.name() == GROUPED


def _forget(node: Any, place: str, edge: int) -> bool:
    """Have an operation keep how its operand is made, if that is a product, and not a small one:
    whether it is one."""
    recipe = _product(node.next_functions[edge])
    if recipe is None:
        return False
    like = _Like.given(node.next_functions[edge])
    if math.prod(like.shape) * like.dtype.itemsize < LEAST:
        return True

    def again(like: _Like) -> Tensor:
        return like.cast(recipe.make(*recipe.parts))

    try:
        getattr(node, place).register_hooks(_Like.of, again)
    except RuntimeError:
        """Others see to what is saved here already: a checkpoint, an offload to other memory."""
    return True


def _product(edge: Edge) -> _Recipe | None:
    """How the product that an operation gives, casts or views is made; None if there is none."""
    node = _origin(edge)
    if node is None or node.name() not in MAKING:
        return None
    names, like = ("_saved_self", "_saved_other"), _Like.given(edge)
    left, right = map(_factor, (node, node), names, node.next_functions)
    repeated = math.prod(like.shape) != math.prod(node._input_metadata[0].shape)
    if left is None or right is None or repeated:
        return None
    operation, count = MAKING[node.name()], len(left.kept)

    def make(*parts: Tensor) -> Tensor:
        with torch.no_grad():
            return like.cast(operation(left.make(*parts[:count]), right.make(*parts[count:])))

    return _Recipe(left.kept + right.kept, make)


def _factor(node: Any, name: str, edge: Edge) -> _Recipe | None:
    """How this factor of a product is made: not at all if it is kept there, or else of what is kept
    where it comes from. None, too, if it is repeated over dimensions that it doesn't have: then it
    scales what may be a product itself."""
    kept = _kept(node, name)
    try:
        factor = None if kept is None else kept.parts[0]
    except RuntimeError:  # it was written over, which backward will say
        return None
    if kept is None or factor is not None:
        whole = factor is not None and factor.dim() == len(node._input_metadata[0].shape)
        return kept if whole else None
    origin = _origin(edge)
    if origin is None or origin.name() not in GIVING:
        return _product(edge)
    given = _kept(origin, "_saved_result")
    return None if given is None else _Recipe(given.kept, _Like.given(edge).cast)


def _kept(node: Any, name: str) -> _Recipe | None:
    """What an operation keeps under this name, unless others see to it, as a checkpoint does: it
    may be had once only. (An older PyTorch can't say.)"""
    saved = getattr(node, f"_raw{name}")
    ours = getattr(saved, "unpack_hook", True) is None
    return _Recipe(((node, name),), lambda x: x) if ours else None


def _origin(edge: Edge) -> Any:
    """The operation whose result this edge has, cast or viewed."""
    node, _ = edge
    for passed in BETWEEN:
        if node is not None and node.name() == passed:
            node = node.next_functions[0][0]
    return node
