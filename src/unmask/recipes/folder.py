"""A run's folder: config.json, metrics.json, delta/, series/, checkpoint-N/; never half-written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import UnmaskError, UnmaskWarning
from unmask.recipes.manifest import flaw

CONFIG, METRICS, PROGRESS = "config.json", "metrics.json", "progress.json"
# What a run writes, also under a temporary name; all else in its folder is somebody else's.
OWN = re.compile(r"(config\.json|metrics\.json|delta|series|checkpoint-\d+|\..+\.[0-9a-f]{8}\.tmp)")


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps what it was asked, what it measured, its deltas and its checkpoints."""

    path: Path

    @property
    def delta(self) -> Path:
        """The run's result."""
        return self.path / "delta"

    def series(self, share: float) -> Path:
        """The delta at a share of the budget."""
        return self.path / "series" / f"{100 * share:g}"

    @property
    def is_run(self) -> bool:
        """Whether a run's config lies here."""
        return (self.path / CONFIG).is_file()

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / METRICS).is_file()

    def checkpoints(self) -> list[Path]:
        """The folders of checkpoints, oldest first."""
        steps = {
            int(match[1]): folder
            for folder in self.path.glob("checkpoint-*")
            if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and folder.is_dir()
        }
        return [steps[step] for step in sorted(steps)]

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; none if the run had no time for any."""
        flaws: list[str] = []
        for checkpoint in reversed(self.checkpoints()):
            if (found := flaw(checkpoint)) is None:
                if flaws:
                    said = f"{', '.join(flaws)}; going on from {checkpoint.name}"
                    warnings.warn(said, UnmaskWarning, stacklevel=2)
                return checkpoint
            flaws.append(f"{checkpoint.name} isn't whole ({found})")
        if flaws:
            raise UnmaskError(
                f"{str(self.path)!r} has no whole checkpoint to go on from: {', '.join(flaws)}; "
                "put back what is missing, or start anew with --overwrite"
            )
        return None

    def rotate(self, newest: Path, limit: int | None, best: str | None) -> None:
        """Keep `limit` checkpoints, the newest and the best among them; the others go at once.

        What claims to be newer still is damaged, and the run went back behind it."""
        found = self.checkpoints()
        older = found[: found.index(newest)]
        spare = [c for c in older if best is None or c.name != Path(best).name]
        excess = 0 if not limit else max(0, len(older) + 1 - limit)
        for checkpoint in spare[:excess] + found[len(older) + 1 :]:
            gone = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}.tmp")
            checkpoint.rename(gone)  # a kill while deleting leaves no half checkpoint
            shutil.rmtree(gone)

    def check_new(self, *, overwrite: bool) -> None:
        """Refuse a folder that holds something, unless it is a run to overwrite."""
        home = next(part for part in (self.path, *self.path.parents) if part.exists())
        if home != self.path and not (home.is_dir() and os.access(home, os.W_OK)):
            raise UnmaskError(
                f"can't write a run into {str(self.path)!r}: {str(home)!r} is no folder that can "
                "be written to; name another with --out"
            )
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not self.is_run:
            raise UnmaskError(
                f"{str(self.path)!r} exists and holds no run, so it is left alone; "
                "name another folder with --out"
            )
        if not overwrite:
            state = "a finished run" if self.finished else "an unfinished run"
            raise UnmaskError(
                f"{str(self.path)!r} holds {state}; --resume continues it, --overwrite starts it "
                "anew, --out names another folder"
            )

    def claim(self, config: Mapping[str, Any], *, overwrite: bool) -> None:
        """Begin a run here; of one that is overwritten, remove what it wrote."""
        try:
            if self.is_run:
                self.check_new(overwrite=overwrite)
                # The config goes last: a kill in between leaves a folder that still says "run".
                own = [part for part in self.path.iterdir() if OWN.fullmatch(part.name)]
                for part in sorted(own, key=lambda part: (part.name == CONFIG, part.is_dir())):
                    _remove(part)
            self.path.mkdir(parents=True, exist_ok=True)
            self.write(CONFIG, config)
        except OSError as problem:
            raise UnmaskError(
                f"can't write a run into {str(self.path)!r}: {problem}; name another with --out"
            ) from problem

    def tidy(self) -> None:
        """Remove what a kill left under temporary names."""
        for leftover in self.path.rglob(".*.tmp"):
            if OWN.fullmatch(leftover.name):
                _remove(leftover)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as problem:
            raise UnmaskError(
                f"{str(self.path)!r} is no run folder: {name} can't be read ({problem}); "
                "give the folder that `unmask train` named"
            ) from problem
        if not isinstance(found, dict):
            raise UnmaskError(f"{self.path / name} holds no JSON object; start the run anew")
        return found

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Put a JSON file in place at once, and whole."""
        write_json(self.path / name, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Put a JSON file in place at once, and whole."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _flush(path.parent)


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder to fill; on leaving, it is flushed to disk and becomes `final` at once."""
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    staging.mkdir()
    try:
        yield staging
        for part in staging.rglob("*"):
            _flush(part)
        _flush(staging)
        if final.exists():
            old = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
            final.rename(old)
            staging.rename(final)
            shutil.rmtree(old)
        else:
            staging.rename(final)
        _flush(final.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove(part: Path) -> None:
    shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()


def _flush(path: Path) -> None:
    """Ask the disk to have it, contents of a file or names of a folder."""
    if path.is_dir() and os.name != "posix":  # no handle on a directory there
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
