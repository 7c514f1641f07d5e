"""Weight gradients at the slots alone, on steps that choose nothing; of embeddings, on steps that
choose, only the rows that a batch looks up.

While a module runs, stand-ins take its parameters' places. A stand-in that meets an
operation of `derivatives` has it done with the weights detached, so that autograd never forms their
gradients; what they need is kept, and backward computes the slots' share straight into the step's
draft. Anything else that is done with a stand-in is done with the parameter itself, and so is what
others do with the parameter outside of its module: those gradients come by streaming and add up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from unmask.derivatives import RULES, At, Role
from unmask.errors import UnmaskError
from unmask.hooks import Hook, transformed
from unmask.intake import LATE, Intake
from unmask.slots import Slots

OWN = ("sampler", "parameter", "place")  # a stand-in's own attributes
CALL = nn.Module._call_impl.__code__


class _Part(NamedTuple):
    """One operand's share in a call: the tensor's position, and what its gradient follows from."""

    place: int
    gradient: Callable[..., Tensor]
    kept: slice | None  # of the call's kept tensors; None: nothing, for the tensor had no slots


class Sampler:
    """Has backward compute gradients at the slots of `slots` alone on steps that settle, and on
    others those of embeddings by the rows that they have.

    settles  whether the step to come leaves the slots as they are; None if no step is to be sampled
    """

    def __init__(
        self, slots: Slots, intake: Intake, settles: Callable[[], bool] | None = None
    ) -> None:
        self._slots, self._intake = slots, intake
        self._settles = settles or (lambda: False)
        self._kinds = nn.Embedding if settles is None else nn.Module
        self._table: tuple[Tensor | None, dict[int, At]] = (None, {})

    def watch(self, model: nn.Module) -> list[Callable[[], None]]:
        """Stand in for the model's eligible parameters from now on; returns what ends that."""
        tensors = self._slots.eligible.tensors
        places = {id(parameter): k for k, parameter in enumerate(tensors)}
        ends: list[Callable[[], None]] = []
        for module in model.modules():
            own = [
                (name, parameter, places[id(parameter)])
                for name, parameter in module._parameters.items()
                if parameter is not None and id(parameter) in places
            ]
            apt = isinstance(module, self._kinds) and not isinstance(module, torch.jit.ScriptModule)
            if own and apt:
                before, after = Hook(self._stand_in, own), Hook(_restore, own)
                ends.append(partial(_restore, module, own))  # after an interrupt no hook has
                ends.append(module.register_forward_pre_hook(before).remove)
                ends.append(module.register_forward_hook(after, always_call=True).remove)
        return ends

    def _stand_in(self, module: nn.Module, own: Own) -> None:
        if not torch.is_grad_enabled() or transformed():
            return
        if not isinstance(module, nn.Embedding) and not self._settles():
            return
        for name, parameter, place in own:
            here = module._parameters.get(name) is parameter  # this is no copy, no functional_call
            if here and parameter.requires_grad and not parameter._backward_hooks:
                # An alias, not detached: what slips past __torch_function__ still has a gradient.
                stand = parameter.as_subclass(_StandIn)
                stand.sampler, stand.parameter, stand.place = self, parameter, place
                module._parameters[name] = stand  # type: ignore[assignment]

    def run(
        self, function: Callable[..., Any], args: Any, kwargs: Any, roles: Sequence[Role]
    ) -> Tensor:
        """The operation's result, with the gradients of these operands taken care of."""
        if not self._settles():
            operand, *_, instead = roles[0]
            if instead is None:
                return _again(function, args, kwargs)  # type: ignore[no-any-return]
            return instead(operand.parameter)
        output = function(*_with(args, _detached), **_with(kwargs, _detached))
        table = self._at(self._slots.index)
        parts: list[_Part] = []
        kept: list[Tensor] = []
        for operand, gradient, needs, _ in roles:
            start = len(kept)
            if operand.place in table:
                kept += [x.detach() for x in needs]
            where = slice(start, len(kept)) if operand.place in table else None
            parts.append(_Part(operand.place, gradient, where))
        parameters = [role.operand.parameter for role in roles]
        gate = _Gate.apply(self, parts, kept, output.detach(), *parameters)  # type: ignore[no-untyped-call]
        return _Tap.apply(output, gate)  # type: ignore[no-any-return,no-untyped-call]

    def arrive(self, dy: Tensor, parts: Sequence[_Part], kept: Sequence[Tensor]) -> None:
        """Backward has come to an operation's output: its share in the draft's gradient."""
        draft = self._intake.sampling()
        if draft is None:
            return
        table = self._at(draft.kept)
        for place, gradient, where in parts:
            found = None
            if place in table:
                if where is None:
                    raise UnmaskError(LATE)
                found = gradient(dy, table[place], *kept[where])
            self._intake.add(place, found)

    def _at(self, index: Tensor) -> dict[int, At]:
        """Tensor position -> where its slots are, for these sorted global indices."""
        if self._table[0] is not index:
            eligible, table = self._slots.eligible, {}
            for k, start, stop in eligible.split(index):
                tensor = eligible.tensors[k]
                here = index[start:stop].to(tensor.device)
                table[k] = At(here, tensor.shape, eligible.offsets[k])
            self._table = (index, table)
        return self._table[1]


