"""The compact layout: exact, small, the same from both implementations, and distrustful."""

import json
import math
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask import codec, sealed
from unmask.delta import Delta, Sparse
from unmask.errors import UnmaskError
from unmask.kernels import rice

EITHER = pytest.mark.parametrize("kernels", [None, rice], ids=["numpy", "numba"])


def entropy(n: int, b: int) -> float:
    """log2 of the number of sets of `b` out of `n`."""
    return (math.lgamma(n + 1) - math.lgamma(b + 1) - math.lgamma(n - b + 1)) / math.log(2)


def integers(*numbers: int) -> codec.Integers:
    return np.array(numbers, dtype=np.int64)


@st.composite
def index_sets(draw: st.DrawFn) -> tuple[codec.Integers, codec.Integers, codec.Integers]:
    counts, sizes, index = [], [], []
    for size in draw(st.lists(st.integers(0, 60) | st.integers(0, codec.LARGEST - 1), max_size=6)):
        most = draw(st.sampled_from([0, 1, 7, 60]))
        chosen = draw(st.sets(st.integers(0, size - 1), max_size=most)) if size else set()
        counts.append(len(chosen))
        sizes.append(size)
        index += sorted(chosen)
    return integers(*index), integers(*counts), integers(*sizes)


@settings(max_examples=100, deadline=None)
@given(index_sets())
def test_decoding_undoes_encoding_and_both_implementations_agree(case):
    index, counts, sizes = case
    coded = codec._encode(index, counts, sizes)
    compiled = codec.Coded(*rice.encode(index, counts, sizes))
    assert [x.tobytes() for x in coded] == [x.tobytes() for x in compiled]
    for decode in (codec._decode, rice.decode):
        found = decode(*coded, counts, sizes)
        assert found.dtype == np.int64
        assert found.tolist() == index.tolist()
    assert codec.decode(coded, counts, sizes).tolist() == index.tolist()
    bound = sum(
        count * (math.log2(size / count) + 2) + 8
        for count, size in zip(counts.tolist(), sizes.tolist(), strict=True)
        if count
    )
    assert 8 * (len(coded.remainders) + len(coded.quotients)) <= bound + 8


@settings(max_examples=200, deadline=None)
@given(index_sets(), st.data())
def test_a_damaged_code_is_refused_or_gives_increasing_indices_in_range(case, data):
    index, counts, sizes = case
    coded = codec._encode(index, counts, sizes)
    stream = data.draw(st.sampled_from(["remainders", "quotients", "widths", "counts", "sizes"]))
    parts = {**coded._asdict(), "counts": counts, "sizes": sizes}
    if stream in ("remainders", "quotients"):
        good = parts[stream].tobytes()
        bits = np.unpackbits(parts[stream])
        how = data.draw(st.sampled_from(["flip", "cut", "longer", "garbage"]))
        if how == "flip" and len(bits):
            bits[data.draw(st.integers(0, len(bits) - 1))] ^= 1
        wrong = {
            "flip": np.packbits(bits).tobytes(),
            "cut": good[: data.draw(st.integers(0, max(len(good) - 1, 0)))],
            "longer": good + data.draw(st.binary(min_size=1, max_size=9)),
            "garbage": data.draw(st.binary(min_size=len(good), max_size=len(good))),
        }[how]
        parts[stream] = np.frombuffer(wrong, dtype=np.uint8)
    elif len(counts):
        parts[stream] = parts[stream].copy()
        at = data.draw(st.integers(0, len(counts) - 1))
        parts[stream][at] = data.draw(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 70))
    damaged = codec.Coded(parts["widths"], parts["remainders"], parts["quotients"])
    results = []
    for kernels in (None, rice):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(codec, "compiled", lambda *_, kernels=kernels: kernels)
            try:
                found = codec.decode(damaged, parts["counts"], parts["sizes"])
            except UnmaskError:
                results.append(None)
                continue
        results.append(found.tolist())
        start = 0
        for count, size in zip(parts["counts"].tolist(), parts["sizes"].tolist(), strict=True):
            part = found[start : start + count]
            assert (np.diff(part) > 0).all()
            assert not count or (part[0] >= 0 and part[-1] < size)
            start += count
    assert results[0] == results[1]


def test_the_format_is_what_the_docs_say():
    """The example of docs/deltas.md, by hand: 5, 6, 20 and 27 of 32 scalars."""
    index, counts, sizes = integers(5, 6, 20, 27), integers(4), integers(32)
    widths, remainders, quotients = codec.encode(index, counts, sizes)
    assert widths.tolist() == [2]
    # Gaps 5, 0, 13, 6 are quotients 1, 0, 3, 1 and remainders 1, 0, 1, 2, lowest bits first.
    assert remainders.tolist() == [0b10_01_00_01]
    assert quotients.tolist() == [0b0_1000_1_10, 0b1]


