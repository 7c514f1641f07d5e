"""One training step of a model on the meta device, and what it takes by part.

No formula for activations: the very model runs forward and backward, while every storage is
metered. So the numbers follow the architecture, its attention, its dropout and its loss. What the
selection takes follows from its sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from unmask import products
from unmask.errors import UnmaskError
from unmask.methods import Method
from unmask.recipes import plan_model
from unmask.recipes.plan_blank import Answers, Fused
from unmask.recipes.plan_meter import Meter

PARTS = ("weights", "gradients", "optimizer", "selection", "activations")
STEPS = 1000  # of a run, as far as a step's share of the budget depends on it
# Bytes that a slot takes for the whole run: value, its gradient and its base, two int32 to find it.
SLOT = 4 + 4 + 4 + 4 + 4
# What a step adds while it lasts, as measured: for each slot its gradient in the making; for each
# scalar that it chooses the candidates, twice as many, and their sorting.
MAKING, CANDIDATE = 4, 56
ENTRY = 8  # of a slot for steps that choose nothing: its row and column
WORKSPACE = 1 << 20  # blocks of scores in the making, however large the model
TOGETHER = 1 << 23  # bytes of gradients that wait for each other, with `streaming`


@dataclass(frozen=True)
class Row:
    """One way to train, in bytes: each part at its largest, and all of them at the worst moment.

    The parts don't add up to `peak`, since they aren't largest at the same time: activations are
    gone when the last gradient comes.
    """

    mode: str
    weights: int
    gradients: int
    optimizer: int
    selection: int
    activations: int
    peak: int


@dataclass(frozen=True)
class Quotas:
    """What a run's steps choose.

    most     scalars that one step chooses, at the most
    chooses  whether there are steps that choose by their gradients
    rests    whether there are steps that choose nothing
    """

    most: int
    chooses: bool
    rests: bool

    @classmethod
    def of(cls, method: Method, budget: int) -> Quotas:
        """By going through a run of STEPS."""
        strategy, active, grown = method.strategy, 0, []
        if not (method.heuristic.uses_gradient or strategy.needs_steps):
            active = budget  # chosen before training
        for step in range(1, STEPS + 1):
            quota = strategy.quota(step, active, budget, STEPS)
            active += quota.grow - quota.drop
            grown.append(max(quota))
        return cls(max(grown), any(grown), not all(grown))


class Step:
    """One training step in one mode, from a model on the meta device.

    rests      whether it is one that chooses nothing, of those with gradients="sampled"
    head_only  whether the new head is all that is chosen from
    """

    def __init__(
        self,
        model: Any,
        method: Method,
        mode: str,
        device: str,
        rests: bool = False,
        head_only: bool = False,
    ) -> None:
        self.mode, self.device, self.rests = mode, device, rests
        self.selective = mode not in ("lora", "full")
        head = plan_model.head(model) if self.selective else set()
        self.model = plan_model.with_lora(model) if mode == "lora" else model
        named = dict(self.model.named_parameters())
        self.full = [p for n, p in named.items() if n in head]
        self.chosen = [p for n, p in named.items() if p.requires_grad and n not in head]
        if self.selective:
            if head_only:
                self.chosen, self.full = self.full, []
            self._narrow(named, method.include)
        self.eligible = sum(p.numel() for p in self.chosen)
        self.budget = method.resolve(self.eligible, len(self.chosen)) if self.selective else 0
        self.quotas = Quotas.of(method, self.budget)
        self.meter = Meter()
        self._held: list[Tensor] = []  # what the selection keeps for the run
        self._waiting: list[Tensor] = []  # gradients, with `streaming`

    def measure(self, batch: Mapping[str, Tensor]) -> Row:
        """The row of this mode, for a step with this batch."""
        meter = self.meter
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            meter.add(tensor, "weights")
        self.model.train()
        for parameter in (*self.chosen, *self.full):
            parameter.register_post_accumulate_grad_hook(self._arrived)
        # Twice: in a second step the optimiser's state is there from the start.
        answers = Answers()  # type: ignore[no-untyped-call]
        rests, streams = self.rests, self.mode in ("streaming", "sampled")
        if streams:
            products.watch(self.model, self.chosen)
        how = self.chosen if rests else (), self.chosen if streams and not rests else ()
        with meter, answers, Fused(self.device, *how):
            optimizer = self._optimizer()
            for _ in range(2):
                out = self.model(**batch)
                loss = getattr(out, "loss", None)
                (out[0].float().sum() if loss is None else loss).backward()
                del out, loss
                drafted = self._select()
                self._waiting.clear()
                with meter.making("optimizer"):
                    optimizer.step()
                del drafted
                optimizer.zero_grad()
                self.model.zero_grad()  # with `dense`, gradients are in the model
        return Row(mode=self.mode, peak=meter.peak, **{kind: meter.most[kind] for kind in PARTS})

    def _narrow(self, named: Mapping[str, nn.Parameter], patterns: tuple[str, ...]) -> None:
        """Choose from what matches; what isn't trained is frozen."""
        matching = {id(p) for n, p in named.items() if any(fnmatchcase(n, x) for x in patterns)}
        self.chosen = [p for p in self.chosen if id(p) in matching]
        if not self.chosen:
            raise UnmaskError(
                f"none of the {len(named)} parameters of this {type(self.model).__name__} can be "
                f"chosen from (the method's include={patterns}); take another method"
            )
        trained = {id(p) for p in (*self.chosen, *self.full)}
        for parameter in named.values():
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in trained)

    def _arrived(self, parameter: Tensor) -> None:
        if parameter.grad is None:  # it was sampled
            return
        self.meter.add(parameter.grad, "gradients")
        whole = any(parameter is p for p in self.full)
        if self.mode in ("streaming", "sampled") and not whole:
            self._waiting.append(parameter.grad)
            parameter.grad = None
            if sum(g.numel() * g.element_size() for g in self._waiting) >= TOGETHER:
                self._waiting.clear()

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = self.chosen if not self.selective else [self._vector(), *self.full]
        with self.meter.making("optimizer"):
            return torch.optim.AdamW(trained, foreach=self.device == "cuda")

    def _vector(self) -> nn.Parameter:
        with self.meter.making("selection"):
            values = nn.Parameter(torch.empty(self.budget, device="meta"))
            self._held = [_bytes(SLOT - 8 + ENTRY * self.rests, self.budget), values]
            self._held += [torch.empty_like(p) for p in self.full]  # their base, to go back to
        return values

    def _select(self) -> Any:
        """What the choice holds while it is made, and the gradient of the vector it gives."""
        if not self.selective:
            return None
        count = 0 if self.rests else self.quotas.most
        with self.meter.making("selection"):
            values = self._held[1]
            values.grad = torch.empty_like(values)
            choosing = _bytes(CANDIDATE, count), _bytes(1, WORKSPACE if count else 0)
            return choosing, _bytes(MAKING, self.budget)


def _bytes(each: int, count: int) -> Tensor:
    return torch.empty(each * count, dtype=torch.uint8, device="meta")
