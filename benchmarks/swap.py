"""Swapping what a model was fine-tuned to: a delta on and off, and from disk onto the model.

Beside it, in the same run and in turn: loading a whole fine-tuned model of the same size, and the
LoRA and SHiRA adapters of PEFT, loaded, merged and unmerged.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import unmask
from benchmarks import common
from unmask.delta import Sparse, fingerprint

BUDGET = 320_000
Swap = tuple[Callable[[], object], Callable[[], object]]  # what is timed; what undoes it


def deberta(smoke: bool) -> Any:
    """DeBERTa-v3-base's shape, 184 million scalars, with random weights."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    torch.manual_seed(0)
    width, depth, vocabulary = (32, 2, 500) if smoke else (768, 12, 128_100)
    config = DebertaV2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 16,
        intermediate_size=4 * width,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
    )
    return DebertaV2ForSequenceClassification(config).eval()


def delta_of(model: nn.Module, budget: int) -> unmask.Delta:
    """`budget` random scalars of the model, each moved a little."""
    generator = torch.Generator().manual_seed(1)
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    chosen = torch.randperm(total, generator=generator)[:budget].sort().values
    start, base, after = 0, {}, {}
    for name, parameter in parameters.items():
        at = chosen[(chosen >= start) & (chosen < start + parameter.numel())] - start
        start += parameter.numel()
        if len(at):
            values = parameter.detach().view(-1)[at]
            base[name] = Sparse(parameter.shape, at, values)
            after[name] = Sparse(parameter.shape, at, values + 1e-3)
    return unmask.Delta(after, base=fingerprint(base))


def ours(folder: Path, smoke: bool) -> tuple[dict[str, Swap], dict[str, int]]:
    model = deberta(smoke)
    delta = delta_of(model, 500 if smoke else BUDGET)
    held: list[unmask.Delta] = []

    def off() -> None:
        held.pop().apply(model)

    actions: dict[str, Swap] = {
        "delta: on and off": (lambda: delta.apply(model).apply(model), lambda: None)
    }
    sizes = {}
    for layout in ("plain", "compact"):
        path = delta.save(folder / layout, layout=layout)  # type: ignore[arg-type]
        sizes[f"delta, {layout}"] = size_of(path)
        load = lambda path=path: held.append(unmask.Delta.load(path).apply(model))  # noqa: E731
        actions[f"delta: load, on ({layout})"] = (load, off)
    whole = folder / "whole.safetensors"
    safetensors.torch.save_file(model.state_dict(), whole)
    sizes["whole model"] = whole.stat().st_size
    actions["whole model: load"] = (
        lambda: model.load_state_dict(safetensors.torch.load_file(whole)),
        lambda: None,
    )
    return actions, sizes


def peft(folder: Path, smoke: bool) -> tuple[dict[str, Swap], dict[str, int], dict[str, float]]:
    import peft as library

    linear = [n for n, m in deberta(True).named_modules() if isinstance(m, nn.Linear)]
    targets = sorted({name.rpartition(".")[2] for name in linear} - {"classifier"})
    configs = {
        "LoRA r=8": library.LoraConfig(r=8, target_modules=targets),
        "SHiRA r=2": library.ShiraConfig(r=2, target_modules=targets, mask_type="random"),
    }
    actions, sizes, drift = {}, {}, {}
    for name, config in configs.items():
        base = deberta(smoke)
        before = {n: p.detach().clone() for n, p in base.named_parameters()}
        model = library.get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=1e-2)
        model.eval()
        path = folder / name.replace(" ", "-")
        model.save_pretrained(path)
        sizes[name] = size_of(path)
        model.merge_adapter()
        model.unmerge_adapter()
        now = {n.replace(".base_layer", ""): p for n, p in base.named_parameters()}
        drift[name] = max(float((now[n].detach() - p).abs().max()) for n, p in before.items())
        del before, now

        def merge(model: Any = model) -> None:
            model.merge_adapter()
            model.unmerge_adapter()

        def load(model: Any = model, path: Path = path) -> None:
            model.load_adapter(str(path), "fresh")
            model.set_adapter("fresh")
            model.merge_adapter(["fresh"])

        def unload(model: Any = model) -> None:
            model.unmerge_adapter()
            model.set_adapter("default")
            model.delete_adapter("fresh")

        actions[f"{name}: merge, unmerge"] = (merge, lambda: None)
        actions[f"{name}: load, merge"] = (load, unload)
    return actions, sizes, drift


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def measure(actions: dict[str, Swap], repeats: int) -> dict[str, list[float]]:
    """As `common.interleaved`, with an untimed way back, and nobody pays for others' garbage."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(2 + repeats):
        common.say(f"round {turn + 1} of {2 + repeats}")
        for name, (action, back) in actions.items():
            gc.collect()
            taken = common.interleaved({name: action}, 1, warm=0)[name]
            times[name] += taken
            back()
    return {name: taken[2:] for name, taken in times.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = common.arguments(__doc__, repeats=15).parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        actions, sizes = ours(folder, options.smoke)
        others, more, drift = peft(folder, options.smoke)
        sizes |= more
        times = measure(actions | others, options.repeats)
    swap, load = "delta: on and off", "delta: load, on (plain)"
    rows = []
    for name, taken in times.items():
        to = swap if "merge, unmerge" in name or name == swap else load
        rows.append(
            [
                name,
                f"{1e3 * common.median(taken):.1f}",
                f"{1e3 * min(taken):.1f}",
                f"{common.ratio(times, name, to):.1f}",
            ]
        )
    tables = [
        common.table(
            f"{BUDGET:,} scalars of 184 million",
            ["", "ms, median", "ms, least", "times the delta's"],
            rows,
        ),
        common.table("On disk", ["", "bytes"], [[n, f"{size:,}"] for n, size in sizes.items()]),
        common.table(
            "Largest change left in any weight after merging and unmerging",
            ["", "change"],
            [["delta", "0 (bit for bit)"], *([n, f"{d:.1e}"] for n, d in drift.items())],
        ),
    ]
    data = {"seconds": times, "bytes": sizes, "drift": drift}
    return common.finish("swap", options, tables, data)


if __name__ == "__main__":
    main()
