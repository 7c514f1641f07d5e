"""What stands in for an operation where tensors have sizes and no values.

Two things differ from a real step on the meta device. What is asked of values (is anything padded?
where does a row end?) is answered as for a full batch, whose rows are all of one length and end
with one end-of-text token. And operations that a device does in one piece, without the large
tensors in between, are done so here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from unmask import products

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten._index_put_impl_.default)
GROUPED = [getattr(o, n) for o, n in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(o, n)]

# Operations on a parameter for which gradients="sampled" has a rule.
SAMPLED = (
    F.linear, F.embedding, F.layer_norm, F.rms_norm, torch.addmm, Tensor.addmm, torch.matmul,
    Tensor.matmul, Tensor.__matmul__, torch.mul, Tensor.mul, torch.conv1d, torch.conv2d,
    torch.conv3d,
)  # fmt: skip
# Of these, the ones that keep their input themselves.
KEEPING = (F.layer_norm, F.rms_norm, torch.conv1d, torch.conv2d, torch.conv3d)

TOKENS = 2  # a look-up's gradient streams by rows if there are so many times as many as tokens


class Answers(TorchDispatchMode):
    """Answers what a model asks of values that there aren't."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.is_meta:
            if func is aten._local_scalar_dense.default and first.dtype == torch.bool:
                return True  # whether a mask lets everything through
            if func is aten.unique_consecutive.default:
                return first.flatten()[:1], first.new_empty(0), first.new_empty(0)  # rows are alike
            if func is aten.nonzero.default:
                return first.new_empty(first.numel(), first.dim(), dtype=torch.long)
            if func in INDEXING:
                args = (first, [i for x in args[1] for i in _places(x)], *args[2:])
        return func(*args, **(kwargs or {}))


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A mask as places: of rows by tokens one in each row, its end, and otherwise all."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return (index,)
    count = len(index) if index.dim() == 2 else index.numel()
    return tuple(index.new_empty(count, dtype=torch.long) for _ in range(index.dim()))


class Fused(TorchFunctionMode):
    """Computes attention as the device would: fused, the matrix of weights never whole, on a GPU,
    and on a CPU unless attention has dropout or its bias is learned.

    sampled   parameters whose gradients backward doesn't form, as with gradients="sampled" on a
              step that chooses nothing
    streamed  those of which it forms the rows that are looked up, if it is a table of many
    """

    def __init__(
        self, device: str, sampled: Collection[Tensor] = (), streamed: Collection[Tensor] = ()
    ) -> None:
        super().__init__()
        self.device = device
        self.sampled, self.streamed = (set(map(id, some)) for some in (sampled, streamed))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is Tensor.__contains__ and args[0].is_meta:
            return False  # no row holds a padding token
        if func in GROUPED and args[0].is_meta:
            return self._grouped(*args[:2])
        if func is F.scaled_dot_product_attention:
            return self._attention(func, args, given)
        if self.sampled and func in SAMPLED:
            return self._without_gradients(func, args, given)
        if self.streamed and func is F.embedding and len(args) > 1:
            return self._by_rows(func, args, given)
        return func(*args, **given)

    def _grouped(self, rows: Tensor, matrices: Tensor) -> Any:
        kept: tuple[Tensor, ...] = (rows,) if matrices.requires_grad else ()
        if self.sampled or self.streamed:
            kept = tuple(part.detach() for x in kept for part in _parts(x))
        return _Grouped.apply(rows, matrices, kept)  # type: ignore[no-untyped-call]

    def _attention(self, func: Any, args: Any, given: dict[str, Any]) -> Any:
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p"), args, strict=False))
        named |= given
        mask = named.get("attn_mask")
        learned = mask is not None and mask.requires_grad
        uneven = named["query"].shape[:-2] != named["key"].shape[:-2] and not named.get(
            "enable_gqa"
        )
        # Not fused: one head of keys beside many of queries; on a CPU, dropout and learned biases.
        if uneven or (self.device == "cpu" and (named.get("dropout_p") or learned)):
            return func(*args, **given)
        return _Attention.apply(*(named[n] for n in ("query", "key", "value")))  # type: ignore[no-untyped-call]

    def _by_rows(self, func: Any, args: Any, given: dict[str, Any]) -> Any:
        tokens, table, *rest = args
        many = tokens.numel() * TOKENS <= len(table)
        if id(table) not in self.streamed or not many or not torch.is_grad_enabled():
            return func(*args, **given)
        out = func(tokens, table.detach(), *rest, **given)
        return _Rows.apply(out, tokens, table)  # type: ignore[no-untyped-call]

    def _without_gradients(self, func: Any, args: Any, given: dict[str, Any]) -> Any:
        tensors = [x for x in tree_leaves((args, given)) if isinstance(x, Tensor)]
        own = [x for x in tensors if id(x) in self.sampled]
        if not own or not torch.is_grad_enabled():
            return func(*args, **given)

        def detached(x: Any) -> Any:
            return x.detach() if id(x) in self.sampled else x

        out = func(*tree_map(detached, args), **tree_map(detached, given))
        others = [x for x in tensors if id(x) not in self.sampled]
        if func not in KEEPING:
            others = [part for x in others for part in _parts(x)]
        kept = [x.detach() for x in others]
        return _Tap.apply(out, kept, *own)  # type: ignore[no-untyped-call]


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """What is kept of an operand: of a product its factors, which are kept anyway."""
    found = products.factors(x)
    return (x,) if found is None else found[1]


class _Attention(torch.autograd.Function):
    """What fused attention keeps for backward: its inputs, its output, one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        *batch, heads, length, _ = query.shape  # laid out for the heads to be joined without a copy
        out = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-2, -3)
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Grouped(torch.autograd.Function):
    """Each row times one of several matrices, as experts do it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        ctx.save_for_backward(matrices, *kept)
        ctx.rows = rows.shape
        return rows.new_empty(len(rows), matrices.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        matrices = ctx.saved_tensors[0]
        wanted = torch.empty_like(matrices) if ctx.needs_input_grad[1] else None
        return matrices.new_empty(ctx.rows), wanted, None


class _Tap(torch.autograd.Function):
    """As `sampled._Tap`: an operation's output, with what the parameters' gradients at few places
    follow from."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, kept: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.parameters = len(parameters)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, *[None] * ctx.parameters


class _Rows(torch.autograd.Function):
    """Rows of a table, each with a gradient of its own for the time that it is looked at."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (tokens,) = ctx.saved_tensors
        _ = tokens.new_empty(2, tokens.numel()), torch.empty_like(grads[0])
        return None, None, None