Own = list[tuple[str, nn.Parameter, int]]  # a module's own parameters, with their positions


class _StandIn(Tensor):
    """A parameter for the time of its module's forward; whoever looks at it sees the parameter."""

    sampler: Sampler
    parameter: nn.Parameter
    place: int
    _is_param = True  # what isinstance(..., nn.Parameter) goes by

    def __getattr__(self, name: str) -> Any:
        if name in OWN:
            raise AttributeError(name)
        return getattr(self.parameter, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.parameter, name, value)

    def __deepcopy__(self, memo: Any) -> Any:
        return deepcopy(self.parameter, memo)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = all(kind in (cls, Tensor, nn.Parameter) for kind in types)
        roles = _roles(func, args, kwargs) if known else []
        if roles and not _checkpointed():
            return roles[0].operand.sampler.run(func, args, kwargs, roles)
        return _again(func, args, kwargs)


def _checkpointed() -> bool:
    """Whether the module at work runs this part of its forward under `checkpoint`, which in
    backward runs it again by itself: then it meets parameters, and would have to find the same."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code is not CALL:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def _roles(function: Any, args: Any, kwargs: Any) -> list[Role]:
    """What the stand-ins among the arguments are to the call, if a rule knows them all."""
    rule = RULES.get(function)
    try:
        roles = None if rule is None else rule(*args, **kwargs)
    except TypeError:  # a form of the call that the rule doesn't know
        return []
    roles = [role for role in roles or () if isinstance(role.operand, _StandIn)]
    count = sum(isinstance(x, _StandIn) for x in (*args, *kwargs.values()))
    return roles if len(roles) == count else []


def _with(x: Any, form: Callable[[_StandIn], Tensor]) -> Any:
    """The arguments with another form of each stand-in."""
    if isinstance(x, _StandIn):
        return form(x)
    if type(x) in (list, tuple):
        return type(x)(_with(y, form) for y in x)
    return {name: _with(y, form) for name, y in x.items()} if type(x) is dict else x


def _again(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The call with the parameters themselves."""
    return function(*_with(args, _itself), **_with(kwargs, _itself))


def _itself(stand: _StandIn) -> Tensor:
    return stand.parameter


def _detached(stand: _StandIn) -> Tensor:
    return stand.parameter.detach()


class _Tap(torch.autograd.Function):
    """An operation's output, unchanged; its gradient goes to the gate, too."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gate: Tensor) -> Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise UnmaskError(
                "backward(create_graph=True) on a step that selects nothing, but there "
                "gradients='sampled' computes first derivatives only; give "
                "attach(..., gradients='streaming')"
            )
        return dy, dy


class _Gate(torch.autograd.Function):
    """Stands between an operation and its parameters: opens where backward would come to them, and
    not, say, for torch.autograd.grad() of the input alone."""

    @staticmethod
    def forward(
        ctx: Any, sampler: Sampler, parts: Any, kept: Any, output: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.sampler, ctx.parts = sampler, parts
        ctx.save_for_backward(*kept)
        return output.new_zeros(()).expand(output.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        leaves = [node for node, _ in ctx.next_functions[-len(ctx.parts) :]]
        try:
            wanted = [torch._C._will_engine_execute_node(leaf) for leaf in leaves]
        except RuntimeError as problem:
            raise UnmaskError(
                "torch.autograd.grad() of a weight on a step that selects nothing, but there "
                "gradients='sampled' computes no whole gradient; give "
                "attach(..., gradients='streaming')"
            ) from problem
        parts = [part for part, want in zip(ctx.parts, wanted, strict=True) if want]
        ctx.sampler.arrive(dy, parts, ctx.saved_tensors)
        return (None,) * (4 + len(leaves))


def _restore(module: nn.Module, own: Own, _: Any = None) -> None:
    for name, parameter, _ in own:
        if isinstance(module._parameters.get(name), _StandIn):
            module._parameters[name] = parameter
