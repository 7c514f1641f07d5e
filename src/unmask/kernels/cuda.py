"""The inner loops as Triton code for GPUs: each a single launch over many tensors at once.

The bounds are those of `laws`. Candidates come in no order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from unmask.kernels import Run
from unmask.kernels.laws import FALLING, STEEP, bounds, lost
from unmask.kernels.reference import written
from unmask.kernels.triton_code import gather_kernel, scan_kernel, scatter_kernel

BLOCK = 4096  # scalars that a program looks at: 16 for each of its threads
PART = 512  # scalars of a block with candidates that are looked at together
WARPS, REGISTERS = 8, 48  # of a program, of a thread: then five programs run at once where 64k are
FEW = 1024  # scalars that a program moves
GROWTH = 96  # of what is looked at, from round to round at the most
ROOM = 16  # candidates held on a GPU for each that a thread of a processor may hold

KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as `triton_code` numbers them
WIDE = {torch.int64: True, torch.int32: False}
HOW = {"enable_fp_fusion": False}  # the arithmetic as written, on every device
SCAN = {"num_warps": WARPS, "maxnreg": REGISTERS}


def handles(tensor: Tensor, home: torch.device) -> bool:
    """Whether these kernels can work on the tensor where it lies, with others on that device."""
    known = tensor.dtype in KIND or tensor.dtype in WIDE
    return known and tensor.device == home and tensor.is_contiguous()


def try_out(device: str) -> None:
    """Fail if Triton can't make code for this device: it needs a C compiler, for one."""
    one = torch.zeros(1, device=device)
    gather([Run(one, 0, 0, 1)], one.long(), torch.empty_like(one), add=False)


class Sweep:
    """As `cpu.Sweep`; all tensors on one device. The gradients of `kept` are added at once."""

    def __init__(
        self,
        thetas: Sequence[Tensor],
        grads: Sequence[Tensor],
        offsets: Sequence[int],
        kept: Tensor,
        runs: Sequence[tuple[int, int]],
        into: Tensor | None,
        law: tuple[float, float],
    ) -> None:
        self._law, self._device, self._offsets = law, thetas[0].device, offsets
        self._index_dtype = kept.dtype
        self._keep = (thetas, grads, kept)  # alive as long as their addresses are used
        sizes = [theta.numel() for theta in thetas]
        self._starts = [0, *accumulate(sizes)]
        self._block = BLOCK
        wide = WIDE[self._index_dtype]
        self._how = {"BLOCK": BLOCK, "PART": PART, "WIDE": wide}
        self._firsts = _firsts(sizes, BLOCK)
        self.total = self._starts[-1]
        at, width = kept.data_ptr(), kept.element_size()
        self._table = _table(
            self._device,
            self._firsts[:-1],
            self._starts[:-1],
            sizes,
            offsets,
            *(_addresses(grads), [KIND[g.dtype] for g in grads]),
            *(_addresses(thetas), [KIND[t.dtype] for t in thetas]),
            *([at + width * start for start, _ in runs], [stop - start for start, stop in runs]),
        )
        if into is not None:
            of = zip(grads, offsets, runs, strict=True)
            gather([Run(grad, offset, *run) for grad, offset, run in of], kept, into, add=True)

    def first(self, place: int) -> int:
        """The least global index from this place of the sweep on."""
        k = bisect_right(self._starts, place) - 1
        return place - self._starts[k] + self._offsets[k]

    def run(
        self,
        start: int,
        stop: int,
        threshold: float,
        capacity: int,
        every: int = 1,
        but: int = 0,
        wanted: int = 0,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], list[tuple[int, int]], int]:
        """As `cpu.Sweep.run`, but no candidates are left out, save if there are too many: then all,
        and both halves are left."""
        exp, eps = map(float, self._law)  # of another type, a kernel would be compiled anew
        law, low, cut = bounds(exp, eps, threshold)
        most = lost(exp) if law == FALLING else 0
        exp = 0.0 if abs(exp) > STEEP else exp  # the weight has no say, nor may it overflow
        first, last = -(-self._owner(start) // every), self._owner(stop - 1) // every
        blocks = max(0, last - first + 1)
        room = min(stop - start, blocks * self._block, ROOM * capacity)
        state = torch.zeros(2, dtype=torch.int64, device=self._device)
        index = torch.empty(room, dtype=self._index_dtype, device=self._device)
        theta, grad = torch.empty(2, room, device=self._device)
        none = index[:0], theta[:0], grad[:0]
        if not blocks:
            return none, [], -1
        tensors = len(self._offsets)
        with torch.cuda.device_of(state):
            scan_kernel[(blocks,)](
                *(self._table, tensors, first, every, but, start, stop),
                *(low, exp, eps, cut, most, state, index, theta, grad, room, law),
                **(self._how | HOW | SCAN),
            )
        found, bad = state.tolist()  # the one moment at which the processor waits for the device
        if bad:
            return none, [], tensors - bad
        if found > room:
            middle = (start + stop) // 2
            return none, [(middle, stop), (start, middle)], -1  # the last is looked at first
        return (index[:found], theta[:found], grad[:found]), [], -1

    def _owner(self, place: int) -> int:
        """The block that a place of the sweep is in."""
        k = bisect_right(self._starts, place) - 1
        return self._firsts[k] + (place - self._starts[k]) // self._block


def gather(runs: list[Run], index: Tensor, out: Tensor, add: bool) -> None:
    """As `reference.gather`."""
    rows = [(*_source(run, index), out.data_ptr() + 4 * run.start, 0) for run in runs]
    _launch(gather_kernel, out.device, rows, ADD=add, WIDE=WIDE[index.dtype])


def scatter(runs: list[Run], index: Tensor, values: Tensor, where: Tensor | None) -> None:
    """As `reference.scatter`."""
    if where is None:
        rows = [(*_source(run, index), values.data_ptr() + 4 * run.start, 0) for run in runs]
    else:
        where = where.contiguous()
        at, size = where.data_ptr(), where.element_size()
        rows = [(*_source(r, index), values.data_ptr(), at + size * r.start) for r in runs]
    jumps = {"JUMP": where is not None, "FAR": WIDE[torch.int64 if where is None else where.dtype]}
    _launch(scatter_kernel, values.device, rows, WIDE=WIDE[index.dtype], **jumps)
    written(run.tensor for run in runs)


def _source(run: Run, index: Tensor) -> tuple[int, int, int, int, int]:
    """What both directions have to know of a run."""
    tensor, offset, start, stop = run
    at = index.data_ptr() + index.element_size() * start
    return tensor.data_ptr(), KIND[tensor.dtype], offset, stop - start, at


def _launch(kernel: Any, device: torch.device, rows: Sequence[Sequence[int]], **how: bool) -> None:
    """Move what these rows say, one run each, in a single launch."""
    rows = [row for row in rows if row[3]]
    if not rows:
        return
    firsts = _firsts([row[3] for row in rows], FEW)
    table = _table(device, firsts[:-1], *zip(*rows, strict=True))
    with torch.cuda.device_of(table):
        kernel[(firsts[-1],)](table, len(rows), BLOCK=FEW, **how, **HOW)


def _firsts(sizes: Sequence[int], block: int) -> list[int]:
    """The first block of each, if none is shared; then how many there are."""
    return [0, *accumulate(-(-size // block) for size in sizes)]


def _table(device: torch.device, *columns: Sequence[int]) -> Tensor:
    return torch.tensor(columns, dtype=torch.int64).to(device, non_blocking=True)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
