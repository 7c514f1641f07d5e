"""The Hugging Face hub, if it can be reached: find out in seconds, not after minutes of retries."""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from unittest import mock

PATIENCE = 5.0  # seconds for one answer of any kind


@cache
def reachable() -> bool:
    """Whether the hub answers at all; one question a process, proxies and HF_ENDPOINT respected."""
    if any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        return False
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, method="HEAD"), timeout=PATIENCE
        ):
            return True
    except urllib.error.HTTPError:
        return True  # an answer, if not a friendly one
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def cached_only() -> Iterator[None]:
    """Within: if the hub can't be reached, its libraries look into their caches only."""
    if reachable():
        yield
        return
    import datasets.config
    import huggingface_hub.constants

    with (
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", new=True),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", new=True),
    ):
        yield
