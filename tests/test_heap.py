"""Training steps don't ask for memory that they gave back; whoever sets the C library is heard."""

import os
import subprocess
import sys
from typing import Any

import pytest

GLIBC = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})
pytestmark = pytest.mark.skipif(not GLIBC, reason="another C library than glibc")

# 128 MB at the end of glibc's heap, freed; then the resident MB.
START = """
import ctypes, os, resource, torch, unmask
from torch import nn

torch.set_num_threads(1)
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

def used(size=1 << 22):
    blocks = [library.malloc(size) for _ in range((1 << 27) // size)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in reversed(blocks):
        library.free(block)
    return resident()

def attached(**options):
    return unmask.attach(nn.Linear(64, 64), unmask.id3(budget=8), steps=9, **options)

for _ in range(3):  # glibc adapts to what it sees
    used()
for gradients in "dense", "streaming", "sampled":  # what comes with the first, compiled loops
    attached(gradients=gradients).detach()
before = resident()
"""


def run(code: str, **environment: str) -> Any:
    """What the code says, in a process of its own."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC", "GLIBC"))}
    out = subprocess.run(
        [sys.executable, "-c", START + code], env=own | environment, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    return [float(word) for word in out.stdout.split()]


@pytest.mark.parametrize("gradients", ["dense", "streaming", "sampled"])
def test_freed_memory_stays_while_a_tuner_is_attached(gradients: str) -> None:
    before, first, second, after, later = run(
        f"one, other = attached(gradients={gradients!r}), attached()\n"
        "print(before, used())\n"
        "one.detach()\nprint(used())\n"
        "other.detach()\nprint(resident(), used())\n"
    )
    assert first > before + 100
    assert second > before + 100, "another tuner is still at work"
    assert after < before + 50
    assert later < before + 50


def test_so_does_that_of_large_tensors() -> None:
    before, first = run("tuner = attached()\nprint(before, used(1 << 24))\n")
    assert first > before + 100


def test_it_stays_no_longer_than_the_tuner_does() -> None:
    before, first, after = run(
        "import gc\ntuner = attached()\nprint(before, used())\n"
        "del tuner\ngc.collect()\nprint(resident())\n"
    )
    assert first > before + 100
    assert after < before + 50


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "1000000"},
        {"MALLOC_MMAP_THRESHOLD_": "65536"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"},
    ],
)
def test_what_the_environment_says_stands(environment: dict[str, str]) -> None:
    before, after = run("tuner = attached()\nprint(before, used())\n", **environment)
    assert after < before + 50


@pytest.mark.parametrize("gradients", ["streaming", "sampled"])
def test_a_training_step_asks_for_no_memory_that_it_had(gradients: str) -> None:
    """Of some 100 MB a step, in blocks that are freed in another order than they came in."""
    (faults,) = run(
        "model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(24)])\n"
        f"tuner = unmask.attach(model, unmask.id3(budget=99), steps=9, gradients={gradients!r})\n"
        "optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)\n"
        "def step():\n"
        "    model(torch.ones(2048, 512)).square().mean().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
        "for _ in range(4):\n    step()\n"
        "count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "start = count()\n"
        "for _ in range(4):\n    step()\n"
        "print(count() - start)\n"
    )
    assert faults < 10_000, "of 4 KB each; 50,000 where memory is given back"
