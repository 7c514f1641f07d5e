"""`--peft lora:r=8,target=all-linear`: other methods' modules in a model, there to choose from."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from unmask.errors import UnmaskError
from unmask.integrations import adapters
from unmask.recipes.parse import convert, parse_wrapper

# Fields of PEFT's configs that a run fills in by itself, or that nothing would come of here.
OURS = {"modules_to_save", "total_step"}


def wrap(text: str, model: Any, steps: int) -> Any:
    """Put the modules that `text` names into the model, in place, and freeze all else; returns
    PEFT's tuner, none for bottleneck adapters.

    Parameters of the head keep their names. `steps` is the run's number, which AdaLoRA asks for.
    """
    kind, options = parse_wrapper(text)
    try:
        if kind in adapters.KINDS:
            known = {"after": typing.get_type_hints(adapters.add)["after"], **_adapter_fields()}
            adapters.add(model, kind, **_chosen(kind, options, known))  # type: ignore[arg-type]
            return None
        return _in_peft(kind, options, model, steps)
    except (ValueError, TypeError, ImportError) as problem:
        if isinstance(problem, UnmaskError):
            raise UnmaskError(f"--peft {text}: {problem}") from problem
        said = " ".join(str(problem).split()).split(". ")[0]
        linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        layers = {name.rpartition(".")[2] for name in linear.difference(_head(model))}
        raise UnmaskError(
            f"--peft {text}: {said}; the linear layers of this {type(model).__name__} are called "
            f"{', '.join(sorted(layers))}"
        ) from problem


def check_mergeable(text: str) -> None:
    """Refuse what can't become plain weights."""
    if (kind := parse_wrapper(text)[0]) in adapters.KINDS:
        raise UnmaskError(
            f"the delta is inside {kind} adapters, which have a nonlinearity and can't be merged "
            "into plain weights; `unmask evaluate` measures such a run, and in Python "
            "unmask.integrations.adapters.add() and Delta.apply() build its model"
        )


def check_ranked(model: nn.Module) -> None:
    """Refuse AdaLoRA without the gradients that it ranks by."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name and not parameter.requires_grad:
            raise UnmaskError(
                f"AdaLoRA ranks by the gradients of all that it put in, and {name!r} isn't "
                "eligible; leave out --include and --exclude, or take lora"
            )


def _in_peft(kind: str, options: Mapping[str, Sequence[str]], model: Any, steps: int) -> Any:
    try:
        import peft
    except ImportError as problem:
        raise UnmaskError(f'{kind} needs PEFT; pip install "unmask[peft]"') from problem
    make: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind.upper()]]
    hints, common = typing.get_type_hints(make), {f.name for f in fields(peft.PeftConfig)}
    unused = OURS | common | ({"r"} if kind == "adalora" else set())
    named = [f.name for f in fields(make) if f.name not in unused]
    known = {name: hints[name] for name in named if _is_plain(hints[name])}
    asked = _chosen(kind, options, known)
    # The head is trained whole, and its names must stay.
    spared, head = asked.get("exclude_modules"), _head(model)
    if isinstance(spared, str):  # a regular expression
        asked["exclude_modules"] = "|".join([spared, *map(re.escape, head)])
    else:
        asked["exclude_modules"] = [*(spared or ()), *head]
    if kind == "adalora":
        asked["total_step"] = steps
    config = make(task_type="SEQ_CLS", **asked)
    if kind == "adalora":
        if config.init_r < config.target_r:
            raise UnmaskError(
                f"init_r={config.init_r} is below target_r={config.target_r}, the mean rank in "
                "the end; give init_r above it"
            )
        model.register_forward_hook(_Orthogonal(config.orth_reg_weight))
    return peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, "default")


@dataclass(frozen=True)
class _Orthogonal:
    """AdaLoRA's part of the loss, as PEFT has it: weight times the mean of ‖P·Pᵀ - 1‖ over all A
    and Bᵀ, without which singular values would mean nothing."""

    weight: float

    def __call__(self, model: nn.Module, _: Any, out: Any) -> None:
        if getattr(out, "loss", None) is None:
            return
        sides = [
            p if ".lora_A." in name else p.T
            for name, p in model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        ]
        off = [torch.linalg.norm(p @ p.T - torch.eye(len(p)).to(p)) for p in sides]
        out.loss = out.loss + self.weight * torch.stack(off).mean()


def _chosen(
    kind: str, options: Mapping[str, Sequence[str]], known: Mapping[str, Any]
) -> dict[str, Any]:
    """The options by the fields' whole names, as the types that these have."""
    chosen: dict[str, Any] = {}
    for short, pieces in options.items():
        names = (short, f"init_{short}", f"lora_{short}", f"use_{short}", f"{short}_modules")
        field = next((name for name in names if name in known), None)
        if field is None:
            near = get_close_matches(short, known, 1)
            raise UnmaskError(
                f"{kind} has no {short!r}{f' (did you mean {near[0]!r}?)' if near else ''}; "
                f"there are {', '.join(known)}, also without lora_, use_ and _modules"
            )
        if field in chosen:
            raise UnmaskError(f"{field} is given twice; give it once")
        chosen[field] = _converted(pieces, known[field], short)
    return chosen


def _converted(pieces: Sequence[str], hint: Any, key: str) -> Any:
    for part in (hint, *typing.get_args(hint)):
        if typing.get_origin(part) in (list, Sequence):
            # A regular expression, or a word of PEFT's own, is no list of names.
            if pieces[0] == "all-linear" or set(pieces[0]) & set("*+?^$|()[]\\"):
                return pieces[0] if len(pieces) == 1 else list(pieces)
            return [convert(piece, typing.get_args(part)[0], key, "--peft") for piece in pieces]
    return convert(",".join(pieces), hint, key, "--peft")


def _is_plain(hint: Any) -> bool:
    """Whether a value can be written in a line of text: no configs within configs."""
    return any(
        part in (bool, int, float, str) or typing.get_origin(part) in (list, typing.Literal)
        for part in (hint, *typing.get_args(hint))
    )


def _adapter_fields() -> dict[str, Any]:
    hints = typing.get_type_hints(adapters.Bottleneck.__init__)
    declared = inspect.signature(adapters.Bottleneck).parameters
    return {key: hints[key] for key in declared if key not in ("width", "activation")}


def _head(model: Any) -> list[str]:
    """Modules outside the pretrained body, by what transformers calls that."""
    body = f"{model.base_model_prefix}."
    if not hasattr(model, model.base_model_prefix):
        return []  # it is the body itself
    return [
        name
        for name, module in model.named_modules()
        if name
        and not f"{name}.".startswith(body)
        and any(True for _ in module.parameters(recurse=False))
    ]
