"""Sampled weight gradients: steps between selections, which compute gradients at the slots alone.

All ways to train take their steps in turn, so that whatever else the machine does hits all of them.
The strided run selects at every second step here, with as many slots filled and as many scalars
chosen each time as a run of 1000 steps that selects at every tenth has near its end; a step of such
a run is then, on average, one part selection and nine parts what lies between.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import unmask
from benchmarks import common

BUDGET, STEPS, EVERY = 320_000, 1000, 10
LINES = {
    "full": "full fine-tuning, AdamW",
    "lora": "PEFT LoRA r=8, all linear",
    "frozen": "no weight gradients at all (the floor)",
    "selection": "unmask ID3, sampled: a step that selects",
    "between": "unmask ID3, sampled: a step between selections",
    "strided": f"unmask ID3, sampled: Strided(every={EVERY}), on average",
}
Pace = tuple[float, float]  # seconds of forward + backward, and of the whole step


@dataclass(frozen=True)
class Near(unmask.Schedule):
    """All but a few shares at the first step; a share of Strided(every=EVERY) at each second."""

    def target(self, step: int, steps: int, budget: int) -> int:
        share = budget * EVERY // STEPS
        return max(0, budget - share * ((steps - step) // 2))


def stepper(model: Any, optimizer: Any, batch: dict[str, Any]) -> Callable[[], Pace]:
    """One training step, timed."""
    model.train()

    def step() -> Pace:
        start = time.perf_counter()
        model(**batch).loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        return middle - start, time.perf_counter() - start

    return step


def contenders(
    shape: str, size: int, length: int, budget: int, steps: int
) -> dict[str, Callable[[], Pace]]:
    """In the order of their turns; the sampled run begins with a selection."""
    import peft

    model = common.bert(shape)
    batch = common.batch(model, size, length)
    parameters = list(model.parameters())
    full = stepper(model, torch.optim.AdamW(parameters, lr=1e-5), batch)
    nothing = torch.optim.SGD([next(model.parameters())], lr=0.0)
    bare = stepper(model, nothing, batch)
    lowest = next(p for n, p in model.named_parameters() if n.endswith("embeddings.LayerNorm.bias"))

    def frozen() -> Pace:
        for parameter in parameters:
            parameter.requires_grad_(parameter is lowest)  # so that backward goes all the way down
        try:
            return bare()
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
                parameter.grad = None

    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    lora = peft.get_peft_model(common.bert(shape), config)
    adapters = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-4)

    ours = common.bert(shape)
    method = unmask.id3(budget=budget, schedule=Near())
    tuner = unmask.attach(ours, method, steps=steps, train_fully="classifier*", gradients="sampled")
    sampled = stepper(ours, tuner.optimizer(torch.optim.AdamW, lr=1e-4), batch)
    return {
        "full": full,
        "lora": stepper(lora, adapters, batch),
        "frozen": frozen,
        "selection": sampled,
        "between": sampled,
    }


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, repeats=7)
    parser.add_argument("--shape", choices=common.SHAPES, default="110M")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--budget", type=int, default=BUDGET)
    options = parser.parse_args(given)
    if options.smoke:
        options.shape, options.batch, options.length, options.budget = "tiny", 2, 8, 1000
    turns = contenders(
        options.shape, options.batch, options.length, options.budget, 2 * options.repeats + 4
    )
    paces: dict[str, list[Pace]] = {line: [] for line in LINES}
    for turn in range(1 + options.repeats):
        found = {line: step() for line, step in turns.items()}
        found["strided"] = (
            (found["selection"][0] + (EVERY - 1) * found["between"][0]) / EVERY,
            (found["selection"][1] + (EVERY - 1) * found["between"][1]) / EVERY,
        )
        if turn:  # the first one warms up
            for line, pace in found.items():
                paces[line].append(pace)
        said = ", ".join(f"{line} {pace[1]:.2f}" for line, pace in found.items())
        common.say(f"round {turn} of {options.repeats}: {said} s")
    passes = {line: [p for p, _ in times] for line, times in paces.items()}
    steps = {line: [s for _, s in times] for line, times in paces.items()}
    rows = [
        [
            said,
            f"{common.ratio(passes, line, 'full'):.3f}",
            f"{common.ratio(steps, line, 'full'):.3f}",
            f"{common.ratio(steps, line, 'lora'):.3f}",
        ]
        for line, said in LINES.items()
    ]
    size = f"{options.batch} x {options.length} tokens, {options.shape} parameters"
    tables = [
        common.table(
            f"A training step with sampled weight gradients ({size}, B = {options.budget:,})",
            ["", "forward + backward / full's", "whole step / full's", "whole step / LoRA's"],
            rows,
        )
    ]
    data = {"steps": steps, "passes": passes, "size": size, "budget": options.budget}
    return common.finish("sampled", options, tables, data)


if __name__ == "__main__":
    main()
