"""What autograd would keep for a parameter's gradient, though backward can cheaply make it again.

A norm that a model brings itself ends in `weight * x̂`, a gated layer in `(act * gate) @ weight`.
For the weight's gradient autograd keeps that operand, as large as the activations, though it is a
product (or a quotient) whose factors are kept already, for gradients of their own, or made again
themselves. So is what a norm gives the layers that follow, whether it is such a product or comes of
PyTorch's layer norm, which keeps what it came of. Backward makes each once more: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from unmask.hooks import Hook, transformed

__all__ = ["factors", "watch"]

SCALING, GROUPED, NORM = "MulBackward0", "GroupedMmBackward0", "NativeLayerNormBackward0"
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
SAMPLED = ("_TapBackward", "_SampledBackward")  # behind an operation whose weights are sampled
# What nodes are told: what a layer norm's doesn't keep, and who else needs the same again.
EPS, SHARED = "unmask: eps", "unmask: shared"


class _Making(NamedTuple):
    """How an operation's output is made again.

    parts  what it is made of: names of what the operation's node keeps
    how    from the node to what makes it of those that aren't None
    fits   whether this node's can be
    """

    parts: tuple[str, ...]
    how: Callable[[Any], Callable[..., Tensor]]
    fits: Callable[[Any], bool]


def _kept_both(node: Any) -> bool:
    """Both factors have gradients, so are kept."""
    return all(edge is not None for edge, _ in node.next_functions)


def _normed(node: Any) -> Callable[..., Tensor]:
    shape, eps = node._saved_normalized_shape, node.metadata[EPS]

    def again(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return torch.native_layer_norm(x, shape, weight, bias, eps)[0]

    return again


MAKING = {
    SCALING: _Making(("self", "other"), lambda _: torch.mul, _kept_both),
    "DivBackward0": _Making(("self", "other"), lambda _: torch.div, _kept_both),
    NORM: _Making(("input", "weight", "bias"), _normed, lambda node: EPS in node.metadata),
}


class _Like(NamedTuple):
    """What is kept in the place of something that is made again."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def form(self, made: Tensor) -> Tensor:
        return made.to(self.device, self.dtype).reshape(self.shape)


def watch(model: nn.Module, tensors: Collection[Tensor]) -> list[Callable[[], None]]:
    """Have modules keep nothing for the gradients of these parameters of theirs that can be made
    again of what is kept, where their output isn't small; returns what ends that."""
    wanted = set(map(id, tensors))
    ends = []
    for module in model.modules():
        own = wanted & set(map(id, module._parameters.values()))
        # PyTorch's other norms, and embeddings, keep nothing of the kind.
        foreign = not type(module).__module__.startswith("torch.nn.")
        if own and (foreign or isinstance(module, nn.Linear | nn.RMSNorm | _ConvNd)):
            ends.append(_look(module))
        if isinstance(module, nn.LayerNorm):
            ends.append(module.register_forward_hook(Hook(_mark, None)).remove)
    return ends


def factors(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
    """How x is made again, and of what, if autograd keeps that anyway and x isn't small."""
    source = _source(x.grad_fn) if x.nbytes >= LEAST else None
    if source is None or any(_hooks(source)):
        return None
    like, making, shared = _Like.of(x), _maker(source), _shared(source)
    shared.users += 1
    return lambda *parts: like.form(shared.get(lambda: making(*parts))), _parts(source)


def _maker(node: Any) -> Callable[..., Tensor]:
    how = MAKING[node.name()].how(node)

    def make(*parts: Tensor) -> Tensor:
        with torch.no_grad():
            return how(*parts)

    return make


def _parts(node: Any) -> tuple[Tensor, ...]:
    found = (getattr(node, f"_saved_{part}") for part in MAKING[node.name()].parts)
    return tuple(part for part in found if part is not None)


def _mark(module: nn.LayerNorm, _: None, output: Tensor) -> None:
    """Note at a layer norm's node what it takes to make the output again."""
    if output.nbytes < LEAST or transformed():
        return
    node: Any = output.grad_fn
    if node is not None and node.name() in SAMPLED:
        node = node.next_functions[0][0]
    if node is not None and node.name() == NORM:
        node.metadata[EPS] = module.eps


def _look(module: nn.Module) -> Callable[[], None]:
    """Look at this module's outputs, until one shows that nothing in it can be made again."""

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
        source = _source(node.next_functions[edge][0])
        if source is not None:
            _forget(getattr(node, place), source)
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


class _Shared:
    """What an operation gave, held from the first that needs it again to the last.

    users  how many need it, once each in a backward pass
    """

    def __init__(self) -> None:
        self.users = self._served = 0
        self._made: Tensor | None = None

    def get(self, make: Callable[[], Tensor]) -> Tensor:
        made = make() if self._made is None else self._made
        self._served = (self._served + 1) % self.users
        self._made = made if self._served else None
        return made


def _shared(node: Any) -> _Shared:
    found: _Shared = node.metadata.setdefault(SHARED, _Shared())
    return found


class _Again:
    """Makes again what an operation gave; a hook that unpacks what is kept in its place."""

    def __init__(self, source: Any) -> None:
        self.source, self.shared = source, _shared(source)

    def __call__(self, like: _Like) -> Tensor:
        return like.form(self.shared.get(lambda: _maker(self.source)(*_parts(self.source))))


def _forget(saved: Any, source: Any) -> None:
    """Keep in the place of what this operation gave what that is like."""
    again = _Again(source)
    try:
        saved.register_hooks(_Like.of, again)
    except RuntimeError:
        return  # others see to what is saved here already: a checkpoint, an offload
    again.shared.users += 1
    if again.shared.users == 1:
        for hook in _hooks(source):
            if isinstance(hook, _Again):
                hook.shared.users += 1


def _source(node: Any) -> Any:
    """The operation whose output this node gives, casts or views, if that can be made again of
    what the operation itself keeps, or makes again; None if it can't."""
    for passed in ((VIEW,), (CAST,), (VIEW,), SAMPLED):
        if node is not None and node.name() in passed:
            node = node.next_functions[0][0]
    making = None if node is None else MAKING.get(node.name())
    if making is None or not making.fits(node):
        return None
    # What others see to, as a checkpoint does, may be had once only.
    ours = all(hook is None or isinstance(hook, _Again) for hook in _hooks(node))
    return node if ours else None


def _hooks(node: Any) -> list[Any]:
    """Of what an operation's output is made of, what unpacks each; an older PyTorch can't say."""
    parts = MAKING[node.name()].parts
    return [getattr(getattr(node, f"_raw_saved_{p}"), "unpack_hook", True) for p in parts]
