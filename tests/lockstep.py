"""Drive the library and the dense reference side by side, and demand equality bit by bit."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import unmask
from models import Case
from reference import DenseReference

METHODS: Mapping[str, Callable[..., Any]] = {
    "increment": unmask.id3,
    "static": unmask.static_d3,
    "repeat": unmask.repeat_d3,
}


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made within it has, other than views of these."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.weights = {w.untyped_storage().data_ptr() for w in weights}
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        dense = isinstance(out, Tensor) and out.layout is torch.strided
        if dense and out.untyped_storage().data_ptr() not in self.weights:
            self.size = max(self.size, out.numel())
        return out


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes: tells -0.0 from 0.0, and one NaN from another."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [name for name in a if not same_bits(a[name], b[name])]
    assert not differing, f"differ: {differing}"


def same_tree(a: object, b: object) -> bool:
    """Equality of nested state: tensors by bits."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_bits(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return type(a) is type(b) and bool(a == b)


def chosen(tuner: unmask.Tuner) -> dict[str, list[int]]:
    """`tuner.selected()` as lists, without the tensors that have nothing."""
    return {name: index.tolist() for name, index in tuner.selected().items() if len(index)}


def scalars(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Pair:
    """One model under the library, its copy under the reference; `how` is for `attach` alone."""

    def __init__(
        self,
        model: nn.Module,
        *,
        budget: int,
        steps: int,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        strategy: str = "increment",
        exp: float = 2.0,
        eps: float = 1.0,
        include: Any = "*",
        exclude: Any = (),
        train_fully: Any = (),
        how: Mapping[str, Any] | None = None,
        **kw: Any,
    ) -> None:
        where = {"include": include, "exclude": exclude, "train_fully": train_fully}
        self.reference = DenseReference(
            model, budget=budget, steps=steps, optimizer=optimizer, strategy=strategy,
            exp=exp, eps=eps, **where, **kw,
        )  # fmt: skip
        self.base = snapshot(model)
        self.model = model
        method = METHODS[strategy](budget=budget, exp=exp, eps=eps)
        self.tuner = unmask.attach(model, method, steps=steps, **where, **(how or {}))
        self.optimizer = self.tuner.optimizer(optimizer, **kw)

    def backward(self, case: Case, step: int) -> None:
        case.loss(self.model, step).backward()
        case.loss(self.reference.model, step).backward()

    def set_grads(self, grads: Mapping[str, Tensor | None]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, grad in grads.items():
            parameters[name].grad = None if grad is None else grad.clone()
        self.reference.set_grads(grads)

    def step(self) -> None:
        self.optimizer.step()
        self.reference.step()
        self.optimizer.zero_grad()
        self.reference.zero_grad()

    def assert_equal(self) -> None:
        """Same sets, same counts, same weights and buffers; masked scalars as in the base."""
        expected = {name: index.tolist() for name, index in self.reference.selected().items()}
        assert chosen(self.tuner) == expected
        assert self.tuner.active == self.reference.active
        assert self.tuner.updates == self.reference.updates
        assert_same_state(snapshot(self.model), snapshot(self.reference.model))
        self.assert_masked_untouched()

    def assert_masked_untouched(self) -> None:
        now = dict(self.model.named_parameters())
        for name, touched in self.reference.touched.items():
            assert same_bits(now[name][~touched], self.base[name][~touched]), name

    def train(self, case: Case, steps: int, *, first: int = 1) -> None:
        for step in range(first, first + steps):
            self.backward(case, step)
            self.step()
            self.assert_equal()


def random_grads(model: nn.Module, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless gradients for every trainable parameter, in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield {
            name: torch.randn(p.shape, generator=generator).to(p.dtype)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
