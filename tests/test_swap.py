"""The compiled swap does what the plain one does, on every kind of tensor, and shows it."""

import math
import threading
import time
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unmask.delta import Delta, Sparse, fingerprint
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.kernels import lazy, swap, swap_cpu
from unmask.kernels.swap import INTEGER, Exchange, Move, Moves, gather
from unmask.places import Places


def each(moves: list[Move]) -> list[Moves]:
    """One by one."""
    return [Moves.of(move) for move in moves]


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
        tensor.requires_grad_(draw(st.booleans()))
        count = draw(st.integers(0, tensor.numel()))
        at = torch.from_numpy(np.sort(generator.choice(tensor.numel(), count, replace=False)))
        new, old = (noise((count,), tensor.dtype, generator) for _ in range(2))
        made.append(Move(tensor, at, new, old))
    return made


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights(moves: list[Move]) -> list[bytes]:
    return [bytes_of(move.tensor) for move in moves]


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:The given buffer")
def test_compiled_and_plain_agree_to_the_bit():
    @settings(max_examples=60, deadline=None)
    @given(moves())
    def check(case: list[Move]) -> None:
        results = []
        for module in (None, swap_cpu):
            mine = [Move(m.tensor.detach().clone(), m.at, m.new, m.old.clone()) for m in case]
            before = weights(mine)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(swap, "compiled", lambda *_, module=module: module)
                exchange = Exchange(each(mine))
                assert exchange.start()
                exchange.finish()
                written, found = weights(mine), [bytes_of(move.old) for move in mine]
                there = [move._replace(old=torch.zeros_like(move.old)) for move in mine]
                gather(each(there))
                assert [bytes_of(move.old) for move in there] == [bytes_of(m.new) for m in case]
                # Back, to what is known; then forth again, but not quite.
                back = [move._replace(new=move.old, old=move.new) for move in mine]
                exchange = Exchange(each(back), known=True)
                assert exchange.start()
                exchange.finish()
                assert weights(mine) == before
                exchange.revert()
                assert weights(mine) == written
                assert Exchange(each(mine), known=True).start() == (
                    not any(m.at.numel() for m in case)
                )
            results.append((written, found))
        assert results[0] == results[1]

    check()


@pytest.fixture(params=[None, swap_cpu], ids=["plain", "compiled"])
def kernels(request: pytest.FixtureRequest, monkeypatch, threads) -> ModuleType | None:
    """The exchange in plain torch and in compiled code."""
    monkeypatch.setattr(swap, "compiled", lambda *_: request.param)
    return request.param


def some_moves(count: int = 4) -> list[Move]:
    generator = np.random.default_rng(0)
    made = []
    for k in range(count):
        at = torch.arange(k, 350, 3)
        new, old = (noise((len(at),), DTYPES[k % 4], generator) for _ in range(2))
        made.append(Move(noise((50, 7), DTYPES[k % 4], generator), at, new, old))
    return made


def test_a_different_bit_anywhere_is_noticed_and_all_taken_back(kernels):
    case = some_moves()
    gather(each(case))
    for move in case:
        for i in (0, 57, len(move.at) - 1):
            bits = move.old.view(INTEGER[move.old.element_size()])
            bits[i] ^= 1
            before = weights(case)
            exchange = Exchange(each(case), known=True)
            assert not exchange.start()
            exchange.revert()
            assert weights(case) == before
            bits[i] ^= 1
    assert Exchange(each(case), known=True).start()


@pytest.mark.parametrize("halt", [0, 1, 5, 250])
def test_an_interrupt_amid_the_exchange_leaves_no_trace(halt: int, monkeypatch, threads):
    monkeypatch.setattr(swap, "compiled", lambda *_: swap_cpu)
    case, main, move = some_moves(), threading.main_thread(), swap_cpu._move
    before, calls = weights(case), []

    def interrupted(*args: object) -> bool:
        calls.append(1)
        if threading.current_thread() is not main:
            time.sleep(0.01)  # still at work when the main thread is interrupted
        elif len(calls) > halt and not caught:
            done = move(*args)
            assert done
            raise KeyboardInterrupt
        return move(*args)

    caught: list[KeyboardInterrupt] = []
    monkeypatch.setattr(swap_cpu, "_move", interrupted)
    exchange = Exchange(each(case))
    with pytest.raises(KeyboardInterrupt):
        exchange.start()
    caught.append(KeyboardInterrupt())
    assert weights(case) != before
    exchange.revert()
    assert weights(case) == before
    time.sleep(0.05)  # whoever was only waiting for work finds that there is none
    assert weights(case) == before


