"""What a run will take in memory, part by part and mode by mode, before any weight is loaded.

For each mode a step of the very model runs on the meta device, where tensors have sizes and no
bytes (`plan_model`, `plan_blank`), while every storage is metered (`plan_meter`, `plan_step`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from unmask.errors import UnmaskError
from unmask.methods import Budget
from unmask.recipes import choose, plan_model, wrappers
from unmask.recipes.config import METHOD_PARTS
from unmask.recipes.plan_step import PARTS, STEPS, Row, Step

__all__ = ["DEVICES", "DTYPES", "MODES", "PARTS", "Plan", "Row", "parse_memory", "plan"]

MODES = ("dense", "streaming", "sampled", "lora", "full")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda")
UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}} | {
    f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)
}


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `rows` are in the order of MODES.

    resting  the peak of the sampled mode's steps that choose nothing; none if all steps choose
    before   what the method needs before training, in words; the rows don't count it
    """

    model: str
    method: str
    peft: str | None
    parameters: int
    eligible: int
    budget: int
    batch_size: int
    sequence_length: int
    dtype: str
    device: str
    rows: tuple[Row, ...]
    resting: int | None
    before: str | None

    def fitting(self, memory: int) -> tuple[str, ...]:
        """The modes whose peak is within so many bytes."""
        return tuple(row.mode for row in self.rows if row.peak <= memory)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan(
    model: str,
    method: str = "id3",
    budget: Budget = 38_000,
    batch_size: int = 16,
    sequence_length: int = 128,
    dtype: str = "fp32",
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
    peft: str | None = None,
) -> Plan:
    """Memory of a training step with AdamW for each of MODES, from the model's config alone.

    The model has a new head, as `unmask train` gives it. No row for LoRA where PEFT isn't there or
    refuses the model.

    model     a folder with a config.json, a hub id, or a config of transformers
    device    one of DEVICES: where training will run, which decides how attention is computed
    settings  parts of the method by dotted key, as in `choose.method`
    peft      modules to choose from instead, as in `wrappers.wrap`; the rows for LoRA and full
              fine-tuning are of the model without
    """
    for name, count in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if count < 1:
            raise UnmaskError(f"{name}={count}; it is a whole number, 1 or more")
    for name, value, allowed in (("dtype", dtype, (*DTYPES,)), ("device", device, DEVICES)):
        if value not in allowed:
            raise UnmaskError(f"{name}={value!r}; it is one of {', '.join(allowed)}")
    for key in settings or ():
        if key.split(".")[0] not in METHOD_PARTS:
            raise UnmaskError(
                f"--set {key}: a plan knows the method's own keys, under "
                f"{', '.join(sorted(METHOD_PARTS))}; leave others to `unmask train`"
            )
    config = plan_model.config(model)
    built = choose.method(method, budget, settings or {})

    def step(mode: str, resting: bool = False) -> Step:
        fresh = plan_model.build(config, DTYPES[dtype])
        if peft is not None and mode not in ("lora", "full"):
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of others, about weights that aren't there
                wrappers.wrap(peft, fresh, STEPS)
        return Step(fresh, built, mode, device, resting, method == choose.HEAD)

    def row(made: Step) -> Row:
        try:
            return made.measure(plan_model.batch(made.model, batch_size, sequence_length))
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as problem:
            if isinstance(problem, UnmaskError):
                raise
            raise UnmaskError(
                f"a step of {type(made.model).__name__} can't be planned with batch_size="
                f"{batch_size}, sequence_length={sequence_length}: {plan_model.said(problem)}"
            ) from problem

    first = step("dense")
    parameters = sum(p.numel() for p in first.model.parameters())
    rows = {"dense": row(first)}
    rests = row(step("sampled", resting=True)) if first.quotas.rests else None
    for mode in MODES[1:]:
        if mode == "sampled" and rests is not None and not first.quotas.chooses:
            rows[mode] = rests
        elif mode == "sampled":
            rows[mode] = replace(rows["streaming"], mode=mode)  # the same where it chooses
        elif mode != "lora" or plan_model.can_lora(plan_model.build(config, DTYPES[dtype])):
            rows[mode] = row(step(mode))
    return Plan(
        model=model if isinstance(model, str) else type(config).__name__,
        method=method,
        peft=peft,
        parameters=parameters,
        eligible=first.eligible,
        budget=first.budget,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=dtype,
        device=device,
        rows=tuple(rows.values()),
        resting=None if rests is None else rests.peak,
        before=_before_training(method),
    )


def _before_training(method: str) -> str | None:
    """As the method's own description has it."""
    said = next(row.memory for row in choose.catalogue() if row.name == method)
    found = [part.partition("before training, ")[2] for part in said.split("; ")]
    return next(filter(None, found), None)


def parse_memory(text: str) -> int:
    """Bytes: "24GB" is 24 * 1000^3, "24GiB" is 24 * 1024^3.

    >>> parse_memory("1.5 KiB")
    1536
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    size = float(match[1]) * UNITS.get(match[2].upper(), math.nan) if match else math.nan
    if not math.isfinite(size):
        raise UnmaskError(f"{text!r} is no amount of memory; write 24GB, 80GiB or 512MB, say")
    return int(size)
