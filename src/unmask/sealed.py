"""A directory with one config and one safetensors file, in which no bit can flip unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from unmask.errors import UnmaskError

__all__ = ["CONFIG", "WEIGHTS", "canonical", "read", "replace_files", "write"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE, FORMAT = "UNMASK", 1


def write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Seal `config` and `tensors` in `folder`; equal content gives equal bytes."""
    weights = safetensors.torch.save(tensors)
    digest = hashlib.sha256(weights).hexdigest()
    sealed = {**config, "peft_type": PEFT_TYPE, "format": FORMAT, "weights": digest}
    sealed["checksum"] = _checksum(sealed)
    # The config last: in a new directory its presence says that all is there.
    replace_files(folder, {WEIGHTS: weights, CONFIG: canonical(sealed)})


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `write` sealed, or raise; whether it makes sense is the caller's to check."""
    data = _bytes(folder / CONFIG)
    try:
        config = json.loads(data)
        exact = canonical(config) == data
    except (ValueError, RecursionError) as exc:
        raise _damaged(folder / CONFIG, f"it isn't JSON as unmask writes it: {exc}") from exc
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if isinstance(kind, str) and "task_type" in config and "checksum" not in config:
        raise UnmaskError(
            f"'{folder}' holds a PEFT adapter of type {kind}, not a delta; load it with "
            f"peft.PeftModel.from_pretrained(model, {str(folder)!r})"
            + (", whose base_model.delta() is the delta" if kind == PEFT_TYPE else "")
        )
    if kind != PEFT_TYPE:
        raise UnmaskError(f"'{folder}' holds no unmask delta: its peft_type is {kind!r}")
    if config.get("format") != FORMAT:
        raise UnmaskError(
            f"'{folder}' has format {config.get('format')!r}, this unmask reads {FORMAT}; "
            "upgrade unmask if the delta is newer, or copy it again"
        )
    if not exact or config.get("checksum") != _checksum(config):
        raise _damaged(folder / CONFIG, "its checksum doesn't match")
    weights = _bytes(folder / WEIGHTS)
    if config.get("weights") != hashlib.sha256(weights).hexdigest():
        raise _damaged(folder / WEIGHTS, f"its checksum doesn't match the one in {CONFIG}")
    try:
        return config, safetensors.torch.load(weights)
    except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as exc:
        raise _damaged(folder / WEIGHTS, f"it isn't safetensors: {exc}") from exc


def canonical(content: Any) -> bytes:
    """Return the only bytes that may stand for `content`, of all that would parse to it."""
    # With ensure_ascii an "é" would be \u00e9, and \u00E9, one flipped bit away, would equal it.
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` into `folder` such that a crash leaves no half-written file under its name.

    All of them are on disk under temporary names before the first takes its own.
    """
    temporary = {name: folder / f".{name}.{secrets.token_hex(4)}.tmp" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, data in files.items():
                with temporary[name].open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for name in files:
                temporary[name].replace(folder / name)
        finally:
            for leftover in temporary.values():
                leftover.unlink(missing_ok=True)
        if os.name == "posix":  # makes the renames last; Windows gives no handle on a directory
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError as exc:
        raise UnmaskError(f"can't write into '{folder}': {exc}; choose another directory") from exc


def _checksum(config: Mapping[str, Any]) -> str:
    unsigned = {key: value for key, value in config.items() if key != "checksum"}
    return hashlib.sha256(canonical(unsigned)).hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as exc:  # ValueError: a null byte in the path
        raise UnmaskError(
            f"no delta at '{path.parent}': it must be a directory with {CONFIG} and {WEIGHTS}, "
            f"but {exc}"
        ) from exc


def _damaged(path: Path, why: str) -> UnmaskError:
    return UnmaskError(f"'{path}' is damaged or was edited: {why}; copy or download it again")
