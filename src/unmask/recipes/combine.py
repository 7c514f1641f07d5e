"""Several deltas on disk as one, with their base found and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unmask.algebra import compose
from unmask.delta import Delta
from unmask.errors import UnmaskError
from unmask.recipes import models


def compose_folders(
    paths: Sequence[Path],
    out: Path,
    *,
    model: str | None = None,
    weights: Sequence[float] | None = None,
    conflicts: str = "sum",
    keep: float = 1.0,
) -> Delta:
    """Write the delta that does what those in `paths` do into `out`; see `compose`.

    Their base is `model`, or what they all name as it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UnmaskError(f"{str(out)!r} exists and isn't empty; name another folder with --out")
    deltas = [Delta.load(path) for path in paths]
    if not deltas:
        raise UnmaskError("no delta was given; name two or more")
    base = models.built(model or _base(paths, deltas), deltas[-1])
    composed = compose(deltas, base, weights=weights, conflicts=conflicts, keep=keep)
    composed.save(out)
    return composed


def parse_weights(text: str) -> list[float]:
    """As in "1,-0.5"."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UnmaskError(f"--weights={text!r} isn't numbers with commas, as in 1,-0.5") from None


def _base(paths: Sequence[Path], deltas: Sequence[Delta]) -> str:
    named = [delta.info.get("base_model_name_or_path") for delta in deltas]
    for path, name in zip(paths, named, strict=True):
        if not isinstance(name, str) or not name:
            raise UnmaskError(f"'{path}' doesn't say what its base is; give the base with --model")
        if name != named[0]:
            raise UnmaskError(
                f"'{paths[0]}' was made on {named[0]!r}, '{path}' on {name!r}; compose deltas of "
                "one base, or give --model if both names are the same model"
            )
    return str(named[0])