def test_tensors_that_share_memory_get_the_plain_exchange(kernels):
    memory = torch.arange(10.0)
    at, old = torch.tensor([2, 3]), torch.empty(2)
    one = Move(memory[:6], at, torch.tensor([-2.0, -3.0]), old)
    two = Move(memory[1:7], at, torch.tensor([-3.0, -4.0]), old.clone())
    exchange = Exchange(each([one, two]))
    assert exchange._compiled is None
    assert exchange.start()
    assert one.old.tolist() == [2, 3]
    assert two.old.tolist() == [3, 4]
    exchange.finish()
    assert memory.tolist() == [0, 1, -2, -3, -4, 5, 6, 7, 8, 9]
    exchange.revert()
    assert memory.tolist() == list(range(10))


def test_reading_and_writing_keep_every_bit(kernels):
    generator = np.random.default_rng(0)
    tensors = {f"{k}": noise((50, 7), dtype, generator) for k, dtype in enumerate(DTYPES)}
    at = torch.arange(0, 350, 3)
    sparse = {n: Sparse((50, 7), at, noise((117,), t.dtype, generator)) for n, t in tensors.items()}
    held = {n: t.view(INTEGER[t.element_size()]).view(-1)[at] for n, t in tensors.items()}
    places, values = Places.of(sparse)
    before, after = places.room(), places.room()
    exchange = Exchange(places.moves(tensors, values, before))
    exchange.start()
    exchange.finish()
    for name, part in places.sparse(before).items():
        assert torch.equal(part.values.view(held[name].dtype), held[name])
    gather(places.moves(tensors, after, after))
    assert places.fingerprint(after) == fingerprint(places.sparse(after)) == fingerprint(sparse)


def test_autograd_learns_of_what_is_written_and_of_nothing_else(kernels):
    weight = nn.Parameter(torch.ones(4))
    move = Move(weight, torch.tensor([1]), torch.zeros(1), torch.zeros(1))
    with torch.no_grad():
        version = weight._version
        exchange = Exchange(each([move]))
        exchange.start()
        exchange.revert()
        assert weight._version == version
        exchange = Exchange(each([move]))
        exchange.start()
        exchange.finish()
    assert weight._version > version
    assert weight.tolist() == [1, 0, 1, 1]


def test_an_index_changed_behind_our_back_is_no_crash(monkeypatch):
    monkeypatch.setattr(swap, "compiled", lambda *_: swap_cpu)
    model = nn.Linear(4, 1, bias=False)
    before = bytes_of(model.weight)
    part = Sparse((1, 4), torch.tensor([0, 2]), model.weight.detach().view(-1)[[0, 2]])
    new = Sparse((1, 4), part.indices, torch.ones(2))
    delta = Delta({"weight": new}, base=fingerprint({"weight": part}))
    for wrong in (4, -1, 2**40, 0):
        part.indices[1] = wrong
        with pytest.raises(UnmaskError, match="outside"):
            delta.apply(model)
        assert bytes_of(model.weight) == before


@pytest.mark.parametrize("share", [1, 7, 10**6])
def test_an_index_that_is_wrong_late_leaves_no_trace(share: int, monkeypatch):
    """Also if other shares have been exchanged before it is seen."""
    monkeypatch.setattr(swap_cpu, "SHARE", share)
    for wrong in (10**12, -1, 40):
        done = [Move(torch.zeros(50), torch.arange(45), torch.ones(45), torch.empty(45))]
        done[0].at[44] = wrong
        exchange = swap_cpu.Exchange(each(done), known=False)
        with pytest.raises(UnmaskError, match="outside of its tensor"):
            exchange.start()
        exchange.revert()
        assert not done[0].tensor.any()


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
