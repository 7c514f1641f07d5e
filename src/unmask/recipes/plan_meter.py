"""Bytes of the tensors that are alive, from each storage's birth to its death."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Bytes of the tensors that are alive on a device, by kind; `most` of each, `peak` of all."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.peak = 0
        self.kind = "activations"  # of what is born from now on
        self._kinds: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Within, what is born is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def add(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count the tensor's storage; with a kind, as of that kind from now on."""
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            if kind is None:
                return
            old, size = self._kinds[key]
            self.live[old] -= size
        else:
            size = storage.nbytes()
            weakref.finalize(storage, self._freed, key).atexit = False
        kind = kind or self.kind
        self._kinds[key] = kind, size
        self.live[kind] += size
        self.most[kind] = max(self.most[kind], self.live[kind])
        self.peak = max(self.peak, self.live.total())

    def _freed(self, key: int) -> None:
        kind, size = self._kinds.pop(key)
        self.live[kind] -= size
