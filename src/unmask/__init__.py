"""Selective fine-tuning: train a chosen few of a model's own weights, exactly.

>>> import unmask
>>> unmask.id3(budget=320_000).strategy
Increment(schedule=Uniform())
"""

from unmask.delta import Delta
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.heuristics import D3, Gradient, Heuristic, Magnitude, Random, Scalars
from unmask.methods import Method, bitfit, full, id3, pafi, random_mask, repeat_d3, static_d3
from unmask.schedules import Schedule, Strided, Uniform
from unmask.scopes import Global, Scope
from unmask.strategies import Increment, Quota, Repeat, Static, Strategy
from unmask.tuner import Tuner, attach

__version__ = "0.1.0"

__all__ = [
    "D3",
    "Delta",
    "Global",
    "Gradient",
    "Heuristic",
    "Increment",
    "Magnitude",
    "Method",
    "Quota",
    "Random",
    "Repeat",
    "Scalars",
    "Schedule",
    "Scope",
    "Static",
    "Strategy",
    "Strided",
    "Tuner",
    "Uniform",
    "UnmaskError",
    "UnmaskWarning",
    "attach",
    "bitfit",
    "full",
    "id3",
    "pafi",
    "random_mask",
    "repeat_d3",
    "static_d3",
]
