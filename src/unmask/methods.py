"""The named methods: each only a composition of a heuristic, a strategy and a scope."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from unmask.errors import UnmaskError
from unmask.heuristics import (
    D3,
    Candidates,
    Cover,
    DiffPruning,
    Fisher,
    Gradient,
    Magnitude,
    Movement,
    Principal,
    Random,
    Taylor,
)
from unmask.method import Budget as Budget
from unmask.method import Method as Method
from unmask.schedules import Schedule, Uniform
from unmask.scopes import PerTensor
from unmask.strategies import DropGrow, Increment, Repeat, Reselect, Static

__all__ = [
    "bitfit",
    "diff_pruning",
    "fish",
    "full",
    "id3",
    "lift",
    "lt_sft",
    "pafi",
    "random_mask",
    "repeat_d3",
    "sft_ag",
    "sft_ma",
    "shira",
    "sparse_adapter",
    "static_d3",
    "super_tuning",
]


def id3(
    budget: Budget, exp: float = 2.0, eps: float = 1.0, schedule: Schedule | None = None
) -> Method:
    """ID3: increment-S with D3. Λ_{t+1} = Λ_t ∪ top-u_t of |∇θ| / (|θ| + ε)^exp over masked
    scalars.

    Source: Agarwal et al., "Step-by-Step Unmasking", TACL 2025, arXiv 2408.14470, Algorithm 1.
    """
    return Method(D3(exp, eps), Increment(Uniform() if schedule is None else schedule), budget)


def static_d3(budget: Budget, exp: float = 2.0, eps: float = 1.0) -> Method:
    """static-S with D3: the top-B at the first step, kept. ID3 with T = 1 step of selection.

    Source: the ID3 paper's Figure 2 (top), arXiv 2408.14470.
    """
    return Method(D3(exp, eps), Static(), budget)


def repeat_d3(budget: Budget, exp: float = 2.0, eps: float = 1.0) -> Method:
    """repeat-S with D3: the top-B anew at every step; the scalars ever touched exceed B.

    Source: the ID3 paper's Figure 2 (middle) and Section 6, arXiv 2408.14470.
    """
    return Method(D3(exp, eps), Repeat(), budget)


def pafi(budget: Budget) -> Method:
    """PaFi: the B weights of smallest magnitude, chosen once; needs no data.

    Source: Liao et al., ACL 2023, arXiv 2305.16742.
    """
    return Method(Magnitude(largest=False), Static(), budget)


def bitfit(budget: Budget = 1.0) -> Method:
    """BitFit: every bias (parameters named `*bias`); with a smaller budget, those of largest |∇θ|.

    Source: Ben Zaken et al., ACL 2022, arXiv 2106.10199.
    """
    return Method(Gradient(), Static(), budget, include=("*bias",))


def random_mask(budget: Budget, seed: int = 0) -> Method:
    """R-Mask: B scalars drawn at random, once; the baseline every heuristic must beat.

    Source: the ID3 paper's Table 1 (R-Mask), arXiv 2408.14470.
    """
    return Method(Random(seed), Static(), budget)


def full(budget: Budget = 1.0) -> Method:
    """Full fine-tuning: budget = all eligible scalars, which is the base optimiser itself."""
    return Method(Gradient(), Static(), budget)


def fish(
    budget: Budget,
    num_samples: int = 1024,
    sample_type: str = "label",
    grad_type: str = "square",
    seed: int = 0,
) -> Method:
    """FISH Mask: the B scalars of largest Fisher information 1/n Σ_k (∇θ log p(y_k | x_k))², once,
    from `calibration=`.

    Source: Sung et al., NeurIPS 2021, arXiv 2111.09839.
    """
    return Method(Fisher(num_samples, sample_type, grad_type, seed), Static(), budget)


def diff_pruning(
    budget: Budget, lr: float = 5e-5, penalty: float = 1.25e-7, passes: int = 1, seed: int = 0
) -> Method:
    """Diff pruning: train θ_0 + z⊙w with an L0 penalty on the gates z on `calibration=`, keep the B
    scalars of largest |z·w|, rewind, train those.

    Source: Guo et al., ACL 2021, arXiv 2012.07463.
    """
    return Method(DiffPruning(lr, penalty=penalty, passes=passes, seed=seed), Static(), budget)


def lt_sft(budget: Budget, lr: float = 5e-5, passes: int = 1, optimizer: str = "AdamW") -> Method:
    """LT-SFT, a lottery ticket: train in full on `calibration=`, keep the B scalars of largest
    |θ_full - θ_0|, rewind, train those.

    Source: Ansell et al., "Composable Sparse Fine-Tuning", ACL 2022, arXiv 2110.07560.
    """
    return Method(Movement(optimizer, lr, passes), Static(), budget)


def sparse_adapter(budget: Budget, pruner: str = "snip", seed: int = 0) -> Method:
    """SparseAdapter: prune at initialisation, keeping the B scalars of largest |θ·∇θ| on the first
    batch (SNIP); or of largest |θ| (pruner="magnitude"), or at random.

    Source: He et al., EMNLP Findings 2022, arXiv 2210.04284.
    """
    pruners = {"snip": Taylor(), "magnitude": Magnitude(largest=True), "random": Random(seed)}
    if pruner not in pruners:
        raise UnmaskError(
            f"sparse_adapter was asked for pruner={pruner!r}; it is one of {', '.join(pruners)}"
        )
    return Method(pruners[pruner], Static(), budget)


def sft_ag(
    budget: Budget, every: int = 20, window: int = 5, rate: float = 0.2, decay: str = "linear"
) -> Method:
    """SpIEL-AG: per tensor; every k steps the share rate·(1 - t/T) that moved least is dropped,
    back to θ_0, and as many are grown by |Σ ∇θ| over the last `window` steps among the best
    candidates.

    Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", arXiv 2401.16405.
    """
    grow = Candidates(window, every)
    return Method(grow, DropGrow(every, rate, decay, first=window), budget, scope=PerTensor())


def sft_ma(
    budget: Budget, every: int = 20, rate: float = 0.2, decay: str = "linear", first: int = 5
) -> Method:
    """SpIEL-MA: per tensor; every k steps the share rate·(1 - t/T) that moved least is dropped,
    back to θ_0, and as many are grown by √(r_i·c_j), SM3's estimate of the momentum by rows and
    columns.

    Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", arXiv 2401.16405.
    """
    return Method(Cover(), DropGrow(every, rate, decay, first), budget, scope=PerTensor())


def super_tuning(budget: Budget, largest: bool = True) -> Method:
    """Super-Tuning: of each tensor its share of B, the largest |θ| (largest=False: the smallest),
    once; needs no data.

    Source: arXiv 2607.09287; in Hugging Face PEFT as `SupertuningConfig`.
    """
    return Method(Magnitude(largest), Static(), budget, scope=PerTensor())


def shira(budget: Budget, seed: int = 0) -> Method:
    """SHiRA with a random mask: r·(m + n) scalars of each m x n matrix at random, where B = r·Σ(m
    + n).

    Source: Bhardwaj et al., "Sparse High Rank Adapters", NeurIPS 2024, arXiv 2406.13175.
    """
    return Method(Random(seed), Static(), budget, scope=PerTensor(by="sides"))


def lift(budget: Budget, rank: int = 128, every: int = 400) -> Method:
    """LIFT: of each m x n matrix the largest |W_r|, its nearest matrix of rank r, in number as m +
    n; chosen anew every k steps, what stays keeping its optimiser state.

    Source: Liu et al., "LIFT the Veil for the Truth", ICML 2025, arXiv 2506.00772.
    """
    return Method(Principal(rank), Reselect(every), budget, scope=PerTensor(by="sides"))


class Description(NamedTuple):
    """A named method in words: what it trains, what that takes beyond the weights, whose it is."""

    name: str
    formula: str
    memory: str
    source: str


def describe(name: str) -> Description:
    """The named method's formula and source, from its docstring, and its memory, from its parts.

    >>> describe("pafi").memory
    '28 bytes x B; no gradient to choose'
    """
    build = globals()[name]
    said, _, source = (inspect.getdoc(build) or "").partition("Source:")
    method: Method = build(budget=0.5)
    # Value, gradient, base, position and index, AdamW's two moments, 4 bytes each.
    size = "N" if inspect.signature(build).parameters["budget"].default == 1.0 else "B"
    memory = [f"28 bytes x {size}"]
    if isinstance(method.strategy, Repeat | Reselect):
        memory.append("8 bytes for each scalar that left")
    if method.heuristic.memory:
        memory.append(method.heuristic.memory)
    if not method.heuristic.uses_gradient:
        memory.append("no gradient to choose")
    else:
        every = getattr(method.strategy, "every", 1)
        when = "at the first step" if method.strategy.once else "at every step"
        if every > 1 and not method.heuristic.watches(every):
            when = "when it chooses"
        memory.append(f"reads all gradients {when}")
    plain = (" ".join(part.split()) for part in (said, "; ".join(memory), source))
    return Description(name, *plain)
