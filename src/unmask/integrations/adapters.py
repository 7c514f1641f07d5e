"""Bottleneck adapters, as in the ID3 paper's Tables 2 and 5: Pfeiffer's, Houlsby's.

>>> model = nn.ModuleDict({"mlp": nn.ModuleDict({"fc2": nn.Linear(8, 8)})})
>>> add(model, "pfeiffer", reduction=4)
['mlp.fc2']
>>> [name for name, p in model.named_parameters() if p.requires_grad]
['mlp.fc2_adapter.down.weight', 'mlp.fc2_adapter.down.bias',
'mlp.fc2_adapter.up.weight', 'mlp.fc2_adapter.up.bias']

An adapter acts on what a sublayer's last linear layer returns, before the residual connection. It
is a neighbour of that layer in the module tree and the base keeps all its names, so that a model
with adapters loads the base's checkpoints. `unmask.attach` then chooses from the adapters, and its
delta brings along what they were drawn from at random.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unmask.errors import UnmaskError

__all__ = ["ATTENTION", "FEED_FORWARD", "Bottleneck", "add", "remove"]

# Where sublayers end, in transformers' models of the kinds that encode and decode text.
ATTENTION = (
    "*attention.output.dense", "*attention.out_lin", "*attention.dense", "*attn.out_proj",
    "*attn.o_proj", "*attn.c_proj", "*SelfAttention.o", "*attn.Wo",
)  # fmt: skip
FEED_FORWARD = (
    "*layer.*.output.dense", "*layers.*.output.dense", "*ffn.lin2", "*fc2", "*mlp.down_proj",
    "*mlp.c_proj", "*mlp.dense_4h_to_h", "*DenseReluDense.wo", "*mlp.Wo",
)  # fmt: skip
KINDS = {"pfeiffer": FEED_FORWARD, "houlsby": (*ATTENTION, *FEED_FORWARD)}

Kind = Literal["pfeiffer", "houlsby"]
_added: weakref.WeakKeyDictionary[nn.Module, list[Callable[[], None]]] = weakref.WeakKeyDictionary()


class Bottleneck(nn.Module):
    """x + up(φ(down(x))), from `width` to `width / reduction` and back.

    Source: Houlsby et al., ICML 2019, arXiv 1902.00751; weights drawn from N(0, std²).
    """

    adapter_layer_names = ("down", "up")  # fresh parts, whose random values a delta has to bring

    def __init__(
        self,
        width: int,
        reduction: int = 16,
        activation: Callable[[Tensor], Tensor] = nn.functional.gelu,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if reduction < 1:
            raise UnmaskError(f"reduction={reduction}; an adapter's width is divided by 1 or more")
        self.down = nn.Linear(width, max(1, width // reduction))
        self.up = nn.Linear(self.down.out_features, width)
        self.activation = activation
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(self.activation(self.down(x)))
        return out


def add(
    model: nn.Module,
    kind: Kind = "pfeiffer",
    after: str | Sequence[str] | None = None,
    **options: Any,
) -> list[str]:
    """Put an adapter behind each sublayer of `model`, freeze all else; returns where they are.

    kind     "pfeiffer" (Pfeiffer et al. 2021: behind the feed-forward sublayer) or "houlsby"
             (behind both sublayers)
    after    shell patterns for the linear layers to follow, for a model of another structure
    options  `reduction`, `activation`, `std` of `Bottleneck`
    """
    if kind not in KINDS:
        raise UnmaskError(f"kind={kind!r}; there are {', '.join(KINDS)}")
    if model in _added:
        raise UnmaskError("this model has adapters already; remove() them first")
    given = (after,) if isinstance(after, str) else after
    names = [name for name, module in model.named_modules() if _ends(name, module, kind, given)]
    if not names:
        raise UnmaskError(
            f"no layer of this {type(model).__name__} is known to end a sublayer; name them, as in "
            "after='*.mlp.down_proj'"
        )
    adapters = {name: _fitting(model.get_submodule(name), options) for name in names}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _added[model] = [_insert(model, name, adapter) for name, adapter in adapters.items()]
    return names


def remove(model: nn.Module) -> None:
    """Take the adapters off again; the base stays frozen, as it was made."""
    for undo in _added.pop(model, []):
        undo()


def _ends(name: str, module: nn.Module, kind: Kind, given: Sequence[str] | None) -> bool:
    """Whether a module is the last linear layer of a sublayer that gets an adapter."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not _width(module):
        return False
    if given is not None:
        return any(fnmatchcase(name, pattern) for pattern in given)
    if kind == "pfeiffer" and any(fnmatchcase(name, pattern) for pattern in ATTENTION):
        return False  # which some of the patterns for the other sublayer match, too
    return any(fnmatchcase(name, pattern) for pattern in KINDS[kind])


def _fitting(layer: nn.Module, options: dict[str, Any]) -> Bottleneck:
    """An adapter as wide as the layer's output, where its weight is."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32  # quantised
    return Bottleneck(_width(layer), **options).to(weight.device, dtype)


def _width(layer: nn.Module) -> int:
    """How wide a linear layer says that its output is (transformers' Conv1D: nf); else 0."""
    width = getattr(layer, "out_features", None) or getattr(layer, "nf", None)
    return int(width or 0)


def _insert(model: nn.Module, name: str, adapter: Bottleneck) -> Callable[[], None]:
    parent_name, _, last = name.rpartition(".")
    parent, layer = model.get_submodule(parent_name), model.get_submodule(name)
    parent.add_module(f"{last}_adapter", adapter)
    # Not a function of its own: a copy of the model has to go through the copy of the adapter.
    handle = layer.register_forward_hook(partial(_through, adapter))

    def undo() -> None:
        handle.remove()
        delattr(parent, f"{last}_adapter")

    return undo


def _through(adapter: Bottleneck, _module: nn.Module, _args: Any, out: Tensor) -> Any:
    return adapter(out)
