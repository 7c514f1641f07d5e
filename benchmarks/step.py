"""The exact ID3 step, gradients given: choose among all scalars, gather, update, write back.

Beside it, in the same run and in turn: one read of gradients and weights (a plain sum over the same
buffers), a dense AdamW step, and the authors' procedure with dense masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import unmask
from benchmarks import common

BUDGET, STEPS = 320_000, 1000
AT = {"early": 0.05, "middle": 0.5, "late": 0.95}
EXPONENTS = (2.0, 1.0, 0.0, -1.0, 0.7, -0.7)
BUDGETS = (10_000, 100_000, 1_000_000, 10_000_000)
LAYERS = (2, 6, 12, 24)
KINDS = [{"rests": rests, "fused": fused} for rests in (False, True) for fused in (False, True)]


@dataclass(frozen=True)
class From(unmask.Schedule):
    """Uniform, but the first step unmasks what a run would have after `start` steps; and that is
    all where it `rests`."""

    start: int
    rests: bool = False

    def target(self, step: int, steps: int, budget: int) -> int:
        done = self.start + (0 if self.rests else step)
        return budget * min(done, steps) // steps


def read(model: nn.Module) -> Callable[[], object]:
    """One pass over gradients and weights."""

    def action() -> list[torch.Tensor]:
        parts = []
        for p in model.parameters():
            assert p.grad is not None
            parts += [p.grad.sum(), p.detach().sum()]
        return parts

    return action


def selective(
    model: nn.Module,
    share: float = 0.5,
    budget: int = BUDGET,
    exp: float = 2.0,
    fused: bool = False,
    rests: bool = False,
    anew: bool = False,
) -> tuple[unmask.Tuner, Callable[[], object]]:
    """ID3 at that share of its run, or a method that chooses all anew at each step; its first step,
    which catches up, is taken here."""
    method = unmask.id3(budget=budget, exp=exp, schedule=From(round(share * STEPS), rests))
    if anew:
        method = unmask.repeat_d3(budget=budget, exp=exp)
    tuner = unmask.attach(model, method, steps=STEPS)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-4, fused=fused)
    optimizer.step()
    return tuner, optimizer.step


def dense(model: nn.Module, fused: bool = False) -> Callable[[], object]:
    """Full fine-tuning's step."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused).step


