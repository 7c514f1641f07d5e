"""How a delta's content becomes tensors with names, and is made out of them again.

`plain` is what any program that reads safetensors can use as it is. `compact` takes little more
than the entropy of the index set and the values' own bits. Documented in docs/deltas.md.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unmask import codec
from unmask.eligible import FLOATS
from unmask.errors import UnmaskError
from unmask.sparse import Sparse, describe

__all__ = ["LAYOUTS", "Content", "Layout"]


class Content(NamedTuple):
    """What a layout has to store."""

    sparse: Mapping[str, Sparse]
    full: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


Stored = tuple[dict[str, Any], dict[str, Tensor]]  # entries of the config; named tensors


class Layout(NamedTuple):
    """A pair of inverses. `decode` trusts nothing and raises UnmaskError."""

    encode: Callable[[Content], Stored]
    decode: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Content]


def _plain(content: Content) -> Stored:
    tensors: dict[str, Tensor] = {}
    for name, part in content.sparse.items():
        tensors[f"indices.{name}"] = part.indices.to(_index_dtype(part.numel))
        tensors[f"values.{name}"] = part.values
    # A line a tensor, "768x3072", keeps the config small and readable.
    shapes = {name: "x".join(map(str, part.shape)) for name, part in content.sparse.items()}
    return {"shapes": shapes}, tensors | _whole(content)


def _from_plain(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Content:
    groups = _group(tensors, "indices", "values", "full", "buffers")
    indices, values, shapes = groups["indices"], groups["values"], config.get("shapes")
    if not isinstance(shapes, dict):
        raise UnmaskError("'shapes' is missing or of another type")
    if odd := (indices.keys() ^ values.keys()) | (indices.keys() ^ shapes.keys()):
        raise UnmaskError(f"{min(odd)!r} lacks its indices, its values or its shape")
    sparse = {}
    for name, at in indices.items():
        try:
            shape = _parse_shape(shapes[name])
            if at.dtype != _index_dtype(math.prod(shape)):
                raise UnmaskError(f"indices are {describe(at)}, of the wrong width")
            sparse[name] = Sparse(shape, at.to(torch.int64), values[name])
        except UnmaskError as exc:
            raise UnmaskError(f"in {name!r} {exc}") from None
    return Content(sparse, groups["full"], groups["buffers"])


# In the compact layout a tensor costs a row of the table instead of two names in the header of the
# safetensors file, a name and a shape in the config, and two offsets.

STREAMS = ("table", "remainders", "quotients")
TABLE_LIMIT = 1 << 26  # bytes of the inflated table: a short stream can't ask for all memory
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


class Entry(NamedTuple):
    """One tensor's row of the compact layout's table."""

    name: str
    dtype: str
    shape: list[int]
    changed: int
    width: int


def _compact(content: Content) -> Stored:
    parts = list(content.sparse.values())
    index = torch.cat([torch.empty(0, dtype=torch.int64), *(part.indices for part in parts)])
    counts, sizes = _integers(len(p.indices) for p in parts), _integers(p.numel for p in parts)
    widths, remainders, quotients = codec.encode(index.numpy(), counts, sizes)
    rows, values = [], defaultdict(list)
    for (name, part), width in zip(content.sparse.items(), widths.tolist(), strict=True):
        dtype = str(part.values.dtype).removeprefix("torch.")
        rows.append(Entry(name, dtype, list(part.shape), len(part.values), width))
        values[dtype].append(part.values)
    table = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()
    streams = (np.frombuffer(zlib.compress(table, 9), dtype=np.uint8), remainders, quotients)
    tensors = {name: torch.from_numpy(s.copy()) for name, s in zip(STREAMS, streams, strict=True)}
    tensors |= {f"values.{dtype}": torch.cat(parts) for dtype, parts in values.items()}
    return {}, tensors | _whole(content)


def _from_compact(_: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Content:
    groups = _group(tensors, *STREAMS, "values", "full", "buffers")
    table, remainders, quotients = (_stream(groups[name], name) for name in STREAMS)
    rows = _parse_table(table.tobytes())
    values = _split(groups["values"], rows)
    counts, sizes = [row.changed for row in rows], [math.prod(row.shape) for row in rows]
    if any(size >= codec.LARGEST for size in sizes):
        raise UnmaskError("a shape is out of range")
    coded = codec.Coded(_integers(row.width for row in rows), remainders, quotients)
    index = codec.decode(coded, _integers(counts), _integers(sizes))
    sparse = {
        row.name: Sparse(tuple(row.shape), at, values[row.name])
        for row, at in zip(rows, torch.from_numpy(index).split(counts), strict=True)
    }
    return Content(sparse, groups["full"], groups["buffers"])


def _stream(held: Mapping[str, Tensor], name: str) -> codec.Bytes:
    if held.keys() != {""}:
        raise UnmaskError(f"{name!r} is missing, or there are several")
    if held[""].dtype != torch.uint8 or held[""].ndim != 1:
        raise UnmaskError(f"{name!r} is {describe(held[''])}, not a vector of bytes")
    return held[""].numpy()


def _split(held: Mapping[str, Tensor], rows: list[Entry]) -> dict[str, Tensor]:
    """Each tensor's values, out of one vector for each dtype."""
    values: dict[str, Tensor] = {}
    for dtype in held.keys() | {row.dtype for row in rows}:
        counts = {row.name: row.changed for row in rows if row.dtype == dtype}
        if dtype not in held or not counts:
            raise UnmaskError(f"values of {dtype!r} are missing, or nobody's")
        vector, total = held[dtype], sum(counts.values())
        if vector.dtype != DTYPES[dtype] or vector.shape != (total,):
            raise UnmaskError(f"{total} values of {dtype!r} expected, found {describe(vector)}")
        values |= zip(counts, vector.split(list(counts.values())), strict=True)
    return values


