"""Sampled weight gradients: steps between selections, which compute gradients at the slots alone.

Each way to train has a process of its own; they take their steps in turn, so that whatever else the
machine does hits all of them. The strided runs select at every second step here, with as many slots
filled and as many scalars chosen each time as a run of 1000 steps that selects at every tenth has
near its end; a whole run's step is then one part selection and nine parts what lies between.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import unmask
from benchmarks import common

BUDGET, STEPS, EVERY = 320_000, 1000, 10
MODES = {
    "full": "full fine-tuning, AdamW",
    "lora": "PEFT LoRA r=8, all linear",
    "frozen": "no weight gradients at all (the floor)",
    "streaming": "unmask ID3, streaming",
    "sampled": "unmask ID3, sampled",
}


@dataclass(frozen=True)
class Near(unmask.Schedule):
    """All but a few shares at the first step; a share of Strided(every=EVERY) at each second."""

    def target(self, step: int, steps: int, budget: int) -> int:
        share = budget * EVERY // STEPS
        left = (steps - step) // 2
        return max(0, budget - share * left)


def prepare(mode: str, model: Any, budget: int) -> tuple[Any, Any]:
    """The model to train, and the optimiser that steps it."""
    if mode in ("streaming", "sampled"):
        method = unmask.id3(budget=budget, schedule=Near())
        tuner = unmask.attach(model, method, steps=40, train_fully="classifier*", gradients=mode)
        return model, tuner.optimizer(torch.optim.AdamW, lr=1e-4)
    if mode == "lora":
        import peft

        config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
        model = peft.get_peft_model(model, config)
    if mode == "frozen":  # backward goes down to the embeddings, for the sake of one bias
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("embeddings.LayerNorm.bias"))
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4)


def train(mode: str, size: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Nothing once all is built, then what each step took."""
    torch.manual_seed(0)
    model = common.bert(size.shape)
    batch = common.batch(model, size.batch, size.length)
    model, optimizer = prepare(mode, model, size.budget)
    model.train()
    yield {}
    while True:
        start = time.perf_counter()
        model(**batch).loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        end = time.perf_counter()
        yield {"seconds": end - start, "passes": middle - start}


def work(options: argparse.Namespace) -> None:
    """A process of its own: a step for every line on standard input, a line of JSON for each."""
    warnings.simplefilter("ignore")
    run = train(options.worker, options)
    next(run)
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(next(run)), flush=True)


class Worker:
    """The other end of `work`."""

    def __init__(self, mode: str, options: argparse.Namespace) -> None:
        size = {n: getattr(options, n) for n in ("shape", "batch", "length", "budget")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sampled", "--worker", mode]
            + [f"--{name}={value}" for name, value in size.items()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip

    def step(self, ask: bool = True) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if ask:
            print("step", file=self.process.stdin, flush=True)
        return dict(json.loads(self.process.stdout.readline()))

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__)
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=common.SHAPES, default="110M")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--budget", type=int, default=BUDGET)
    options = parser.parse_args(given)
    if options.worker:
        work(options)
        return {}
    if options.smoke:
        options.shape, options.batch, options.length, options.budget = "tiny", 2, 8, 1000
    workers = {}
    for mode in MODES:
        workers[mode] = Worker(mode, options)
        workers[mode].step(ask=False)  # built
    lines = {
        "full": MODES["full"],
        "lora": MODES["lora"],
        "frozen": MODES["frozen"],
        "streaming": f"{MODES['streaming']}, between selections",
        "sampled": f"{MODES['sampled']}, between selections",
        "selection": f"{MODES['sampled']}, selecting",
    }
    rounds: dict[str, list[dict[str, float]]] = {line: [] for line in lines}
    for turn in range(1 + options.repeats):
        found = {mode: worker.step() for mode, worker in workers.items()}
        if turn:
            for mode in ("full", "lora", "frozen"):
                rounds[mode].append(found[mode])
            rounds["selection"].append(found["sampled"])
        for mode in ("streaming", "sampled"):  # selecting and not, in turn
            between = workers[mode].step()
            if turn:
                rounds[mode].append(between)
        common.say(f"round {turn} of {options.repeats}")
    for worker in workers.values():
        worker.end()
    steps = {line: [f["seconds"] for f in found] for line, found in rounds.items()}
    passes = {line: [f["passes"] for f in found] for line, found in rounds.items()}
    lines["strided"] = f"{MODES['sampled']}, Strided(every={EVERY}) on average"
    for times in (steps, passes):
        times["strided"] = [
            (select + (EVERY - 1) * between) / EVERY
            for select, between in zip(times["selection"], times["sampled"], strict=True)
        ]
    rows = [
        [
            said,
            f"{common.ratio(passes, line, 'full'):.3f}",
            f"{common.ratio(steps, line, 'full'):.3f}",
            f"{common.ratio(steps, line, 'lora'):.3f}",
        ]
        for line, said in lines.items()
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