def authors(model: nn.Module, share: float = 0.5) -> Callable[[], object]:
    """ID3 as its authors' toolkit does it, restated: all scores in one tensor, what is unmasked out
    of the question, topk, a mask as large as the model, gradients multiplied by it, dense AdamW."""
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    masks = [torch.zeros(p.numel(), dtype=torch.bool) for p in parameters]
    chosen = torch.randperm(total)[: round(share * BUDGET)]
    joined = torch.zeros(total, dtype=torch.bool)
    joined[chosen] = True
    masks = [m.view_as(p) for m, p in zip(joined.split([m.numel() for m in masks]), parameters)]  # noqa: B905
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    @torch.no_grad()
    def action() -> None:
        scores = []
        for p, mask in zip(parameters, masks, strict=True):
            assert p.grad is not None
            score = p.grad.abs() / (p.abs() + 1.0) ** 2.0
            score[mask] = -1.0
            scores.append(score.view(-1))
        best = torch.topk(torch.cat(scores), BUDGET // STEPS).indices
        fresh = torch.zeros(total, dtype=torch.bool)
        fresh[best] = True
        at = 0
        for p, mask in zip(parameters, masks, strict=True):
            assert p.grad is not None
            mask |= fresh[at : at + p.numel()].view_as(mask)
            p.grad.mul_(mask)
            at += p.numel()
        optimizer.step()

    return action


def compared(
    shape: str, dtype: torch.dtype, repeats: int, with_authors: bool, budget: int = BUDGET
) -> dict[str, Any]:
    """Times of one model's steps, seconds a round, by name."""
    common.say(f"the step of {shape} {dtype}")
    model = common.bert(shape, dtype, dropout=0.0)
    gradients = common.Gradients(model)
    gradients.fresh()
    times: dict[str, list[float]] = {}
    for when, share in AT.items():
        tuner, step = selective(model, share, budget)
        actions = {"read": read(model), f"id3 {when}": step}
        if when == "middle":  # beside the others, all in turn
            actions |= {"adamw": dense(model), "adamw fused": dense(model, fused=True)}
            if with_authors:  # last of a round, since it masks the gradients
                actions["authors"] = authors(model)
        found = common.interleaved(actions, repeats, gradients.fresh)
        times |= {f"read {when}" if name == "read" else name: t for name, t in found.items()}
        tuner.detach()
        gradients.fresh()
    return {"shape": shape, "dtype": str(dtype)[6:], "scalars": _count(model), "times": times}


def exponents(shape: str, repeats: int, budget: int = BUDGET) -> list[dict[str, Any]]:
    """The score's exponent, with new gradients at each step and with the same: then the largest
    are those of scalars that are unmasked already."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        common.say(f"exponents, {dtype}")
        model = common.bert(shape, dtype, dropout=0.0)
        named = {"dtype": str(dtype)[6:]}
        for exp in EXPONENTS:
            for alike in (False, True):
                pair = _pair(model, repeats, budget, exp, alike=alike)
                found.append(pair | {"exp": exp, "alike": alike} | named)
    return found


def budgets(shape: str, repeats: int, choices: tuple[int, ...]) -> list[dict[str, Any]]:
    """How many scalars a run may unmask; and, where it rests, what is left if none are chosen: the
    optimiser's own work and moving values between it and the model."""
    common.say("budgets")
    model = common.bert(shape, dropout=0.0)
    return [
        _pair(model, repeats, budget, **how) | {"budget": budget, **how}
        for budget in choices
        for how in KINDS
    ]


def anew(shape: str, repeats: int, choices: tuple[int, ...]) -> list[dict[str, Any]]:
    """The whole budget chosen anew at each step, from new gradients, so that nearly none stay."""
    common.say("all anew")
    model = common.bert(shape, dropout=0.0)
    return [_pair(model, repeats, b, anew=True) | {"budget": b} for b in choices]


def sizes(shape: str, repeats: int, layers: tuple[int, ...], budget: int) -> list[dict[str, Any]]:
    """How many scalars there are."""
    found = []
    for count in layers:
        common.say(f"{count} layers")
        model = common.bert(shape, dropout=0.0, layers=count)
        found.append(_pair(model, repeats, budget) | {"scalars": _count(model)})
    return found


def _pair(
    model: nn.Module,
    repeats: int,
    budget: int,
    exp: float = 2.0,
    fused: bool = False,
    rests: bool = False,
    alike: bool = False,
    anew: bool = False,
) -> dict[str, Any]:
    gradients = common.Gradients(model)
    gradients.fresh()
    tuner, step = selective(model, 0.5, budget, exp, fused, rests, anew)
    fresh = None if alike else gradients.fresh
    times = common.interleaved({"read": read(model), "id3": step}, repeats, fresh)
    tuner.detach()
    return {"times": times, "to_read": common.ratio(times, "id3", "read")}


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _row(found: dict[str, Any]) -> list[str]:
    times = found["times"]
    at = [f"{common.ratio(times, f'id3 {w}', f'read {w}'):.2f}" for w in AT]
    to_dense = [f"{common.ratio(times, 'id3 middle', a):.3f}" for a in ("adamw", "adamw fused")]
    to_authors = f"{common.ratio(times, 'id3 middle', 'authors'):.4f}" if "authors" in times else ""
    ms = f"{1000 * common.median(times['id3 middle']):.0f}"
    name = f"{found['scalars'] / 1e6:.0f} M {found['dtype']}"
    return [name, *at, *to_dense, to_authors, ms]


def main(given: list[str] | None = None) -> dict[str, Any]:
    arguments = common.arguments(__doc__).parse_args(given)
    n = arguments.repeats
    if arguments.smoke:
        steps = [compared("tiny", d, n, True, 1000) for d in (torch.float32, torch.bfloat16)]
        exps, flat = exponents("tiny", n, 1000), budgets("tiny", n, (100, 1000))
        whole = anew("tiny", n, (100, 1000))
        linear = sizes("tiny", n, (1, 2), 1000)
    else:
        steps = [
            compared("110M", torch.float32, n, with_authors=True),
            compared("350M", torch.float32, n, with_authors=False),
            compared("110M", torch.bfloat16, n, with_authors=False),
        ]
        exps, flat = exponents("110M", n), budgets("110M", n, BUDGETS)
        whole = anew("110M", n, (*BUDGETS[:2], BUDGET, BUDGETS[2]))
        linear = sizes("350M", n, LAYERS, BUDGET)
    tables = [
        common.table(
            "The ID3 step: its time to that of one read of gradients and weights, early, in the "
            "middle and late in a run, to a dense AdamW step (PyTorch's default, and fused) and to "
            "the authors' procedure",
            ["model", *(f"/ read, {w}" for w in AT), "/ AdamW", "/ fused", "/ authors'", "ms"],
            [_row(found) for found in steps],
        ),
        common.table(
            "Any exponent: time / one read, with new gradients at each step and with the same",
            ["exp", "float32", "the same", "bfloat16", "the same"],
            [
                [exp, *(f"{f['to_read']:.2f}" for f in exps if f["exp"] == exp)]
                for exp in dict.fromkeys(f["exp"] for f in exps)
            ],
        ),
        common.table(
            "Any budget: time / one read, with PyTorch's default AdamW and with the fused one; and "
            "the same of a step that chooses nothing, which trains as many scalars",
            ["budget", "/ read", "fused", "choosing nothing", "fused"],
            [
                [f"{budget:,}", *(f"{f['to_read']:.2f}" for f in flat if f["budget"] == budget)]
                for budget in dict.fromkeys(f["budget"] for f in flat)
            ],
        ),
        common.table(
            "All of the budget chosen anew at each step (Repeat): time / one read",
            ["budget", "/ read", "ms"],
            [
                [
                    f"{f['budget']:,}",
                    f"{f['to_read']:.2f}",
                    f"{1000 * common.median(f['times']['id3']):.0f}",
                ]
                for f in whole
            ],
        ),
        common.table(
            "Any size: time / one read",
            ["scalars", "/ read", "ms"],
            [
                [
                    f"{f['scalars']:,}",
                    f"{f['to_read']:.2f}",
                    f"{1000 * common.median(f['times']['id3']):.0f}",
                ]
                for f in linear
            ],
        ),
    ]
    data = {"steps": steps, "exponents": exps, "budgets": flat, "anew": whole, "sizes": linear}
    return common.finish("step", arguments, tables, data)


if __name__ == "__main__":
    main()
