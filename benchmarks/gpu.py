"""On a GPU: the exact ID3 step beside one read of memory, and 7 B parameters trained by streaming.

python -m benchmarks.gpu            needs CUDA and some 24 GB of its memory; exits with 2 otherwise
python -m benchmarks.gpu --smoke    tiny sizes, on whatever there is

Weights are random: neither time nor memory depends on what they say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import unmask
from benchmarks import common
from benchmarks.step import AT, dense, read, selective

WIDTH = 4096
SIZES = {"smoke": (64, 3), "1B": (WIDTH, 60)}  # width of square matrices, how many
SEVEN = {  # LLaMA-7B's shape, and tests'
    "smoke": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99},
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    },
}
BATCH, LENGTH, STEPS, SHARE = 4, 512, 10, 0.001  # share of the scalars that a run may unmask


class Matrices(nn.Module):
    """Square matrices with gradients, each of a scale of its own."""

    def __init__(self, width: int, count: int, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        how = {"device": device, "dtype": torch.bfloat16}
        weights = [0.02 * torch.randn(width, width, **how) for _ in range(count)]  # type: ignore[arg-type]
        self.weights = nn.ParameterList(weights)
        self.scales = (1e-3 * 10 ** (torch.randn(count) / 2)).tolist()

    def fresh(self) -> None:
        for weight, scale in zip(self.weights, self.scales, strict=True):
            if weight.grad is None:
                weight.grad = torch.empty_like(weight)
            weight.grad.normal_(0.0, scale)


def steps(size: str, device: str, repeats: int) -> dict[str, Any]:
    """Seconds of each action, gradients given."""
    common.say(f"the step of {size}")
    model = Matrices(*SIZES[size], device)
    model.fresh()
    times: dict[str, list[float]] = {}
    for when, share in AT.items():
        tuner, step = selective(model, share, 320_000 if size == "1B" else 1000)
        actions = {f"read {when}": read(model), f"id3 {when}": step}
        if when == "middle":
            actions["adamw"] = dense(model)
        waiting = {name: _waiting(action, device) for name, action in actions.items()}
        before = _waiting(model.fresh, device)
        times |= common.interleaved(waiting, repeats, before, warm=2)  # the first compiles
        tuner.detach()
        model.fresh()
    scalars = sum(p.numel() for p in model.parameters())
    return {"size": size, "scalars": scalars, "bytes": 4 * scalars, "times": times}


def train(size: str, device: str) -> dict[str, Any]:
    """A causal language model with random weights in bfloat16, by ID3 with streaming gradients."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    common.say(f"training {size}")
    heads = max(1, SEVEN[size]["hidden_size"] // 128)
    config = LlamaConfig(**SEVEN[size], num_attention_heads=heads, num_key_value_heads=heads)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.train()
    tuner = unmask.attach(model, unmask.id3(budget=SHARE), steps=STEPS, gradients="streaming")
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-4)
    length = LENGTH if size == "7B" else 8
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> float:
        tokens = torch.randint(0, config.vocab_size, (BATCH, length), device=device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    times = common.interleaved({"step": _waiting(step, device)}, STEPS - 1, warm=1)["step"]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else common.peak_memory()
    scalars = sum(p.numel() for p in model.parameters())
    return {
        "size": size, "scalars": scalars, "active": tuner.active, "times": times, "peak": peak,
        "authors": authors_bytes(scalars), "tokens": BATCH * length,
    }  # fmt: skip


def authors_bytes(scalars: int) -> int:
    """What the authors' procedure (`step.authors`) holds at once in bfloat16, activations apart:
    weights, gradients, both moments of AdamW, scores and the same joined, 2 bytes each; 2 masks."""
    return scalars * (2 + 2 + 4 + 2 + 2 + 1 + 1)


def _waiting(action: Callable[[], object], device: str) -> Callable[[], object]:
    """The action, and the wait for the device to have done it."""

    def waited() -> None:
        action()
        if device == "cuda":
            torch.cuda.synchronize()

    return waited


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}"


def main(given: list[str] | None = None) -> dict[str, Any]:
    arguments = common.arguments(__doc__, repeats=10).parse_args(given)
    gpu = torch.cuda.is_available()
    if not gpu and not arguments.smoke:
        common.say("this benchmark needs a GPU with CUDA, and torch finds none here")
        sys.exit(2)
    device = "cuda" if gpu else "cpu"
    found = steps("smoke" if arguments.smoke else "1B", device, arguments.repeats)
    trained = train("smoke" if arguments.smoke else "7B", device)
    times = found["times"]
    rows = []
    for when in AT:
        seconds = common.median(times[f"id3 {when}"])
        to_read = common.ratio(times, f"id3 {when}", f"read {when}")
        rows.append([when, f"{to_read:.2f}", f"{found['bytes'] / seconds / 1e9:.0f}"])
    tables = [
        common.table(
            f"The ID3 step at {found['scalars']:,} scalars in bfloat16: its time to that of one "
            "read of gradients and weights, and their bytes by its time",
            ["in the run", "/ read", "GB/s"],
            rows,
        ),
        common.table(
            f"Training {trained['scalars']:,} parameters in bfloat16, {trained['tokens']:,} tokens "
            "a step: GB held at the peak, and what the authors' procedure would hold without "
            "activations (computed)",
            ["unmasked", "peak", "authors', computed", "s a step"],
            [
                [
                    f"{trained['active']:,}",
                    _gb(trained["peak"]),
                    _gb(trained["authors"]),
                    f"{common.median(trained['times']):.2f}",
                ]
            ],
        ),
    ]
    return common.finish("gpu", arguments, tables, {"step": found, "training": trained})


if __name__ == "__main__":
    main()
