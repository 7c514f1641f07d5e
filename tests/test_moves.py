"""The CPU's gather, scatter, insert and search, compiled, against plain torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep import same_bits
from models import seeded
from unmask.kernels import Run, merge, reference, search

cpu = pytest.importorskip("unmask.kernels.cpu")

SIZES = (300, 1, 40_000, 0, 7)
DTYPES = (torch.float32, torch.bfloat16)


def some_of(tensors: list[Tensor], dtype: torch.dtype) -> tuple[list[Run], Tensor]:
    """A third of all scalars' global indices, and their runs by tensor."""
    draw, offset, runs, parts, start = seeded(2), 11, [], [], 0
    for tensor in tensors:
        flat = (torch.rand(tensor.numel(), generator=draw) < 0.3).nonzero().squeeze(1)
        runs.append(Run(tensor, offset, start, start + len(flat)))
        parts.append(flat + offset)
        start, offset = start + len(flat), offset + tensor.numel()
    return runs, torch.cat(parts).to(dtype)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(dtype: torch.dtype, index_dtype: torch.dtype, add: bool) -> None:
    tensors = [torch.randn(n, generator=seeded(n)).to(dtype) for n in SIZES]
    runs, index = some_of(tensors, index_dtype)
    there = torch.randn(len(index), generator=seeded(3))
    found, wanted = there.clone(), there.clone()
    cpu.gather(runs, index, found, add)
    reference.gather(runs, index, wanted, add)
    assert same_bits(found, wanted)
    assert not same_bits(found, there)


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter(dtype: torch.dtype, index_dtype: torch.dtype, jump: bool) -> None:
    tensors = [torch.randn(n, generator=seeded(n)).to(dtype) for n in SIZES]
    others = [tensor.clone() for tensor in tensors]
    runs, index = some_of(tensors, index_dtype)
    values = torch.randn(len(index), generator=seeded(3))
    where = torch.randperm(len(index), generator=seeded(4)).int() if jump else None
    cpu.scatter(runs, index, values, where)
    there = [run._replace(tensor=other) for run, other in zip(runs, others, strict=True)]
    reference.scatter(there, index, values, where)
    assert all(map(same_bits, tensors, others))
    assert tensors[2]._version > 0


@pytest.mark.parametrize("counts", [(0, 0), (5, 0), (0, 5), (1, 1), (1000, 3), (3, 1000), (99, 98)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("belongs", [torch.int32, torch.float32])
def test_insert(counts: tuple[int, int], dtype: torch.dtype, belongs: torch.dtype) -> None:
    for seed in range(5):
        drawn = torch.randperm(2 * sum(counts), generator=seeded(seed)).to(dtype)
        old, more = (part.sort().values for part in drawn[: sum(counts)].split(counts))
        of_old, of_more = (3 * old + 1).to(belongs), (3 * more + 1).to(belongs)
        index, its = merge(old, more, of_old, of_more)
        assert torch.equal(index, drawn[: sum(counts)].sort().values)
        assert torch.equal(its, (3 * index + 1).to(belongs))
        for insert in (cpu.insert, reference.insert):
            room = torch.cat([old, torch.zeros_like(more)])
            room_of = torch.cat([of_old, torch.zeros_like(of_more)])
            insert(room, more, room_of, of_more)
            assert torch.equal(room, index)
            assert torch.equal(room_of, its)


@pytest.mark.parametrize(
    "counts", [(0, 0), (5, 0), (0, 5), (1, 1), (1000, 3), (3, 1000), (99, 98), (200_000, 180_000)]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_search(counts: tuple[int, int], dtype: torch.dtype) -> None:
    for seed in range(5):
        among = torch.randperm(2 * max(counts) + 1, generator=seeded(seed)).to(dtype)
        others = torch.randperm(2 * max(counts) + 1, generator=seeded(seed + 9)).to(dtype)
        index, wanted = (x[:n].sort().values for x, n in zip((among, others), counts, strict=True))
        place, there = search(index, wanted)
        assert torch.equal(there, torch.isin(wanted, index))
        assert torch.equal(index[place[there]], wanted[there])
        assert torch.equal(cpu.search(index, wanted), reference.search(index, wanted))
