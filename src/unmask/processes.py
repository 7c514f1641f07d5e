"""Several processes, each with a copy of the model: what DistributedDataParallel leaves to check.

It averages the gradients that backward leaves in the model, so whatever is chosen and trained from
those is the same in every process. What comes before that average isn't: gradients that stream, and
choices made by each process alone. Weights that no process has whole are refused.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unmask.errors import UnmaskError

__all__ = ["check_alike", "check_unwrapped", "check_whole", "wrapper"]

WHOLE = (
    "every process needs whole weights: attach() to the plain model and wrap that in "
    "DistributedDataParallel, or train it on one device"
)


def wrapper() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is under way, if one is."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a wrapper, which has noted already which parameters are trained, and sharded weights,
    in the model or in a part of it."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise UnmaskError(
            "attach() was given a DistributedDataParallel; attach() to the model itself in every "
            "process, and wrap it afterwards"
        )
    _check_unsharded(model)


def check_whole(model: nn.Module, trained: Iterable[Tensor]) -> None:
    """Before a forward pass: refuse a model that was sharded after attach()."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if wrapper() is not None:  # whose weights are whole
        return
    _check_unsharded(model)
    held = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) not in held for parameter in trained):
        raise UnmaskError(
            "the model has other parameters in place of those that are trained, as "
            f"FullyShardedDataParallel puts there; {WHOLE}"
        )


def _check_unsharded(model: nn.Module) -> None:
    # Looked up, as importing them takes time: what isn't loaded isn't in use.
    modules = [sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor")]
    names = ("FullyShardedDataParallel", "FSDPModule", "FlatParameter", "DTensor")
    kinds = [getattr(m, name) for m in modules for name in names if hasattr(m, name)]
    for name, part in (*model.named_modules(), *model.named_parameters()):
        for kind in kinds:
            if isinstance(part, kind):
                where = f"{name!r} in the model" if name else "the model"
                raise UnmaskError(f"{where} is sharded ({kind.__name__}); {WHOLE}")


def check_alike(gradients: str, state: Callable[[], Iterable[Tensor]]) -> bool:
    """Whether a wrapper's forward is under way; refused where its processes would come apart.

    state  what was chosen and computed before training, which must be the same in all
    """
    ddp = wrapper()
    if ddp is None:
        return False
    if gradients != "dense":
        raise UnmaskError(
            "the model is in DistributedDataParallel, which averages gradients over the processes "
            f"only after gradients={gradients!r} has consumed them; attach(..., gradients='dense')"
        )
    sha = hashlib.sha256()
    for tensor in state():
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    own = torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)
    own = own.to(next(ddp.module.parameters()).device)
    every = [torch.empty_like(own) for _ in range(ddp.process_group.size())]
    torch.distributed.all_gather(every, own, group=ddp.process_group)
    if any(not torch.equal(own, other) for other in every):
        raise UnmaskError(
            f"the {len(every)} processes chose from different weights or data before training; "
            "give attach() the same model and the same calibration= in all of them"
        )
    return True
