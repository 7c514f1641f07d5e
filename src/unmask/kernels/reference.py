"""Every kernel in plain torch: the meaning of the fast ones, and the fallback on any device."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20  # scalars worked on at once: bounds the temporaries to a few megabytes


def scan(
    theta: Tensor,
    grad: Tensor,
    start: int,
    stop: int,
    law: tuple[float, float],
    threshold: float,
    taken: Tensor,
    offset: int,
    capacity: int,
) -> tuple[Tensor, int, bool]:
    """Flat indices in [start, stop) with |g| / (|θ| + eps)^exp >= threshold, outside `taken`.

    `taken` holds sorted global indices of this tensor's scalars, `offset` the tensor's first.
    Stops after a chunk that brings the count past `capacity`. Returns (indices, stop, finite).
    """
    exp, eps = law
    found, count, finite, at = [], 0, True, start
    while at < stop and count <= capacity:
        end = min(at + CHUNK, stop)
        g, w = grad[at:end].float(), theta[at:end].float()
        finite = finite and bool(torch.isfinite(g).all())
        # float64 and a margin of a few float32 roundings make this a superset of the exact scores.
        score = g.abs().double() / (w.abs() + eps).double() ** exp
        keep = ~(score < threshold * (1 - 1e-6))
        low, high = torch.searchsorted(
            taken, taken.new_tensor([at + offset, end + offset])
        ).tolist()
        keep[taken[low:high] - (offset + at)] = False
        flat = keep.nonzero().squeeze(1) + at
        found.append(flat)
        count += len(flat)
        at = end
    return torch.cat(found) if found else taken[:0].long(), at, finite
