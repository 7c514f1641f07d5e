"""Which scalars a method may choose from: a model's parameters as one ordered, tied-once list."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unmask.errors import UnmaskError

Patterns = str | Sequence[str]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # weights not quantised
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
INSTEAD = (
    "a quantised weight has none to choose from: train LoRA's scalars over it, "
    "attach(peft.get_peft_model(model, LoraConfig()), ...), or load it unquantised, in bfloat16"
)


@dataclass(frozen=True, eq=False)
class Eligible:
    """Named tensors in the order of `named_parameters()`; scalar i of tensor k has the global
    index `offsets[k] + i`, so one number names a scalar of the model and orders ties."""

    parameters: Mapping[str, nn.Parameter]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parameters)

    @cached_property
    def tensors(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.parameters.values())

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts; one more entry than tensors, the last being the total."""
        total, starts = 0, [0]
        for tensor in self.tensors:
            total += tensor.numel()
            starts.append(total)
        return tuple(starts)

    @property
    def total(self) -> int:
        return self.offsets[-1]

    def within(self, others: Eligible, said: str) -> Eligible:
        """Those tensors alone that are among the others, which are `said` to be."""
        kept = {n: p for n, p in self.parameters.items() if n in others.parameters}
        if not kept:
            raise UnmaskError(
                f"none of the {len(self.names)} eligible parameters match {said}; "
                "widen include= of attach()"
            )
        return Eligible(kept)

    def owner(self, scalar: int) -> int:
        """The position of the tensor that holds the scalar of this global index."""
        return bisect_right(self.offsets, scalar) - 1

    def split(self, index: Tensor) -> Iterator[tuple[int, int, int]]:
        """(tensor position, start, stop) of each tensor's run in sorted global indices."""
        bounds = index.new_tensor(self.offsets[1:-1]) if len(self.tensors) > 1 else index[:0]
        cuts = [0, *torch.searchsorted(index, bounds).tolist(), len(index)]
        for position, (start, stop) in enumerate(pairwise(cuts)):
            if stop > start:
                yield position, start, stop


def find(
    model: nn.Module,
    include: Patterns = "*",
    exclude: Patterns = (),
    train_fully: Patterns = (),
) -> tuple[Eligible, dict[str, nn.Parameter]]:
    """The eligible scalars, and the parameters to train in full, outside the budget.

    Eligible is every plain floating-point parameter that requires a gradient, matches `include` and
    neither `exclude` nor `train_fully`; quantised weights are passed over. Patterns are the shell's
    and speak of parameter names; a tied parameter counts once, under its first name, and answers to
    every name it has.
    """
    includes, excludes, fully = (listed(p) for p in (include, exclude, train_fully))
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    everything = dict(model.named_parameters())
    if not everything:
        raise UnmaskError("attach() was given a model without parameters; give it a model to train")

    def matches(parameter: nn.Parameter, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, p) for name in aliases[id(parameter)] for p in patterns)

    for option, patterns in (("include", includes), ("exclude", excludes), ("train_fully", fully)):
        for pattern in patterns:
            if not any(matches(parameter, [pattern]) for parameter in everything.values()):
                raise UnmaskError(
                    f"{option}={pattern!r} matches none of the {len(everything)} parameters "
                    f"({', '.join(list(everything)[:3])}, ...); patterns are the shell's, "
                    "as in 'encoder.*.weight'"
                )
    for option, patterns in (("include", includes), ("train_fully", fully)):
        for pattern in patterns:
            found = [p for p in everything.values() if matches(p, [pattern])]
            packed = [p for p in found if not is_plain(p)]
            if packed and (option == "train_fully" or len(packed) == len(found)):
                name, kind = aliases[id(packed[0])][0], type(packed[0]).__name__
                raise UnmaskError(
                    f"{option}={pattern!r} matches {name!r} ({kind}, {packed[0].dtype}), whose "
                    f"scalars can't be trained; {INSTEAD}"
                )
    whole = {n: p for n, p in everything.items() if matches(p, fully)}
    chosen = {
        n: p
        for n, p in everything.items()
        if n not in whole
        and p.requires_grad
        and is_plain(p)
        and matches(p, includes)
        and not matches(p, excludes)
    }
    for name, parameter in (*whole.items(), *chosen.items()):
        if is_lazy(parameter):
            raise UnmaskError(
                f"parameter {name!r} has no shape yet; run the model once before attach()"
            )
        if parameter.is_meta:
            raise UnmaskError(
                f"parameter {name!r} is on the meta device and has no values; "
                "load the model's weights before attach()"
            )
    if not chosen:
        frozen = sum(not p.requires_grad for p in everything.values())
        raise UnmaskError(
            f"no parameter is eligible: {len(everything)} parameters, {frozen} of them frozen "
            f"(requires_grad=False), {len(whole)} trained fully; widen include=, narrow exclude= "
            "or unfreeze some" + ("" if all(map(is_plain, everything.values())) else f"; {INSTEAD}")
        )
    _check_apart({**whole, **chosen})
    _check_still(model, chosen)
    return Eligible(chosen), whole


def _check_apart(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that share memory: a scalar of one would be masked, and trained as the
    other's."""
    spans = []
    for name, p in parameters.items():
        if p.numel() and p.layout == torch.strided:
            reach = sum((n - 1) * step for n, step in zip(p.shape, p.stride(), strict=True)) + 1
            start = p.data_ptr()
            spans.append((str(p.device), start, start + reach * p.element_size(), name))
    for (device, _, end, name), (other, start, _, later) in pairwise(sorted(spans)):
        if device == other and start < end:
            raise UnmaskError(
                f"{name!r} and {later!r} share memory but are two parameters; tie them by giving "
                "both modules the one parameter, or clone the data of one"
            )


def _check_still(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> None:
    """Refuse weights that their module's forward changes by itself."""
    names = {id(parameter): name for name, parameter in chosen.items()}
    for module in model.modules():
        rescaled = isinstance(module, EMBEDDINGS) and module.max_norm is not None
        if rescaled and (name := names.get(id(module.weight))):
            raise UnmaskError(
                f"{name!r} is rescaled at every forward pass (max_norm={module.max_norm}), "
                "masked scalars and all; set max_norm=None, or exclude it"
            )


def is_plain(parameter: Tensor) -> bool:
    """Whether its scalars lie in memory as numbers, one by one: not quantised, not sharded."""
    if parameter.dtype not in FLOATS:
        return False
    return is_lazy(parameter) or type(parameter.detach()) is Tensor


def listed(patterns: Patterns) -> tuple[str, ...]:
    """One pattern or several, as several."""
    found = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(found, Sequence | Set) or not all(isinstance(p, str) for p in found):
        raise UnmaskError(
            f"{patterns!r} is no pattern on names; give one, 'encoder.*' say, or a list of some, "
            "() for none"
        )
    return tuple(found)