def _parse_table(stream: bytes) -> list[Entry]:
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(stream, TABLE_LIMIT).decode()
        rows = [Entry(*row) for row in json.loads(text)]
    except (zlib.error, ValueError, TypeError, RecursionError) as exc:
        raise UnmaskError(f"the table isn't deflated JSON of rows: {exc}") from exc
    if not inflate.eof or inflate.unused_data:
        raise UnmaskError("the table is cut off, too long, or has something after its end")
    for row in rows:
        numbers = [*row.shape, row.changed, row.width] if isinstance(row.shape, list) else [None]
        natural = all(type(n) is int and 0 <= n < codec.LARGEST for n in numbers)
        if not (natural and isinstance(row.name, str) and row.dtype in list(DTYPES)):
            raise UnmaskError(f"a row of the table makes no sense: {str(row)[:200]}")
    if len({row.name for row in rows}) != len(rows):
        raise UnmaskError("a tensor stands in the table twice")
    return rows


LAYOUTS = {"compact": Layout(_compact, _from_compact), "plain": Layout(_plain, _from_plain)}


def _whole(content: Content) -> dict[str, Tensor]:
    groups = {"full": content.full, "buffers": content.buffers}
    return {f"{group}.{name}": t for group, held in groups.items() for name, t in held.items()}


def _group(tensors: Mapping[str, Tensor], *names: str) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, tensor in tensors.items():
        group, dot, name = key.partition(".")
        if group not in groups or bool(dot) == (group in STREAMS):
            raise UnmaskError(f"unknown key {key!r}")
        groups[group][name] = tensor
    return groups


def _integers(numbers: Iterable[int]) -> codec.Integers:
    return np.array(list(numbers), dtype=np.int64)


def _parse_shape(text: object) -> tuple[int, ...]:
    if not isinstance(text, str) or not re.fullmatch("([0-9]{1,19}(x[0-9]{1,19})*)?", text):
        raise UnmaskError(f"{text!r} is no shape")
    return tuple(map(int, text.split("x"))) if text else ()


def _index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64
