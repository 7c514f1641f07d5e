"""A picture for each result: plots(result) -> {name: figure}."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import common

OURS, THEIRS, PALE = "#2a6f97", "#9a9a9a", "#a9d6e5"


def plots(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a result, by name; none for what has no picture."""
    try:
        import matplotlib as mpl
    except ImportError:
        common.say("no plots: matplotlib isn't installed; pip install 'unmask[plots]'")
        return {}
    mpl.use("Agg")
    mpl.rcParams |= {
        "svg.hashsalt": "unmask",  # the same numbers give the same file
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    draw = PICTURES.get(result["what"])
    return {} if draw is None else draw(result["data"])


def _step(data: Mapping[str, Any]) -> dict[str, Any]:
    times = data["steps"][0]["times"]
    names = {"read middle": "one read", "id3 middle": "ID3 step"}
    names |= {"adamw fused": "dense AdamW,\nfused", "adamw": "dense AdamW"}
    names |= {"authors": "authors' ID3"}
    shown = {said: 1000 * common.median(times[n]) for n, said in names.items() if n in times}
    figure, axes = _figure()
    bars = axes.bar(list(shown), list(shown.values()), color=_colours(shown))
    axes.bar_label(bars, fmt="%.0f")
    axes.set(yscale="log", ylabel="ms", title="One step, gradients given")
    flat, axes_ = _figure()
    for fused, colour in ((False, THEIRS), (True, OURS)):
        for rests, line in ((False, "o-"), (True, "o:")):
            which = [b for b in data["budgets"] if (b["fused"], b["rests"]) == (fused, rests)]
            axes_.plot(
                [one["budget"] for one in which],
                [one["to_read"] for one in which],
                line, color=colour, label=("fused" if fused else "default") + " AdamW"
                + (", choosing nothing" if rests else ""),
            )  # fmt: skip
    axes_.set(
        xscale="log", ylim=0, xlabel="budget", ylabel="time / one read", title="Against the budget"
    )
    axes_.legend(frameon=False)
    sizes = data["sizes"]
    linear, axes_ = _figure()
    for name, colour in (("id3", OURS), ("read", THEIRS)):
        axes_.plot(
            [one["scalars"] / 1e6 for one in sizes],
            [1000 * common.median(one["times"][name]) for one in sizes],
            "o-", color=colour, label={"id3": "ID3 step", "read": "one read"}[name],
        )  # fmt: skip
    axes_.set(xlabel="million scalars", ylabel="ms", title="Against the size", ylim=0, xlim=0)
    axes_.legend(frameon=False)
    return {"step": figure, "step-budget": flat, "step-size": linear}


def _training(data: Mapping[str, Any]) -> dict[str, Any]:
    from benchmarks.training import MODES

    names = [said.partition(",")[0] for said in MODES.values()]
    names[2:4] = ["unmask, dense", "unmask, streaming"]
    time = [data["to_bare"][mode] for mode in MODES]
    memory = [data["memory"][mode] / 1e9 for mode in MODES]
    return {
        "training-time": _bars(names, time, "time / bare forward + backward", "%.2f"),
        "training-memory": _bars(names, memory, "peak memory, GB", "%.2f"),
    }


def _plan(data: Mapping[str, Any]) -> dict[str, Any]:
    first = data["cases"][0]
    cases = [c for c in data["cases"] if c["batch"] == first["batch"]]
    kinds = {"weights": "#012a4a", "optimizer": "#2a6f97", "selection": "#e07a5f"}
    kinds |= {"gradients": "#61a5c2", "activations": "#c9d6df"}
    figure, axes = _figure()
    at = [0.0] * len(cases)
    names = [case["plan"]["mode"] for case in cases]
    for kind, colour in kinds.items():
        sizes = [case["plan"][kind] / 1e9 for case in cases]
        axes.bar(names, sizes, 0.6, bottom=at, color=colour, label=kind)
        at = [a + b for a, b in zip(at, sizes, strict=True)]
    for sizes, mark, said in (
        ([case["plan"]["peak"] / 1e9 for case in cases], "_", "peak, foretold"),
        ([case["measured"] / 1e9 for case in cases], "x", "peak, measured"),
    ):
        axes.scatter(names, sizes, marker=mark, s=200 if mark == "_" else 40, c="black", label=said)
    axes.set(ylabel="GB", title=f"{first['shape']}, {first['batch']} x {first['length']} tokens")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return {"plan": figure}


def _sampled(data: Mapping[str, Any]) -> dict[str, Any]:
    steps = data["steps"]
    names = {
        "full": "full",
        "lora": "LoRA",
        "streaming": "streaming",
        "selection": "sampled, selecting",
    }
    names |= {
        "sampled": "sampled, between",
        "strided": "sampled, on average",
        "frozen": "no weight gradients",
    }
    shown = {
        said: common.ratio(steps, line, "full") for line, said in names.items() if line in steps
    }
    return {
        "sampled": _bars(
            list(shown), list(shown.values()), "step time / full fine-tuning's", "%.2f"
        )
    }


def _swap(data: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: 1000 * common.median(times) for name, times in data["seconds"].items()}
    return {"swap": _bars(list(shown), list(shown.values()), "ms", "%.0f", log=True)}


def _bytes(data: Mapping[str, Any]) -> dict[str, Any]:
    figure, axes = _figure()
    for layout, colour in (("compact", OURS), ("plain", THEIRS)):
        for i, kind in enumerate(dict.fromkeys(one["kind"] for one in data["files"])):
            some = [one for one in data["files"] if one["kind"] == kind]
            axes.plot(
                [one["scalars"] for one in some],
                [one[layout] / one["least"] for one in some],
                "osD^v"[i % 5], color=colour, label=layout if i == 0 else None,
            )  # fmt: skip
    axes.axhline(1.10, color="black", linewidth=0.5)
    axes.set(xscale="log", xlabel="scalars", ylabel="file / least possible")
    axes.legend(frameon=False)
    return {"bytes": figure}


PICTURES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "step": _step,
    "training": _training,
    "plan": _plan,
    "sampled": _sampled,
    "swap": _swap,
    "bytes": _bytes,
}


def _figure() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    return figure, figure.subplots()


def _bars(
    names: Sequence[str], sizes: Sequence[float], label: str, form: str, log: bool = False
) -> Any:
    figure, axes = _figure()
    bars = axes.barh(names, sizes, color=_colours(names))
    axes.bar_label(bars, fmt=form, padding=2)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel=label, **({"xscale": "log"} if log else {}))
    return figure


def _colours(names: Any) -> list[str]:
    mark = ("unmask", "ID3 step", "delta", "sampled", "streaming")
    return [OURS if name.startswith(mark) else THEIRS for name in names]
