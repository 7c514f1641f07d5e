"""Selective fine-tuning the slow and obvious way: one dense mask per tensor, plain loops.

This file is the method, written down. It shares no code with the library; the tests demand that
the library selects the same scalars and ends at the same weights, step by step.

One step (Algorithm 1 of "Step-by-Step Unmasking", arXiv:2408.14470):

1. every scalar gets a score from its weight and its gradient, in float32 (Equation 1);
2. the `u_t` best of the scalars that are still masked are unmasked (Equation 2). Ties go to the
   earlier tensor in `named_parameters()` order, then to the smaller flat index;
3. the gradient of every masked scalar is set to zero (Equation 3);
4. the base optimiser steps; it neither moves nor remembers anything about masked scalars.

How step 4 keeps masked scalars still. A masked scalar must not feel weight decay, and must not
carry a momentum into the day on which it is unmasked. So before the optimiser runs, masked
scalars are lent the value zero and the gradient zero: decay of zero is zero, in whichever way the
optimiser applies it, and all moments stay as a zero gradient and zero decay leave them. After the
step their own values are put back, bit for bit.

What else has to be said:

* Low-precision weights are trained through float32 master copies: the optimiser sees the master,
  the model gets its rounding. Scores read the model's weight, not the master.
* A parameter without a gradient counts as one with gradient zero, unless no parameter has one:
  then the step does nothing, as in `torch.optim`.
* The optimiser's step counter is shared: a scalar unmasked late doesn't start its own.
* A NaN or an infinity in any gradient: the step does not take place.
* A score that is no number (0 / 0 where the denominator underflows) comes after all numbers.
* `repeat` picks the set anew at each step among all scalars. What leaves keeps its trained weight
  (as the model holds it: the master is dropped) and loses its moments; what stays keeps them. To
  lose the moments is to get those of a scalar that never was in the set: a spare one, kept beside
  every tensor, shows what they are (mostly zero; Adagrad's and Rprop's are not).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

Score = Callable[[str, Tensor, Tensor], Tensor]


def d3(exp: float = 2.0, eps: float = 1.0) -> Score:
    """Equation 1: |g| / (|w| + eps)^exp, in float32."""

    def score(name: str, weight: Tensor, grad: Tensor) -> Tensor:
        return grad.abs() / (weight.abs() + eps) ** exp

    return score


def smallest_magnitude(name: str, weight: Tensor, grad: Tensor) -> Tensor:
    """PaFi: the smaller the weight, the better."""
    return -weight.abs()


def uniform(budget: int, steps: int) -> list[int]:
    """Return u_1 .. u_T: after step t, floor(B·t/T) scalars are unmasked."""
    return [budget * t // steps - budget * (t - 1) // steps for t in range(1, steps + 1)]


class DenseReference:
    """Train a copy of `model`; `.model` is the copy, `.step()` is one optimiser step on it.

    `schedule` is the list u_1 .. u_T (default: uniform). `strategy` is "increment", "static" (all
    of the budget at the first step) or "repeat". Everything in `kw` goes to `optimizer`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        budget: int,
        steps: int,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        strategy: str = "increment",
        schedule: Sequence[int] | None = None,
        exp: float = 2.0,
        eps: float = 1.0,
        score: Score | None = None,
        include: str | Sequence[str] = "*",
        exclude: Sequence[str] = (),
        train_fully: Sequence[str] = (),
        **kw: object,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.budget, self.strategy = budget, strategy
        self.score = score or d3(exp, eps)
        self.quotas = list(schedule) if schedule is not None else uniform(budget, steps)
        self.step_count = 0
        self.updates = 0
        include = [include] if isinstance(include, str) else list(include)

        self.weights: dict[str, nn.Parameter] = {}  # named_parameters() lists tied weights once
        self.heads: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad or not parameter.is_floating_point():
                continue
            if any(fnmatchcase(name, pattern) for pattern in train_fully):
                self.heads[name] = parameter
            elif any(fnmatchcase(name, pattern) for pattern in include) and not any(
                fnmatchcase(name, pattern) for pattern in exclude
            ):
                self.weights[name] = parameter

        self.masks = {n: torch.zeros(w.shape, dtype=torch.bool) for n, w in self.weights.items()}
        self.touched = {n: mask.clone() for n, mask in self.masks.items()}
        self.masters = {n: self._master(w) for n, w in self.weights.items()}
        self.spares = {n: nn.Parameter(m.new_zeros(1)) for n, m in self.masters.items()}
        vectors = [*self.masters.values(), *self.spares.values()]
        self.optimizer = optimizer([*vectors, *self.heads.values()], **kw)

    @staticmethod
    def _master(weight: Tensor) -> nn.Parameter:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return nn.Parameter(weight.detach().to(wide, copy=True).contiguous())

    # What a test looks at

    @property
    def active(self) -> int:
        """Scalars ever unmasked."""
        return sum(int(mask.sum()) for mask in self.touched.values())

    def selected(self) -> dict[str, Tensor]:
        """Sorted flat indices ever unmasked, for tensors that have any."""
        flat = {name: mask.flatten().nonzero().flatten() for name, mask in self.touched.items()}
        return {name: index for name, index in flat.items() if len(index)}

    def current(self) -> dict[str, Tensor]:
        """Sorted flat indices in training now."""
        flat = {name: mask.flatten().nonzero().flatten() for name, mask in self.masks.items()}
        return {name: index for name, index in flat.items() if len(index)}

    def set_grads(self, grads: Mapping[str, Tensor | None]) -> None:
        """Assign gradients by hand."""
        parameters = dict(self.model.named_parameters())
        for name, grad in grads.items():
            parameters[name].grad = None if grad is None else grad.clone()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.model.zero_grad()

    # One step of the method

    def step(self) -> bool:
        """Select, mask, update. Returns whether the step took place."""
        given = [p.grad for p in (*self.weights.values(), *self.heads.values())]
        if all(grad is None for grad in given):
            return False
        if not all(bool(torch.isfinite(grad).all()) for grad in given if grad is not None):
            return False
        grads = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad.detach()
            for name, weight in self.weights.items()
        }
        self.step_count += 1
        self._select(grads)
        self._update(grads)
        self.updates += sum(int(mask.sum()) for mask in self.masks.values())
        return True

    def _select(self, grads: Mapping[str, Tensor]) -> None:
        t = self.step_count
        if self.strategy == "repeat":
            left = {name: mask.clone() for name, mask in self.masks.items()}
            for mask in self.masks.values():
                mask.fill_(False)
            self._unmask_best(self.budget, grads)
            for name, mask in self.masks.items():
                self._forget(name, left[name] & ~mask)
        elif self.strategy == "static":
            self._unmask_best(self.budget if t == 1 else 0, grads)
        else:
            self._unmask_best(self.quotas[t - 1] if t <= len(self.quotas) else 0, grads)
        for name, mask in self.masks.items():
            self.touched[name] |= mask

    def _unmask_best(self, count: int, grads: Mapping[str, Tensor]) -> None:
        """Sort every score of every tensor; unmask the first `count` that are still masked."""
        if count == 0:
            return
        scores = []
        for name, weight in self.weights.items():
            score = self.score(name, weight.detach().float(), grads[name].float())
            score = torch.where(score.isnan(), torch.finfo(score.dtype).min, score)
            scores.append(score.masked_fill(self.masks[name], -torch.inf).flatten())
        everything = torch.cat(scores)
        best = everything.sort(descending=True, stable=True).indices[:count]
        start = 0
        for mask in self.masks.values():
            mine = best[(best >= start) & (best < start + mask.numel())] - start
            mask.view(-1)[mine] = True
            start += mask.numel()

    def _update(self, grads: Mapping[str, Tensor]) -> None:
        own = {name: master.detach().clone() for name, master in self.masters.items()}
        with torch.no_grad():
            for name, master in self.masters.items():
                mask = self.masks[name]
                master.grad = torch.where(mask, grads[name].to(master.dtype), 0.0)
                master[~mask] = 0.0
                self.spares[name].grad = torch.zeros_like(self.spares[name])
        self.optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                mask, weight = self.masks[name], self.weights[name]
                master[~mask] = own[name][~mask]
                weight[mask] = master[mask].to(weight.dtype)

    def _forget(self, name: str, left: Tensor) -> None:
        """Drop the moments and the master of scalars that left the set."""
        master, spare = self.masters[name], self.spares[name]
        fresh = self.optimizer.state.get(spare, {})
        with torch.no_grad():
            for key, moment in self.optimizer.state.get(master, {}).items():
                if isinstance(moment, Tensor) and fresh[key].shape == spare.shape:
                    moment[left] = fresh[key]
            master[left] = self.weights[name][left].to(master.dtype)
