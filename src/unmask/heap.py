"""Freed memory, kept from one training step to the next rather than given back in each.

glibc gives the end of its heap back to the system as soon as some megabytes there are free, and
asks for them again a moment later, at a page fault every 4 KB. A backward pass that frees
activations and gradients as it goes meets that many times a step; one that leaves all gradients
for later, hardly ever. So while a model is trained on a CPU, the heap stays as large as it has
been.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as in malloc.h
NEVER = -1
# What glibc's own thresholds come to at the most, as it adapts them to what is freed: larger blocks
# aren't part of the heap. Setting one has it adapt neither any more.
LARGEST = 1 << 25
SETTINGS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"

_owners = 0


def keep(owner: object) -> Callable[[], object]:
    """Have the C library keep what is freed while the owner lives, or until this is taken back by
    calling what it returns; with the last owner the system gets it.

    Nothing changes where the C library isn't glibc, or the environment says how it is to be.
    """
    global _owners
    library = _glibc()
    if library is None:
        return _nothing
    if not _owners:
        library.mallopt(MMAP_THRESHOLD, LARGEST)
        library.mallopt(TRIM_THRESHOLD, NEVER)
    _owners += 1
    end = weakref.finalize(owner, _give_back, library)
    end.atexit = False
    return end


def _give_back(library: Any) -> None:
    global _owners
    _owners -= 1
    if not _owners:
        library.mallopt(TRIM_THRESHOLD, 2 * LARGEST)
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library, if it is glibc and nobody has told it how to go about this."""
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or any(name in os.environ for name in SETTINGS):
        return None
    if "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}):
        return None
    try:
        library = ctypes.CDLL(None)
        _ = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        return None
    return library


def _nothing() -> None:
    """What there is to take back where nothing was done."""
