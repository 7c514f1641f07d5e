"""The compiled swap does what the plain one does, on every kind of tensor, and shows it."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unmask.delta import Delta, Sparse, fingerprint
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.kernels import lazy, swap, swap_cpu
from unmask.kernels.swap import INTEGER, Move
from unmask.sparse import read, write

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def threads() -> Iterator[None]:
    """Shares so small that even tiny moves are shared out."""
    before, share = torch.get_num_threads(), swap_cpu.SHARE
    torch.set_num_threads(3)
    swap_cpu.SHARE = 1
    yield
    torch.set_num_threads(before)
    swap_cpu.SHARE = share


def noise(shape: tuple[int, ...], dtype: torch.dtype, generator: np.random.Generator) -> Tensor:
    count = math.prod(shape)
    raw = bytearray(generator.bytes((count or 1) * dtype.itemsize))
    return torch.frombuffer(raw, dtype=dtype)[:count].view(shape).clone()


@st.composite
def moves(draw: st.DrawFn) -> list[Move]:
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    made = []
    for _ in range(draw(st.integers(0, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
        tensor = noise(shape, draw(st.sampled_from(DTYPES)), generator)
        if draw(st.booleans()) and len(shape) > 1:
            tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        count = draw(st.integers(0, tensor.numel()))
        at = torch.from_numpy(np.sort(generator.choice(tensor.numel(), count, replace=False)))
        made.append(Move(tensor, at, noise((count,), tensor.dtype, generator)))
    return made


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:The given buffer")
def test_compiled_and_plain_agree_to_the_bit():
    @settings(max_examples=60, deadline=None)
    @given(moves())
    def check(case: list[Move]) -> None:
        results = []
        for module in (None, swap_cpu):
            mine = [Move(m.tensor.clone(), m.at, m.values.clone()) for m in case]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(swap, "compiled", lambda *_, module=module: module)
                swap.scatter(mine)
                written = [bytes_of(move.tensor) for move in mine]
                for move in mine:
                    move.values.zero_()
                swap.gather(mine)
            results.append((written, [bytes_of(move.values) for move in mine]))
            assert results[-1][1] == [bytes_of(move.values) for move in case]
        assert results[0] == results[1]

    check()


def test_reading_and_writing_keep_every_bit():
    generator = np.random.default_rng(0)
    tensors = {f"{k}": noise((50, 7), dtype, generator) for k, dtype in enumerate(DTYPES)}
    at = torch.arange(0, 350, 3)
    sparse = {n: Sparse((50, 7), at, noise((117,), t.dtype, generator)) for n, t in tensors.items()}
    before = read(sparse, tensors)
    for name, part in before.items():
        width = INTEGER[part.values.element_size()]
        assert torch.equal(part.values.view(width), tensors[name].view(width).view(-1)[at])
    write(sparse, tensors)
    assert fingerprint(read(sparse, tensors)) == fingerprint(sparse)
    write(before, tensors)
    assert fingerprint(read(sparse, tensors)) == fingerprint(before)


def test_autograd_learns_of_a_compiled_write(monkeypatch):
    monkeypatch.setattr(swap, "compiled", lambda *_: swap_cpu)
    weight = nn.Parameter(torch.ones(4))
    version = weight._version
    swap.scatter([Move(weight.detach(), torch.tensor([1]), torch.zeros(1))])
    assert weight._version > version
    assert weight.tolist() == [1, 0, 1, 1]


def test_an_index_changed_behind_our_back_is_no_crash(monkeypatch):
    monkeypatch.setattr(swap, "compiled", lambda *_: swap_cpu)
    model = nn.Linear(4, 1, bias=False)
    part = Sparse((1, 4), torch.tensor([0, 2]), model.weight.detach().view(-1)[[0, 2]])
    delta = Delta({"weight": part}, base=fingerprint({"weight": part}))
    for wrong in (4, -1, 2**40):
        part.indices[1] = wrong
        with pytest.raises(UnmaskError, match="outside"):
            delta.apply(model)


def test_the_compiler_is_loaded_only_when_it_pays(monkeypatch):
    monkeypatch.setattr(lazy, "_worked", 0)
    monkeypatch.delitem(lazy.sys.modules, "numba")
    loaded = []
    monkeypatch.setattr(lazy, "_load", lambda name: loaded.append(name))
    lazy.compiled("swap_cpu", lazy.PATIENCE)
    assert not loaded
    lazy.compiled("swap_cpu", 1)
    assert loaded == ["swap_cpu"]


def test_without_the_compiler_plain_torch_is_used_and_said_once(monkeypatch, recwarn):
    lazy._load.cache_clear()

    def missing(name: str) -> None:
        raise ImportError("no numba")

    monkeypatch.setattr(lazy, "import_module", missing)
    try:
        with pytest.warns(UnmaskWarning, match="pip install numba"):
            assert lazy._load("swap_cpu") is None
        assert lazy._load("swap_cpu") is None
    finally:
        lazy._load.cache_clear()