SETS = {
    "uniform": lambda g, n, b: g.choice(n, b, replace=False),
    "clustered": lambda g, n, b: np.unique(
        (g.integers(0, n, max(b // 500, 1))[:, None] + g.integers(0, 5000, (1, 500))) % n
    )[:b],
    "rows": lambda g, n, b: (
        g.choice(n // 768, max(b // 768, 1), replace=False)[:, None] * 768 + np.arange(768)
    ).reshape(-1),
    "skewed": lambda g, n, b: np.unique((g.random(2 * b) ** 4 * n).astype(np.int64))[:b],
}


@pytest.mark.parametrize("density", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("kind", SETS)
def test_the_code_is_within_a_tenth_of_the_entropy(kind: str, density: float):
    n = 4_000_000
    index = np.sort(SETS[kind](np.random.default_rng(0), n, int(n * density))).astype(np.int64)
    counts = np.histogram(index, bins=50, range=(0, n))[0].astype(np.int64)
    sizes = np.full(50, n // 50, dtype=np.int64)
    coded = codec.encode(index - np.repeat(np.arange(50) * (n // 50), counts), counts, sizes)
    bits, least = 8 * (len(coded.remainders) + len(coded.quotients)), entropy(n, len(index))
    for width in (16, 32):  # bfloat16, float32 values
        assert bits + width * len(index) <= 1.02 * (least + width * len(index))
    assert bits <= least + (0.13 if kind == "uniform" else 0.4) * len(index) + 50 * 8


# The file


def large(dtype: torch.dtype = torch.float32) -> tuple[Delta, float]:
    """300,000 of 60M scalars in 150 tensors with long names, and the least bits they can take."""
    generator = np.random.default_rng(1)
    sparse, n = {}, 400_000
    at = np.sort(generator.choice(150 * n, 300_000, replace=False))
    for k in range(150):
        index = torch.from_numpy(at[(at >= k * n) & (at < (k + 1) * n)] - k * n)
        name = f"deberta.encoder.layer.{k // 12}.attention.self.in_proj_{k}.weight"
        sparse[name] = Sparse((400, 1000), index, torch.randn(len(index)).to(dtype))
    info = {"method": {"heuristic": "D3", "exp": 2.0}, "budget": 300_000}
    least = entropy(150 * n, len(at)) + 8 * dtype.itemsize * len(at)
    return Delta(sparse, base="0" * 64, info=info), least


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_files_with_all_their_headers_keep_to_their_bounds(dtype, tmp_path: Path):
    delta, least = large(dtype)
    compact = delta.save(tmp_path / "compact")
    plain = delta.save(tmp_path / "plain", layout="plain")
    assert 8 * size(compact) <= 1.03 * least
    assert size(plain) <= (4 + dtype.itemsize) * delta.active + 400 * len(delta.sparse) + 2000
    assert Delta.load(compact) == Delta.load(plain) == delta
    delta.save(tmp_path / "again", layout="compact")
    for file in compact.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_saving_in_another_layout_replaces_the_first(tmp_path: Path):
    delta, _ = large()
    delta.save(tmp_path, layout="plain")
    delta.save(tmp_path)
    assert json.loads((tmp_path / sealed.CONFIG).read_text())["layout"] == "compact"
    assert Delta.load(tmp_path) == delta
    with pytest.raises(UnmaskError, match="compact, plain"):
        delta.save(tmp_path, layout="gzip")  # type: ignore[arg-type]


def test_a_tensor_too_large_for_the_compact_layout_is_named(tmp_path: Path):
    delta = Delta({"w": Sparse((1 << 53,), torch.tensor([3]), torch.ones(1))}, base="0" * 64)
    with pytest.raises(UnmaskError, match="layout='plain'"):
        delta.save(tmp_path, layout="compact")
    assert Delta.load(delta.save(tmp_path, layout="plain")) == delta


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_whole_tensors_mixed_dtypes_and_odd_names_survive(kernels, dtype, monkeypatch):
    monkeypatch.setattr(codec, "compiled", lambda *_: kernels)
    at = torch.tensor([0, 2, 5])
    sparse = {
        "": Sparse((6,), at, torch.tensor([-0.0, math.nan, math.inf]).to(dtype)),
        "a.b/ü\n": Sparse((2, 3), at, torch.ones(3)),
        "scalar": Sparse((), at[:1], torch.ones(1, dtype=torch.float64)),
        "none": Sparse((0, 4), at[:0], torch.ones(0)),
    }
    delta = Delta(sparse, {"h.x": torch.ones(2, 2)}, {"n": torch.tensor(3)}, base="0" * 64)
    with tempfile.TemporaryDirectory() as folder:
        assert Delta.load(delta.save(folder)) == delta
        empty = Delta({}, base="0" * 64)
        assert Delta.load(empty.save(folder)) == empty


def deflated(rows: object) -> torch.Tensor:
    return stream(zlib.compress(json.dumps(rows).encode()))


def stream(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


GOOD = {
    "table": deflated([["w", "float32", [32], 4, 2]]),
    "remainders": stream(bytes([0b10_01_00_01])),
    "quotients": stream(bytes([0b0100_0110, 1])),
    "values.float32": torch.ones(4),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": None}, "table"),
        ({"quotients": None}, "quotients"),
        ({"remainders": torch.ones(1)}, "vector of bytes"),
        ({"quotients": stream(b"ab")[None]}, "vector of bytes"),
        ({"quotients.x": stream(b"ab")}, "unknown key"),
        ({"values": torch.ones(4)}, "unknown key"),
        ({"other.w": torch.ones(4)}, "unknown key"),
        ({"values.float32": None}, "missing, or nobody's"),
        ({"values.float16": torch.ones(4)}, "missing, or nobody's"),
        ({"values.float32": torch.ones(5)}, "4 values"),
        ({"values.float32": torch.ones(4, 1)}, "4 values"),
        ({"values.float32": torch.ones(4).half()}, "4 values"),
        ({"full.w": torch.ones(4)}, "both sparsely and whole"),
        ({"table": stream(b"")}, "cut off|JSON"),
        ({"table": stream(b"garbage")}, "deflated"),
        ({"table": stream(zlib.compress(b"[]")[:-1])}, "cut off"),
        ({"table": stream(zlib.compress(b"[]") + b"x")}, "after its end"),
        ({"table": stream(zlib.compress(b"[" * 100_000))}, "JSON"),
        ({"table": stream(zlib.compress(b"\xff"))}, "JSON"),
        ({"table": stream(zlib.compress(b"9" * 5000))}, "JSON"),
        ({"table": stream(zlib.compress(b" " * (1 << 27), 9))}, "JSON|too long"),
        ({"table": deflated({"w": 1})}, "rows|no sense"),
        ({"table": deflated(3)}, "rows"),
        ({"table": deflated([["w", "float32", [32], 4]])}, "rows"),
        ({"table": deflated(["abcde"])}, "no sense"),
        ({"table": deflated([["w", "float32", [32], 4, 2]] * 2)}, "twice"),
        ({"table": deflated([["w", "int32", [32], 4, 2]])}, "no sense"),
        ({"table": deflated([["w", ["float32"], [32], 4, 2]])}, "no sense"),
        ({"table": deflated([[["w"], "float32", [32], 4, 2]])}, "no sense"),
        ({"table": deflated([["w", "float32", "32", 4, 2]])}, "no sense"),
        ({"table": deflated([["w", "float32", [-32], 4, 2]])}, "no sense"),
        ({"table": deflated([["w", "float32", [32.0], 4, 2]])}, "no sense"),
        ({"table": deflated([["w", "float32", [32], True, 2]])}, "no sense"),
        ({"table": deflated([["w", "float32", [32], 2**60, 2]])}, "no sense"),
        ({"table": deflated([["w", "float32", [2**30, 2**30], 4, 2]])}, "shape is out of range"),
        ({"table": deflated([["w", "float32", [32], 4, 53]])}, "width"),
        ({"table": deflated([["w", "float32", [32], 4, 5]])}, "width"),
        ({"table": deflated([["w", "float32", [32], 4, 3]])}, "remainders"),
        ({"table": deflated([["w", "float32", [3], 4, 2]])}, "more indices than scalars"),
        ({"table": deflated([["w", "float32", [27], 4, 2]])}, "damaged"),
        ({"table": deflated([["\ud800", "float32", [32], 4, 2]])}, "JSON"),
        ({"quotients": stream(bytes([0b0100_0110]))}, "damaged"),
        ({"quotients": stream(bytes([0b0100_0110, 1, 0]))}, "damaged"),
        ({"quotients": stream(bytes([0b0100_0110, 3]))}, "damaged"),
        ({"quotients": stream(b"")}, "cut off"),
        ({"remainders": stream(b"ab")}, "remainders"),
    ],
)
@EITHER
def test_a_well_sealed_but_senseless_file_is_refused(
    change, message: str, kernels, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(codec, "compiled", lambda *_: kernels)
    config = {"layout": "compact", "base": "0" * 64, "info": {}}
    sealed.write(tmp_path, config, GOOD)
    assert Delta.load(tmp_path).sparse["w"].indices.tolist() == [5, 6, 20, 27]
    tensors = {key: t for key, t in (GOOD | change).items() if t is not None}
    sealed.write(tmp_path, config, tensors)
    with pytest.raises(UnmaskError, match=message):
        Delta.load(tmp_path)
