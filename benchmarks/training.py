"""A whole training step, forward, backward and update, and the memory it takes.

Each way to train has a process of its own, and takes its steps in turn with bare forward and
backward passes in another, so that whatever else the machine does hits both. ID3 is met in the
middle of its run. Streaming has three pairs of processes.

The C library is told to keep what is freed. Else it may give memory back to the system after each
step, to ask for it again in the next: by where a process's memory happens to lie, that costs none
of a step's time or some per cent of it, of bare passes' as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import common

BUDGET, STEPS = 320_000, 1000
KEEPING = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(1 << 40))
MODES = {
    "bare": "forward + backward alone",
    "full": "full fine-tuning, AdamW",
    "dense": "unmask ID3, dense",
    "streaming": "unmask ID3, streaming",
    "lora": "PEFT LoRA r=8, all linear",
    "shira": "PEFT SHiRA r=2, all linear",
    "super": "PEFT Super-Tuning, all linear",
}


def prepare(mode: str, model: Any, budget: int = BUDGET) -> tuple[Any, Callable[[], object]]:
    """The model to train, and what follows its backward."""
    if mode in ("dense", "streaming"):
        import unmask
        from benchmarks.step import From

        method = unmask.id3(budget=budget, schedule=From(STEPS // 2))
        tuner = unmask.attach(model, method, steps=STEPS, train_fully="classifier*", gradients=mode)
        optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-4)
    elif mode in ("lora", "shira", "super"):
        model = peft_model(mode, model, budget)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
    elif mode == "full":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    else:
        return model, lambda: model.zero_grad()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return model, update


def peft_model(mode: str, model: Any, budget: int) -> Any:
    """PEFT's tuners on every linear layer, the sparse ones with about as many scalars as ours."""
    import peft

    where: dict[str, Any] = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    if mode == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(r=8, **where))
    if mode == "shira":
        return peft.get_peft_model(model, peft.ShiraConfig(r=2, random_seed=0, **where))
    linear = sum(
        m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)
    )
    sparsity = max(0.0, 1 - budget / linear)
    where["modules_to_save"] = ["classifier"]
    return peft.get_peft_model(model, peft.SupertuningConfig(sparsity=sparsity, **where))


def work(options: argparse.Namespace) -> None:
    """A process of its own: a step for every line on standard input, a line of JSON for each."""
    import warnings

    warnings.simplefilter("ignore")
    # Once in small, so that what libraries load and compile counts as theirs.
    small = argparse.Namespace(shape="tiny", batch=2, length=8, budget=1000)
    for _ in train(options.worker, small, steps=2):
        pass
    before = common.memory_now()
    run = train(options.worker, options)
    next(run)
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(next(run) | {"bytes": common.peak_memory() - before}), flush=True)


def train(mode: str, size: argparse.Namespace, steps: int = STEPS) -> Iterator[dict[str, float]]:
    """Nothing once all is built, then what each step took."""
    model = common.bert(size.shape)
    batch = common.batch(model, size.batch, size.length)
    model, update = prepare(mode, model, size.budget)
    model.train()
    yield {}
    for _ in range(steps):
        start = time.perf_counter()
        model(**batch).loss.backward()
        middle = time.perf_counter()
        update()
        end = time.perf_counter()
        yield {"seconds": end - start, "update": end - middle}


class Worker:
    """The other end of `work`."""

    def __init__(self, mode: str, options: argparse.Namespace) -> None:
        size = {n: getattr(options, n) for n in ("shape", "batch", "length", "budget")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.training", "--worker", mode]
            + [f"--{name}={value}" for name, value in size.items()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=common.ROOT, env=os.environ | KEEPING,
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


class Local:
    """As a Worker, in this process: where starting others would take longer than their steps."""

    def __init__(self, mode: str, options: argparse.Namespace) -> None:
        self.run = train(mode, options)

    def step(self, ask: bool = True) -> dict[str, Any]:
        return next(self.run) | ({"bytes": 1} if ask else {})

    def end(self) -> None:
        self.run.close()


def pair(mode: str, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What each step took, of this way to train and of the bare passes, in turn."""
    rounds: dict[str, list[dict[str, Any]]] = {"bare": [], mode: []}
    # Streaming's target is 3 per cent, and so much a process's place in memory may cost it.
    for _ in range(3 if mode == "streaming" else 1):
        workers: dict[str, Worker | Local] = {}
        for one in rounds:
            own = one == "streaming" or not options.smoke
            workers[one] = Worker(one, options) if own else Local(one, options)
            workers[one].step(ask=False)  # built
        for turn in range(1 + options.repeats):
            for one, worker in workers.items():
                found = worker.step()
                if turn:
                    rounds[one].append(found)
        for worker in workers.values():
            worker.end()
    paces = {one: [f["seconds"] for f in found] for one, found in rounds.items()}
    common.say(f"{MODES[mode]}: {common.ratio(paces, mode, 'bare'):.3f} of bare")
    return rounds


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
    beside = {mode: pair(mode, options) for mode in MODES if mode != "bare"}
    times = {
        mode: {m: [f["seconds"] for f in found[m]] for m in found} for mode, found in beside.items()
    }
    to_bare = {m: common.ratio(pace, m, "bare") for m, pace in times.items()} | {"bare": 1.0}
    last = {mode: found[mode] for mode, found in beside.items()} | {"bare": beside["full"]["bare"]}
    updates = {mode: common.median([f["update"] for f in found]) for mode, found in last.items()}
    memory = {mode: max(f["bytes"] for f in found) for mode, found in last.items()}
    rows = [
        [
            said,
            f"{to_bare[mode]:.3f}",
            f"{to_bare[mode] / to_bare['full']:.3f}",
            f"{1000 * updates[mode]:.0f}",
            f"{memory[mode] / 1e6:,.0f}",
            f"{memory[mode] / memory['full']:.2f}",
        ]
        for mode, said in MODES.items()
    ]
    size = f"{options.batch} x {options.length} tokens, {options.shape} parameters"
    tables = [
        common.table(
            f"A training step ({size}): time, and peak resident memory beyond the libraries'",
            ["", "time / bare", "time / full", "after backward, ms", "peak, MB", "peak / full"],
            rows,
        )
    ]
    data = {"times": times, "to_bare": to_bare, "updates": updates, "memory": memory, "size": size}
    return common.finish("training", options, tables, data)


if __name__ == "__main__":
    main()
