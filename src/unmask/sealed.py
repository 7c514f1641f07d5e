"""A directory with one config and one safetensors file, in which no bit can flip unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from unmask.errors import UnmaskError

__all__ = ["CONFIG", "WEIGHTS", "canonical", "read", "write"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE, FORMAT = "UNMASK", 1


def write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Seal `config` and `tensors` in `folder`; equal content gives equal bytes."""
    weights = safetensors.torch.save(tensors)
    digest = hashlib.sha256(weights).hexdigest()
    sealed = {**config, "peft_type": PEFT_TYPE, "format": FORMAT, "weights": digest}
    sealed["checksum"] = _checksum(sealed)
    _replace(folder, {CONFIG: canonical(sealed), WEIGHTS: weights})


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
    weights = _weights(folder, config.get("weights"))
    try:
        return config, safetensors.torch.load(weights)
    except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as exc:
        raise _damaged(folder / WEIGHTS, f"it isn't safetensors: {exc}") from exc


def canonical(content: Any) -> bytes:
    """Return the only bytes that may stand for `content`, of all that would parse to it."""
    # With ensure_ascii an "é" would be \u00e9, and \u00E9, one flipped bit away, would equal it.
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the config and the weights into `folder` such that it holds the old ones or the new
    ones, and nothing half-written, whenever this is cut off.

    Both are on disk under temporary names before the config takes its own. From then on the folder
    is the new one: until the weights have their name too, `_weights` knows them by their checksum.
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
            _settle(folder)
            for name in files:
                temporary[name].replace(folder / name)
                _settle(folder)
        finally:
            if temporary[CONFIG].exists():
                for leftover in temporary.values():
                    leftover.unlink(missing_ok=True)
    except (OSError, ValueError) as exc:  # ValueError: a null byte in the path
        raise UnmaskError(f"can't write into '{folder}': {exc}; choose another directory") from exc


def _settle(folder: Path) -> None:
    """Make the renames so far last before those to come."""
    if os.name == "posix":  # Windows gives no handle on a directory
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _weights(folder: Path, digest: object) -> bytes:
    """The weights of this checksum: under their name, or where a save that was cut off had them."""
    for path in filter(Path.is_file, (folder / WEIGHTS, *folder.glob(f".{WEIGHTS}.*.tmp"))):
        with suppress(OSError):
            weights = path.read_bytes()
            if hashlib.sha256(weights).hexdigest() == digest:
                return weights
    _bytes(folder / WEIGHTS)  # raises if there are none
    raise _damaged(folder / WEIGHTS, f"its checksum doesn't match the one in {CONFIG}")


def _checksum(config: Mapping[str, Any]) -> str:
    unsigned = {key: value for key, value in config.items() if key != "checksum"}
    return hashlib.sha256(canonical(unsigned)).hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise OSError(f"'{path.name}' is no file")  # reading a pipe would wait for ever
        return path.read_bytes()
    except (OSError, ValueError) as exc:  # ValueError: a null byte in the path
        raise UnmaskError(
            f"no delta at '{path.parent}': it must be a directory with {CONFIG} and {WEIGHTS}, "
            f"but {exc}"
        ) from exc


def _damaged(path: Path, why: str) -> UnmaskError:
    return UnmaskError(f"'{path}' is damaged or was edited: {why}; copy or download it again")
