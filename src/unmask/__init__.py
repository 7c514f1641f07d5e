"""Selective fine-tuning: train a chosen few of a model's own weights, exactly.

>>> import unmask
>>> unmask.id3(budget=320_000).strategy
Increment(schedule=Uniform())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time a name is imported when it is first used: torch takes a second
    from unmask.algebra import Overlap, compose, distance, intersect, overlap, subtract
    from unmask.calibrate import Calibration
    from unmask.delta import Delta
    from unmask.errors import UnmaskError, UnmaskWarning
    from unmask.heuristics import (
        D3,
        Accumulated,
        Biases,
        Calibrated,
        Candidates,
        Cover,
        DiffPruning,
        Fisher,
        Gradient,
        Heuristic,
        Magnitude,
        Movement,
        Principal,
        Random,
        Scalars,
        Smoothed,
        SquaredGradient,
        Taylor,
        Whole,
    )
    from unmask.method import Method
    from unmask.methods import (
        bitfit,
        diff_pruning,
        fish,
        full,
        id3,
        lift,
        lt_sft,
        pafi,
        random_mask,
        repeat_d3,
        sft_ag,
        sft_ma,
        shira,
        sparse_adapter,
        static_d3,
        super_tuning,
    )
    from unmask.schedules import (
        Cosine,
        Cubic,
        Custom,
        Exponential,
        FrontLoaded,
        Linear,
        Plateau,
        Schedule,
        Strided,
        Uniform,
    )
    from unmask.scopes import Bounded, Global, PerLayer, PerTensor, Scope
    from unmask.strategies import DropGrow, Increment, Quota, Repeat, Reselect, Static, Strategy
    from unmask.tuner import Tuner, attach
    from unmask.units import Units

__version__ = "0.1.0"

__all__ = [
    "D3",
    "Accumulated",
    "Biases",
    "Bounded",
    "Calibrated",
    "Calibration",
    "Candidates",
    "Cosine",
    "Cover",
    "Cubic",
    "Custom",
    "Delta",
    "DiffPruning",
    "DropGrow",
    "Exponential",
    "Fisher",
    "FrontLoaded",
    "Global",
    "Gradient",
    "Heuristic",
    "Increment",
    "Linear",
    "Magnitude",
    "Method",
    "Movement",
    "Overlap",
    "PerLayer",
    "PerTensor",
    "Plateau",
    "Principal",
    "Quota",
    "Random",
    "Repeat",
    "Reselect",
    "Scalars",
    "Schedule",
    "Scope",
    "Smoothed",
    "SquaredGradient",
    "Static",
    "Strategy",
    "Strided",
    "Taylor",
    "Tuner",
    "Uniform",
    "Units",
    "UnmaskError",
    "UnmaskWarning",
    "Whole",
    "attach",
    "bitfit",
    "compose",
    "diff_pruning",
    "distance",
    "fish",
    "full",
    "id3",
    "intersect",
    "lift",
    "lt_sft",
    "overlap",
    "pafi",
    "random_mask",
    "repeat_d3",
    "sft_ag",
    "sft_ma",
    "shira",
    "sparse_adapter",
    "static_d3",
    "subtract",
    "super_tuning",
]

# Where the names are defined; what needs no torch comes first.
_MODULES = (
    "errors",
    "schedules",
    "strategies",
    "heuristics",
    "scopes",
    "units",
    "method",
    "methods",
    "calibrate",
    "delta",
    "algebra",
    "tuner",
)


if not TYPE_CHECKING:  # else a name that isn't there would be of type Any

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"unmask.{name}")
        if name in __all__:
            for module in _MODULES:
                if (found := getattr(import_module(f"unmask.{module}"), name, None)) is not None:
                    globals()[name] = found
                    return found
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
