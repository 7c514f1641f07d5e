"""How much a scalar matters: score(scalars) -> one float32 number each, the higher the better.

base     the interface
formulas  of the weight and the gradient at hand
memory   of gradients seen over several steps
data     of batches seen before training
"""

from unmask.heuristics.base import Heuristic, Scalars, Whole
from unmask.heuristics.data import Calibrated, DiffPruning, Fisher, Movement
from unmask.heuristics.formulas import (
    D3,
    Biases,
    Gradient,
    Magnitude,
    Principal,
    Random,
    SquaredGradient,
    Taylor,
)
from unmask.heuristics.memory import Accumulated, Candidates, Cover, Smoothed

__all__ = [
    "D3",
    "Accumulated",
    "Biases",
    "Calibrated",
    "Candidates",
    "Cover",
    "DiffPruning",
    "Fisher",
    "Gradient",
    "Heuristic",
    "Magnitude",
    "Movement",
    "Principal",
    "Random",
    "Scalars",
    "Smoothed",
    "SquaredGradient",
    "Taylor",
    "Whole",
]
