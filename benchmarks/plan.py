"""`unmask plan` against real runs: the peak it foretells, and the peak of two real training steps.

Each measurement has a process of its own. Compared is the most resident memory during the steps,
less what the process held before the model was built, once everything had run in small. The C
library is told to give freed memory back (MALLOC_MMAP_THRESHOLD_), as its hoard is no one's need.
ID3 is met in the middle of its run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import common

BUDGET, STEPS = 320_000, 1000
RESTING = {"schedule.every": str(STEPS)}  # its first step chooses, the others nothing
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def encoder(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    """As BERT's config and those of its kin call it."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
    }


def llama(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    """Four heads share their keys."""
    sizes = encoder(width, layers, heads, vocabulary)
    return sizes | {"num_key_value_heads": heads // 4, "intermediate_size": 3 * width}


def qwen3(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    """As Llama, with norms of queries and keys."""
    return llama(width, layers, heads, vocabulary) | {"head_dim": width // heads}


def mixtral(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    """As Llama, with four experts, of which each token takes two."""
    return llama(width, layers, heads, vocabulary) | {"num_local_experts": 4}


def gpt2(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": vocabulary}


def bloom(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {"hidden_size": width, "n_layer": layers, "n_head": heads, "vocab_size": vocabulary}


def t5(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    """So many layers on each side."""
    sizes = {"d_model": width, "num_layers": layers, "num_heads": heads, "d_kv": width // heads}
    return sizes | {"d_ff": 4 * width, "vocab_size": vocabulary, "decoder_start_token_id": 0}


def bart(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    """So many layers on each side."""
    sizes: dict[str, Any] = {"d_model": width, "vocab_size": vocabulary}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = layers
        sizes[f"{side}_attention_heads"] = heads
        sizes[f"{side}_ffn_dim"] = 4 * width
    return sizes


def deberta(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 256}
    return encoder(width, layers, heads, vocabulary) | relative | {"share_att_key": True}


Sizes = Callable[[int, int, int, int], dict[str, Any]]
MODELS: dict[str, tuple[str, Sizes, tuple[int, int, int, int]]] = {
    "BERT 110M": ("bert", encoder, common.SHAPES["110M"]),
    "BERT tiny": ("bert", encoder, common.SHAPES["tiny"]),
    "Llama 40M": ("llama", llama, (512, 8, 8, 30_522)),
    "Mixtral 56M": ("mixtral", mixtral, (512, 4, 8, 30_522)),
    "Qwen3 40M": ("qwen3", qwen3, (512, 8, 8, 30_522)),
    "GPT-2 41M": ("gpt2", gpt2, (512, 8, 8, 30_522)),
    "DeBERTa-v2 41M": ("deberta-v2", deberta, (512, 8, 8, 30_522)),
    "BLOOM 41M": ("bloom", bloom, (512, 8, 8, 30_522)),
    "T5 60M": ("t5", t5, (512, 6, 8, 30_522)),
    "BART 46M": ("bart", bart, (512, 4, 8, 30_522)),
}
# model, dtype, batch, length, modes; the first one's are drawn
CASES = [
    ("BERT 110M", "fp32", 16, 64, ("dense", "streaming", "lora", "full")),
    ("BERT 110M", "fp32", 2, 128, ("streaming",)),
    ("BERT 110M", "fp32", 1, 16, ("streaming", "lora")),
    ("Llama 40M", "bf16", 4, 256, ("streaming", "resting")),
    ("Llama 40M", "fp32", 4, 256, ("streaming", "resting", "lora", "full")),
    ("Qwen3 40M", "fp32", 4, 256, ("streaming", "lora")),
    ("GPT-2 41M", "fp32", 32, 64, ("streaming", "lora")),
    ("DeBERTa-v2 41M", "fp32", 4, 256, ("streaming", "resting", "lora")),
    ("BLOOM 41M", "fp32", 4, 256, ("streaming", "lora")),
    ("T5 60M", "fp32", 4, 256, ("streaming", "lora", "full")),
    ("BART 46M", "fp32", 8, 128, ("streaming", "lora")),
    ("Mixtral 56M", "fp32", 4, 256, ("streaming", "lora")),
]


def config(name: str, small: bool = False) -> Any:
    """A config of transformers; in small, for everything to run once."""
    import transformers

    kind, sizes, shape = MODELS[name]
    named = sizes(*((32, 2, 4, 500) if small else shape))
    return transformers.AutoConfig.for_model(kind, **named, pad_token_id=0)


def foretold(
    name: str, dtype: str, batch: int, length: int, budget: int, resting: bool = False
) -> dict[str, Any]:
    """By mode; `resting` is `sampled` where it chooses nothing."""
    from unmask.recipes.plan import plan

    size = {"budget": budget, "batch_size": batch, "sequence_length": length, "dtype": dtype}
    rows = {row["mode"]: row for row in plan(config(name), **size).to_dict()["rows"]}
    if resting:
        peak = plan(config(name), **size, settings=RESTING).to_dict()["resting"]
        rows["resting"] = rows["sampled"] | {"mode": "resting", "peak": peak}
    return rows


def measured(mode: str, name: str, dtype: str, batch: int, length: int, budget: int) -> int:
    """Peak bytes of two steps in a fresh process."""
    size = [f"--model={name}", f"--dtype={dtype}", f"--batch={batch}", f"--length={length}"]
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan", "--worker", mode, *size, f"--budget={budget}"],
        capture_output=True, text=True, check=True, cwd=common.ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    ).stdout  # fmt: skip
    return int(out.splitlines()[-1])


def work(options: argparse.Namespace) -> None:
    """A process of its own: prints the peak."""
    import warnings

    warnings.simplefilter("ignore")
    dtype = DTYPES[options.dtype]
    train(options.worker, config(options.model, small=True), dtype, 2, 8, 1000)
    before = common.memory_now()
    sizes = options.batch, options.length, options.budget
    train(options.worker, config(options.model), dtype, *sizes)
    print(common.peak_memory() - before)


def train(mode: str, config: Any, dtype: torch.dtype, batch: int, length: int, budget: int) -> None:
    """Two steps of a model with random weights."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    given = common.batch(model, batch, length)
    if config.is_encoder_decoder:  # these look for the one token that ends a row
        ids, end = given["input_ids"], config.eos_token_id
        ids[ids == end] = end + 1
        ids[:, -1] = end
    model, optimizer = prepared(mode, model, budget)
    model.train()
    for _ in range(2):
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def prepared(mode: str, model: Any, budget: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model to train in this way, and its optimiser."""
    if mode == "full":
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4)
    body = {id(p) for p in model.base_model.parameters()}
    head = [name for name, p in model.named_parameters() if id(p) not in body]
    if mode == "lora":
        import peft

        kinds = "Linear", "Conv1D"
        layers = [n for n, m in model.named_modules() if type(m).__name__ in kinds]
        where = [name for name in layers if f"{name}.weight" not in head]
        whole = [p for p in model.parameters() if id(p) not in body]
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=where))
        for parameter in whole:
            parameter.requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-4)
    return model, halfway(mode, model, budget, head).optimizer(torch.optim.AdamW, lr=1e-4)


def halfway(mode: str, model: nn.Module, budget: int, head: list[str]) -> Any:
    """A tuner in the middle of its run: half of the budget is unmasked, anywhere."""
    import unmask

    resting = mode == "resting"
    schedule = unmask.Strided(every=STEPS) if resting else unmask.Uniform()
    tuner = unmask.attach(
        model,
        unmask.id3(budget=budget, schedule=schedule),
        steps=STEPS,
        train_fully=head,
        gradients="sampled" if resting else mode,
    )
    some = torch.randint(tuner.eligible.total, (budget // 2,)).unique()
    tuner.slots.commit(tuner.slots.extend(some))
    tuner._driver.step = STEPS // 2
    return tuner


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, default=BUDGET)
    options = parser.parse_args(given)
    if options.worker:
        work(options)
        return {}
    cases = CASES
    if options.smoke:
        cases, options.budget = [("BERT tiny", "fp32", 4, 32, ("streaming",))], 1000
    found: list[dict[str, Any]] = []
    for name, dtype, batch, length, modes in cases:
        size = name, dtype, batch, length, options.budget
        rows = foretold(*size, resting="resting" in modes)
        for mode in modes:
            case: dict[str, Any] = {"shape": name, "dtype": dtype, "batch": batch, "length": length}
            found.append(case | {"plan": rows[mode], "measured": measured(mode, *size)})
            of = f"{rows[mode]['peak'] / 1e6:.0f} MB, measured {found[-1]['measured'] / 1e6:.0f}"
            common.say(f"{name} {dtype}, {batch} x {length}, {mode}: {of}")
    kinds = ("weights", "gradients", "optimizer", "selection", "activations")
    rows_ = [
        [
            f"{f['shape']} {f['dtype']}, {f['batch']} x {f['length']}, {f['plan']['mode']}",
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
