"""What a folder held when it was whole: every file's size and SHA-256, so that harm shows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def manifest(folder: Path) -> dict[str, Any]:
    """Every file below the folder with its size and hash, to be written down as its last one."""
    files = sorted(part for part in folder.rglob("*") if part.is_file())
    return {file.relative_to(folder).as_posix(): _measured(file) for file in files}


def flaw(folder: Path) -> str | None:
    """What isn't as the folder's manifest says; none if all is there and unharmed."""
    try:
        stated = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        stated = {}
    if not stated:
        return f"{MANIFEST} is missing or damaged"
    for name, measured in stated.items():
        try:
            if _measured(folder / name) != measured:
                return f"{name} is damaged"
        except OSError:
            return f"{name} is missing"
    return None


def _measured(file: Path) -> list[Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()  # piece by piece
    return [file.stat().st_size, digest]
