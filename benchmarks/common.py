"""What every script here shares: models with random weights, fair timing, results as JSON.

A result is one JSON object: what, hardware, date, versions, load, `tables` (title, columns, rows:
what is printed and put into the documentation) and `data` (every number behind it, for the plots).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = {  # name: (width, layers, heads, vocabulary): BERT-base's, RoBERTa-large's, and tests'
    "tiny": (32, 2, 2, 500),
    "110M": (768, 12, 12, 30522),
    "350M": (1024, 24, 16, 50265),
}


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the result to this file, too")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--repeats", type=int, default=defaults.get("repeats", 5))
    return parser


def bert(
    shape: str = "110M", dtype: torch.dtype = torch.float32, dropout: float = 0.1, layers: int = 0
) -> Any:
    """A BERT classifier with random weights; `layers` other than the shape's to vary its size."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = bert_config(shape, dropout, layers)
    return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def bert_config(shape: str, dropout: float = 0.1, layers: int = 0) -> Any:
    from transformers import BertConfig

    width, depth, heads, vocabulary = SHAPES[shape]
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def batch(model: Any, size: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens and labels."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    return {
        "input_ids": torch.randint(0, vocabulary, (size, length), generator=generator),
        "attention_mask": torch.ones(size, length, dtype=torch.long),
        "labels": torch.randint(0, 2, (size,), generator=generator),
    }


class Gradients:
    """Gradients as training gives them, without training: a scale of its own for each tensor, other
    numbers at each step, in buffers that stay."""

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.generator = torch.Generator().manual_seed(seed)
        longest = max(p.numel() for p in self.parameters)
        self.noise = torch.randn(longest + 65_537, generator=self.generator)
        spread = torch.randn(len(self.parameters), generator=self.generator)
        self.scales = (1e-3 * 10 ** (spread / 2)).tolist()

    def fresh(self) -> None:
        at = int(torch.randint(0, 65_536, (), generator=self.generator))
        for parameter, scale in zip(self.parameters, self.scales, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            noise = self.noise[at : at + parameter.numel()].view_as(parameter)
            torch.mul(noise.to(parameter.dtype), scale, out=parameter.grad)


Action = Callable[[], object]


def interleaved(
    actions: Mapping[str, Action], repeats: int, before: Action | None = None, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each action, round by round, so that whatever else the machine does hits all;
    `before` begins every round, untimed."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warm + repeats):
        if before is not None:
            before()
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            taken = time.perf_counter() - start
            if turn >= warm:
                times[name].append(taken)
    return times


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def ratio(times: Mapping[str, Sequence[float]], what: str, to: str) -> float:
    """The median over rounds of one action's time to another's in the same round."""
    return median([a / b for a, b in zip(times[what], times[to], strict=True)])


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return {"title": title, "columns": list(columns), "rows": [list(map(str, r)) for r in rows]}


def markdown(tables: Sequence[Mapping[str, Any]]) -> str:
    """The tables of a result, for reading."""
    lines = []
    for one in tables:
        marks = ["---", *("---:" for _ in one["columns"][1:])]
        rows = [one["columns"], marks, *one["rows"]]
        lines += [f"**{one['title']}**", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(lines)


def finish(
    what: str, arguments: argparse.Namespace, tables: Sequence[Mapping[str, Any]], data: Any
) -> dict[str, Any]:
    """Print the result and write it where --json says."""
    result = {
        "what": what,
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # ours and others', when it ended
        "smoke": arguments.smoke,
        "tables": list(tables),
        "data": data,
    }
    print(markdown(tables))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def hardware() -> str:
    """Processor and cores, or the GPU, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.search(r"model name\s*: (.+)", lines)[1]  # type: ignore[index]
    except (OSError, TypeError):
        pass
    return f"{name}, {os.cpu_count()} cores"


def slug(text: str) -> str:
    """For file names.

    >>> slug("AMD EPYC, 2 cores")
    'amd-epyc-2-cores'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def peak_memory() -> int:
    """The most resident bytes this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_now() -> int:
    """The resident bytes of this process."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
