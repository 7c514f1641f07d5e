"""`unmask plan` against real runs: the peak it foretells, and the peak of two real training steps.

Each measurement has a process of its own. Compared is the most resident memory during the steps,
less what the process held before the model was built, once everything had run in small. The C
library is told to give freed memory back (MALLOC_MMAP_THRESHOLD_), as its hoard is no one's need.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from benchmarks import common

MODES = ("dense", "streaming", "lora", "full")  # those of benchmarks.training with a plan
BUDGET = 320_000


def foretold(shape: str, batch: int, length: int, budget: int) -> dict[str, dict[str, Any]]:
    from unmask.recipes.plan import plan

    found = plan(common.bert_config(shape), budget=budget, batch_size=batch, sequence_length=length)
    return {row["mode"]: row for row in found.to_dict()["rows"]}


def measured(mode: str, options: argparse.Namespace) -> int:
    """Peak bytes of two steps in a fresh process."""
    size = {n: getattr(options, n) for n in ("shape", "batch", "length", "budget")}
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", "--worker", mode]
        + [f"--{name}={value}" for name, value in size.items()],
        input="step\nstep\n", capture_output=True, text=True, check=True,
        cwd=common.ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    ).stdout  # fmt: skip
    return int(json.loads(out.splitlines()[-1])["bytes"])


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__)
    parser.add_argument("--budget", type=int, default=BUDGET)
    options = parser.parse_args(given)
    cases = [("110M", 16, 64), ("110M", 2, 128)]
    if options.smoke:
        cases, options.budget = [("tiny", 4, 32)], 1000
    found = []
    for options.shape, options.batch, options.length in cases:
        rows = foretold(options.shape, options.batch, options.length, options.budget)
        for mode in ("streaming",) if options.smoke else MODES:
            case = {n: getattr(options, n) for n in ("shape", "batch", "length")}
            found.append(case | {"plan": rows[mode], "measured": measured(mode, options)})
            of = f"{rows[mode]['peak'] / 1e6:.0f} MB, measured {found[-1]['measured'] / 1e6:.0f}"
            common.say(f"{options.shape}, {options.batch} x {options.length}, {mode}: {of}")
    kinds = ("weights", "gradients", "optimizer", "selection", "activations")
    rows_ = [
        [
            f"{f['shape']}, {f['batch']} x {f['length']}, {f['plan']['mode']}",
            *(f"{f['plan'][kind] / 1e6:,.0f}" for kind in kinds),
            f"{f['plan']['peak'] / 1e6:,.0f}",
            f"{f['measured'] / 1e6:,.0f}",
            f"{f['plan']['peak'] / f['measured']:.3f}",
        ]
        for f in found
    ]
    tables = [
        common.table(
            "Memory foretold and measured, MB; parts are each at their largest",
            ["model, batch, mode", *kinds, "peak", "measured", "foretold / measured"],
            rows_,
        )
    ]
    return common.finish("plan", options, tables, {"cases": found})


if __name__ == "__main__":
    main()
