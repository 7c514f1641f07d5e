"""What has to be said before torch or Triton loads.

The test processes share the cores, so each keeps to one thread; without a GPU, Triton's kernels run
in its interpreter.
"""

import os
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

KERNELS = ["src/unmask/kernels/*cuda*.py", "src/unmask/kernels/triton_code.py"]
collect_ignore_glob = [] if find_spec("triton") else KERNELS
