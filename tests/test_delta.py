"""A delta, saved, loaded, applied and undone, is exact to the bit; anything else is refused."""

import copy
import json
import math
import os
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unmask import sealed
from unmask.delta import Delta, Sparse, fingerprint
from unmask.errors import UnmaskError
from unmask.kernels import swap, swap_cpu
from unmask.layouts import LAYOUTS
from unmask.places import Places

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits: every NaN payload, infinity, subnormal and -0.0 is among them."""
    data = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    return (
        torch.frombuffer(bytearray(data or b"\0" * 8), dtype=INTEGER[dtype.itemsize])[
            : math.prod(shape)
        ]
        .view(dtype)
        .view(shape)
    )


def state(model: nn.Module) -> dict[str, bytes]:
    held = [*model.named_parameters(remove_duplicate=False)]
    held += model.named_buffers(remove_duplicate=False)
    return {
        name: tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in held
    }


def bits_of(parameter: Tensor) -> Tensor:
    """Its own memory as a vector of integers."""
    return parameter.data.view(-1).view(INTEGER[parameter.element_size()])


class Holder(nn.Module):
    """Parameters under any name, dots included: `_parameters` is what `nn.Module` reads."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._parameters.update({name: nn.Parameter(t) for name, t in tensors.items()})


def changed(model: nn.Module, positions: dict[str, list[int]], seed: int = 7, **rest) -> Delta:
    """A delta that writes random bits at `positions` of `model`."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    base = {
        name: Sparse(
            weights[name].shape,
            torch.tensor(at, dtype=torch.int64),
            weights[name].detach().reshape(-1)[at],
        )
        for name, at in positions.items()
    }
    new = {
        name: replace(part, values=noise((len(part.indices),), part.values.dtype, seed))
        for name, part in base.items()
    }
    return Delta(new, base=fingerprint(base), **rest)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 3)).to(dtype)
    return nn.ModuleDict({"body": body, "head": nn.Linear(3, 2, dtype=dtype)})


def network_delta(dtype: torch.dtype = torch.float32) -> Delta:
    other = network(dtype)
    full = {f"head.{name}": torch.randn_like(p) for name, p in other["head"].named_parameters()}
    norm = other["body"][1]
    norm.num_batches_tracked += 5
    norm.running_mean += 1
    buffers = {f"body.{name}": buffer for name, buffer in other["body"].named_buffers()}
    positions = {"body.0.weight": [0, 5, 17], "body.2.weight": [11], "body.1.bias": [0, 1]}
    info = {"base_model_name_or_path": "näme/模型", "budget": 6, "lr": 1e-3, "tags": ("a", None)}
    return changed(other, positions, full=full, buffers=buffers, info=info)


@st.composite
def holders(draw: st.DrawFn) -> tuple[Holder, dict[str, list[int]]]:
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True))
    tensors, positions = {}, {}
    for number, name in enumerate(names[:4]):
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=5)))
        tensors[name] = noise(shape, draw(st.sampled_from(DTYPES)), number)
        last = math.prod(shape) - 1
        if last >= 0:
            positions[name] = sorted(draw(st.sets(st.integers(0, last))))
    return Holder(tensors), positions


@settings(max_examples=60, deadline=None)
@given(holders(), st.integers(0, 99))
def test_save_load_apply_undo_is_the_identity(case: tuple[Holder, dict[str, list[int]]], seed: int):
    model, positions = case
    delta = changed(model, positions, seed)
    with tempfile.TemporaryDirectory() as folder:
        assert Delta.load(delta.save(folder)) == delta
        loaded = Delta.load(delta.save(folder, layout="plain"))
    assert loaded == delta
    before = state(model)
    expected = {name: p.detach().clone().reshape(-1) for name, p in model.named_parameters()}
    for name, at in positions.items():
        expected[name][at] = delta.sparse[name].values
    undo = loaded.apply(model)
    assert state(model) == state(Holder(expected))
    assert undo.apply(model) == delta
    assert state(model) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_tensors_and_norm_buffers_come_and_go(dtype: torch.dtype):
    model, delta = network(dtype), network_delta(dtype)
    torch.nn.init.ones_(model["head"].weight)  # a head that differs is no other base
    before = state(model)
    undo = delta.apply(model)
    assert model["body"][1].num_batches_tracked == 5
    assert torch.equal(model["head"].weight, delta.full["head.weight"])
    assert state(model) != before
    assert undo.apply(model) == delta
    assert state(model) == before
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_a_delta_keeps_its_own_copy_of_whole_tensors():
    model = network()
    delta = changed(model, {}, full={"head.weight": model["head"].weight})
    twin = changed(network(), {}, full={"head.weight": network()["head"].weight})
    with torch.no_grad():
        model["head"].weight += 1
    assert delta == twin


def test_memory_order_does_not_matter(kernels):
    model = network().to(memory_format=torch.channels_last)
    model["body"][2].weight = nn.Parameter(network()["body"][2].weight.detach().T.contiguous().T)
    assert not model["body"][2].weight.is_contiguous()
    contiguous, delta = network(), network_delta()
    undo = delta.apply(model)
    assert delta.apply(contiguous) == undo
    assert state(model) == state(contiguous)
    undo.apply(model)
    assert state(model) == state(network())


def test_tied_weights_go_by_any_of_their_names_but_not_by_two():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    untied = changed(model, {"a.weight": [0], "b.weight": [1]})
    model["b"].weight = model["a"].weight
    before = state(model)
    with pytest.raises(UnmaskError, match="one tied tensor"):
        untied.apply(model)
    assert state(model) == before
    delta = changed(model, {"b.weight": [3]})
    delta.apply(model).apply(model)
    assert state(model) == before


def test_an_empty_delta_saves_loads_and_applies(tmp_path: Path):
    delta = Delta({}, base=fingerprint({}))
    assert (delta.active, delta.nbytes, delta.tensors) == (0, 0, [])
    assert Delta.load(delta.save(tmp_path)).apply(network()) == delta


def test_the_allotment_adds_up():
    delta = network_delta()
    assert delta.active == sum(row.changed for row in delta.tensors) == 6
    assert delta.tensors[0] == ("body.0.weight", (2, 1, 3, 3), 3, 3 / 18)
    assert repr(delta) == "Delta(active=6, tensors=3, full=2, buffers=3, nbytes=104)"
    assert delta != replace(delta, info={})
    assert delta != "delta"


# The file


def test_equal_deltas_give_equal_bytes_and_leave_other_files_alone(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md").write_text("mine")
        assert network_delta().save(tmp_path / folder) == tmp_path / folder
        network_delta().save(str(tmp_path / folder))
    files = [{f.name: f.read_bytes() for f in (tmp_path / x).iterdir()} for x in ("a", "b")]
    assert files[0] == files[1]
    assert files[0].keys() == {"README.md", sealed.CONFIG, sealed.WEIGHTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_flipped_bit_and_every_truncation_is_refused(layout, tmp_path: Path):
    model = Holder({"é": torch.zeros(2)})
    info = {"escaped": 'é\n"\x7f', "null": None, "number": -1.5e-7, "whole": True}
    path = changed(model, {"é": [1]}, buffers={"b": torch.tensor(1)}, info=info).save(
        tmp_path, layout
    )
    Delta.load(path)
    for name in (sealed.CONFIG, sealed.WEIGHTS):
        file, good = path / name, (path / name).read_bytes()
        with file.open("r+b", buffering=0) as raw:
            for at, byte in enumerate(good):
                for bit in range(8):
                    os.pwrite(raw.fileno(), bytes([byte ^ 1 << bit]), at)
                    with pytest.raises(UnmaskError):
                        Delta.load(path)
                os.pwrite(raw.fileno(), bytes([byte]), at)
        for wrong in (*(good[:n] for n in range(0, len(good), 7)), good + b"\0", good + b" "):
            file.write_bytes(wrong)
            with pytest.raises(UnmaskError):
                Delta.load(path)
        file.write_bytes(good)
    Delta.load(path)


GOOD = {"indices.w": torch.tensor([1, 4], dtype=torch.int32), "values.w": torch.ones(2)}
NONE = torch.tensor([], dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "shapes", "message"),
    [
        ({"values.w": GOOD["values.w"]}, {"w": "5"}, "lacks"),
        ({"indices.w": GOOD["indices.w"]}, {"w": "5"}, "lacks"),
        (GOOD, {}, "lacks"),
        (GOOD, {"w": "5", "v": "5"}, "lacks"),
        (GOOD | {"other.w": torch.ones(1)}, {"w": "5"}, "unknown key"),
        (GOOD | {"w": torch.ones(1)}, {"w": "5"}, "unknown key"),
        (GOOD | {"full.w": torch.ones(5)}, {"w": "5"}, "both sparsely and whole"),
        (GOOD, {"w": "4"}, "strictly increasing within the 4"),
        (GOOD, {"w": ""}, "strictly increasing"),
        (GOOD, {"w": [5]}, "no shape"),
        (GOOD, {"w": "5x"}, "no shape"),
        (GOOD, {"w": "-5"}, "no shape"),
        (GOOD, {"w": "\u0665"}, "no shape"),
        (GOOD, {"w": "9" * 5000}, "no shape"),
        (GOOD, {"w": "65536x65536"}, "wrong width"),
        (GOOD | {"indices.w": GOOD["indices.w"].long()}, {"w": "5"}, "wrong width"),
        (GOOD | {"indices.w": GOOD["indices.w"].float()}, {"w": "5"}, "wrong width"),
        (GOOD | {"indices.w": GOOD["indices.w"].flip(0)}, {"w": "5"}, "strictly increasing"),
        (GOOD | {"indices.w": GOOD["indices.w"] * 0}, {"w": "5"}, "strictly increasing"),
        (GOOD | {"indices.w": GOOD["indices.w"] - 2}, {"w": "5"}, "strictly increasing"),
        (GOOD | {"indices.w": GOOD["indices.w"][None]}, {"w": "5"}, "int64 vector"),
        (GOOD | {"indices.w": NONE}, {"w": "5"}, "0 indices"),
        (GOOD | {"values.w": torch.ones(3)}, {"w": "5"}, "2 indices"),
        (GOOD | {"values.w": torch.ones(2, 1)}, {"w": "5"}, "2 indices"),
        (GOOD | {"values.w": torch.ones(2).int()}, {"w": "5"}, "floats"),
        (GOOD | {"values.w": torch.ones(2).to(torch.float8_e4m3fn)}, {"w": "5"}, "floats"),
    ],
)
def test_a_well_sealed_but_senseless_file_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], shapes: dict[str, object], message: str
):
    config = {"layout": "plain", "base": "0" * 64, "info": {}, "shapes": shapes}
    sealed.write(tmp_path, config, tensors)
    with pytest.raises(UnmaskError, match=message):
        Delta.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "golomb"}, "layout 'golomb'"),
        ({"base": None}, "another type"),
        ({"base": "A" * 64}, "fingerprint"),
        ({"info": []}, "another type"),
        ({"shapes": None}, "another type"),
    ],
)
def test_a_senseless_config_is_refused(tmp_path: Path, change: dict[str, object], message: str):
    config = {"layout": "plain", "base": "0" * 64, "info": {}, "shapes": {"w": "5"}}
    sealed.write(tmp_path, config, GOOD)
    Delta.load(tmp_path)
    sealed.write(tmp_path, config | change, GOOD)
    with pytest.raises(UnmaskError, match=message):
        Delta.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "isn't JSON"),
        ("[" * 100_000, "isn't JSON"),
        ('{"peft_type": NaN}', "isn't JSON"),
        ('{"peft_type": "\\ud800"}', "isn't JSON"),
        ("9" * 5000, "isn't JSON"),
        ("[]", "no unmask delta"),
        ('{"peft_type": "LORA", "r": 8}', "'LORA'"),
        ('{"peft_type": "LORA", "task_type": null}', r"PEFT adapter of type LORA.*from_pretrained"),
        ('{"peft_type": "UNMASK", "format": 2}', "upgrade"),
        ('{"peft_type": "UNMASK", "format": 1}', "checksum"),
        ('{"peft_type": "UNMASK", "format": 1, "format": 1}', "checksum"),
    ],
)
def test_a_foreign_config_is_refused(tmp_path: Path, text: str, message: str):
    network_delta().save(tmp_path)
    (tmp_path / sealed.CONFIG).write_text(text)
    with pytest.raises(UnmaskError, match=message):
        Delta.load(tmp_path)


def test_reformatting_the_config_is_refused(tmp_path: Path):
    config = network_delta().save(tmp_path) / sealed.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text())))
    with pytest.raises(UnmaskError, match="checksum"):
        Delta.load(tmp_path)


def test_weights_that_torch_cannot_hold_are_refused(tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save", lambda tensors: b"\x08" + b"\0" * 7 + b"{}}}    ")
        sealed.write(tmp_path, {}, {})
    with pytest.raises(UnmaskError, match="safetensors"):
        Delta.load(tmp_path)


def test_missing_files_and_bad_paths_are_refused(tmp_path: Path):
    for path in (tmp_path / "none", tmp_path, "a\0b"):
        with pytest.raises(UnmaskError, match="must be a directory"):
            Delta.load(path)
    (network_delta().save(tmp_path / "d") / sealed.WEIGHTS).unlink()
    with pytest.raises(UnmaskError, match=sealed.WEIGHTS):
        Delta.load(tmp_path / "d")
    for path in (3, None):
        with pytest.raises(UnmaskError, match=f"{path} is no path"):
            Delta.load(path)
        with pytest.raises(UnmaskError, match=f"{path} is no path"):
            network_delta().save(path)
    with pytest.raises(UnmaskError, match="can't write"):
        network_delta().save(tmp_path / "a\0b")
    (tmp_path / "file").touch()
    with pytest.raises(UnmaskError, match="can't write"):
        network_delta().save(tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in a directory are POSIX's")
@pytest.mark.parametrize("name", [sealed.CONFIG, sealed.WEIGHTS])
def test_a_pipe_is_no_file_to_wait_for(name: str, tmp_path: Path):
    folder = network_delta().save(tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UnmaskError, match=f"{name}' is no file"):
        Delta.load(folder)


def test_a_failed_save_keeps_the_old_delta(tmp_path: Path, monkeypatch):
    delta = network_delta()
    delta.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(UnmaskError, match="disk full"):
            replace(delta, info={}).save(tmp_path)
    assert Delta.load(tmp_path) == delta
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("over", [False, True], ids=["first", "over another"])
@pytest.mark.parametrize("swept", [False, True], ids=["killed", "stopped"])
@pytest.mark.parametrize("count", [0, 1])
def test_a_save_that_is_cut_off_leaves_the_old_delta_or_the_new(
    count: int, swept: bool, over: bool, tmp_path: Path, monkeypatch
):
    """After so many renames; by a signal that lets Python clean up, or by one that doesn't."""
    old, new, rename, done = network_delta(), network_delta(torch.bfloat16), os.replace, []

    def stopping(*paths: Path) -> None:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(rename(*paths))

    if over:
        old.save(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stopping)
        if not swept:
            patch.setattr(Path, "unlink", lambda *_, **__: None)
        new.save(tmp_path)
    if over or count:
        assert Delta.load(tmp_path) == (new if count else old)
    else:
        with pytest.raises(UnmaskError, match="no delta at"):
            Delta.load(tmp_path)
    assert Delta.load(old.save(tmp_path)) == old
    safetensors.torch.load_file(tmp_path / sealed.WEIGHTS)


def test_a_left_over_of_another_save_is_passed_over(tmp_path: Path):
    delta = network_delta()
    left = delta.save(tmp_path) / f".{sealed.WEIGHTS}.01234567.tmp"
    left.write_bytes(b"half")
    assert Delta.load(tmp_path) == delta
    (tmp_path / sealed.WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(UnmaskError, match="checksum"):
        Delta.load(tmp_path)


def test_wide_tensors_have_wide_indices(tmp_path: Path):
    for numel, width in ((2**31 - 1, 4), (2**31, 8)):
        at = torch.tensor([0, numel - 1])
        delta = Delta({"w": Sparse((numel,), at, torch.ones(2))}, base="0" * 64)
        assert delta.nbytes == 2 * (width + 4)
        assert Delta.load(delta.save(tmp_path, layout="plain")) == delta


# The model


class Odd(torch.Tensor):
    """Any tensor subclass: a quantised weight, a DTensor."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["body"][2].register_parameter("weight", None), "doesn't have"),
        (lambda m: m["body"].insert(0, nn.Identity()), "doesn't have"),
        (lambda m: m.bfloat16(), "load the base in torch.float32"),
        (lambda m: m.to("meta"), "holds no data"),
        (lambda m: m.update({"head": nn.Linear(3, 4)}), "sizes"),
        (lambda m: m.update({"head": nn.LazyLinear(2)}), "holds no data"),
        (lambda m: m["body"][1].register_buffer("running_var", torch.ones(3)), "sizes"),
        (lambda m: m["body"][1].register_buffer("num_batches_tracked", torch.ones(())), "int64"),
        (
            lambda m: m["head"].register_parameter(
                "weight", nn.Parameter(torch.zeros(2, 3, dtype=torch.uint8), requires_grad=False)
            ),
            "quantised",
        ),
        (
            lambda m: m["head"].register_buffer("bias", m["head"]._parameters.pop("bias").detach()),
            "doesn't have",
        ),
        (
            lambda m: m["head"]._parameters.update(bias=torch.zeros(2).as_subclass(Odd)),
            "quantised",
        ),
        (
            lambda m: m["head"].register_parameter(
                "weight", nn.Parameter(torch.zeros(1, 3).expand(2, 3))
            ),
            "expanded",
        ),
        (lambda m: m["body"][0].weight.data.view(-1)[17:].neg_(), "wrong base.*näme"),
    ],
)
def test_an_unfit_model_is_refused_untouched(change, message: str):
    model = network()
    change(model)
    frozen = message in ("holds no data", "expanded") or state(model)
    with pytest.raises(UnmaskError, match=message):
        network_delta().apply(model)
    assert frozen is True or state(model) == frozen


def test_what_is_no_model_and_no_undo_is_refused():
    for model in ("x", None, network):
        for delta in (network_delta(), Delta({}, base=fingerprint({}))):
            with pytest.raises(UnmaskError, match=r"of a torch\.nn\.Module, not of"):
                delta.apply(model)
    model = network()
    with pytest.raises(UnmaskError, match="instead_of='x'"):
        network_delta().apply(model, instead_of="x")
    assert state(model) == state(network())


def test_a_zero_of_the_other_sign_is_another_base():
    model = Holder({"w": torch.zeros(3)})
    delta = changed(model, {"w": [1]})
    with torch.no_grad():
        model.get_parameter("w")[1] = -0.0
    with pytest.raises(UnmaskError, match="wrong base"):
        delta.apply(model)


def test_applying_twice_is_named():
    model, delta = network(), network_delta()
    delta.apply(model)
    with pytest.raises(UnmaskError, match="already applied"):
        delta.apply(model)


@pytest.fixture(params=[None, swap_cpu], ids=["plain", "compiled"])
def kernels(request: pytest.FixtureRequest, monkeypatch) -> None:
    """The exchange in plain torch and in compiled code."""
    monkeypatch.setattr(swap, "compiled", lambda *_: request.param)


def test_a_failure_halfway_is_rolled_back(monkeypatch, kernels):
    model, before, scatter = network(), state(network()), swap.scatter
    halfway = []

    def failing(moves: list[swap.Move]) -> None:
        scatter(moves if halfway else moves[:2])
        if not halfway:
            halfway.append(state(model))
            raise KeyboardInterrupt

    monkeypatch.setattr(swap, "scatter", failing)
    with pytest.raises(KeyboardInterrupt):
        network_delta().apply(model)
    assert halfway != [before]
    assert state(model) == before


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_base_is_left_bit_for_bit(dtype: torch.dtype, used: bool, kernels):
    delta = network_delta(dtype)
    if used:  # then it knows the base's values, not only their fingerprint
        delta.apply(network(dtype))
    for name, part in delta.sparse.items():
        for at in part.indices.tolist():
            model = network(dtype)
            bits_of(model.get_parameter(name))[at] ^= 1
            versions = [p._version for p in model.parameters()]
            before = state(model)
            with pytest.raises(UnmaskError, match=r"wrong base.*another model or revision"):
                delta.apply(model)
            assert state(model) == before
            assert [p._version for p in model.parameters()] == versions


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_undo_is_refused_where_a_weight_was_moved(dtype: torch.dtype, kernels):
    model, base = network(dtype), state(network(dtype))
    delta = network_delta(dtype)
    undo = delta.apply(model)
    for name, part in delta.sparse.items():
        for at in part.indices.tolist():
            bits_of(model.get_parameter(name))[at] ^= 1
            before = state(model)
            with pytest.raises(UnmaskError, match=f"wrong base.*{delta.after[:12]}"):
                undo.apply(model)
            assert state(model) == before
            bits_of(model.get_parameter(name))[at] ^= 1
    redo = undo.apply(model)
    assert state(model) == base
    with pytest.raises(UnmaskError, match="already applied"):
        undo.apply(model)
    assert redo == delta
    assert redo.apply(model) == undo


def test_an_undo_asks_the_model_and_not_the_delta(kernels):
    model, delta = network(), network_delta()
    base = state(model)
    undo = delta.apply(model)
    for part in delta.sparse.values():
        part.values.zero_()  # someone's own business
    undo.apply(model)
    assert state(model) == base


def test_a_second_time_is_as_the_first(kernels):
    model, delta = network(), network_delta()
    base = state(model)
    first = delta.apply(model)
    changed = state(model)
    first.apply(model)
    for part in first.sparse.values():
        part.values.zero_()  # someone's own business, again
    for _ in range(2):
        for used in (delta, copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
            undo = used.apply(model)
            assert state(model) == changed
            undo.apply(model)
            assert state(model) == base
        other = network()
        undo = delta.apply(other)
        assert (state(other), undo) == (changed, delta.apply(model))
        undo.apply(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda undo: pickle.loads(pickle.dumps(undo))])
def test_an_undo_can_be_copied(copied, kernels):
    model, delta = network(), network_delta()
    undo = copied(delta.apply(model))
    assert undo.apply(model) == delta
    assert state(model) == state(network())


def test_frozen_parameters_and_whole_integers_come_and_go(kernels):
    model = network().requires_grad_(False)
    model["head"].register_buffer("scale", torch.tensor([1, -2, 127], dtype=torch.int8))
    before = state(model)
    scale = torch.tensor([-128, 0, 5], dtype=torch.int8)
    delta = changed(model, {"body.2.weight": [0, 3]}, buffers={"head.scale": scale})
    undo = delta.apply(model)
    assert torch.equal(model["head"].scale, scale)
    assert undo.apply(model) == delta
    assert state(model) == before
    assert not any(p.requires_grad for p in model.parameters())


def test_a_model_that_renames_its_parameters_is_asked_for_them():
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def named_parameters(self, *args, **rest):
            return self.inner.named_parameters(*args, **rest)

        def named_buffers(self, *args, **rest):
            return self.inner.named_buffers(*args, **rest)

    model = Renamed()
    network_delta().apply(model).apply(model)
    assert state(model.inner) == state(network())


def test_a_name_with_dots_is_taken_whole():
    model = Holder({name: torch.zeros(2) for name in ("", ".", "a", ".a", "a.", "a..b", "b.c")})
    for name in list(model._parameters):
        changed(model, {name: [1]}).apply(model)
        assert [n for n, p in model._parameters.items() if p.any()] == [name]
        with torch.no_grad():
            model._parameters[name].zero_()


def test_writing_is_noticed_by_autograd():
    model = Holder({"w": torch.ones(3)})
    weight = model.get_parameter("w")
    loss = (weight * weight).sum()
    changed(model, {"w": [1]}).apply(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Delta({}, base="abc"),
        lambda: Delta({}, base=3),
        lambda: Delta({}, base="0" * 64, info={"x": float("nan")}),
        lambda: Delta({}, base="0" * 64, info={"x": {1}}),
        lambda: Delta({}, {"\ud800": torch.ones(1)}, base="0" * 64),
        lambda: Delta({}, {"w": torch.ones(1)}, {"w": torch.ones(1)}, base="0" * 64),
        lambda: Delta({}, {"w": torch.ones(1, dtype=torch.complex128)}, base="0" * 64),
        lambda: Sparse((2,), torch.tensor([0]), torch.tensor([1])),
        lambda: Sparse((2,), torch.tensor([0], dtype=torch.int32), torch.ones(1)),
        lambda: Sparse((2,), torch.tensor([1, 0]), torch.ones(2)),
    ],
)
def test_what_cannot_be_a_delta_is_refused(make):
    with pytest.raises(UnmaskError):
        make()


def test_an_undo_shares_nothing_that_can_be_changed():
    model = nn.Linear(2, 2)
    at = torch.tensor([0, 3])
    base = {"weight": Sparse((2, 2), at, model.weight.detach().view(-1)[at])}
    new = {"weight": Sparse((2, 2), base["weight"].indices, torch.ones(2))}
    delta = Delta(new, base=fingerprint(base), info={"inner": {"a": 1}})
    undo = delta.apply(model)
    undo.info["inner"]["a"] = 2
    again = undo.apply(model)
    again.sparse.clear()
    assert delta.info == {"inner": {"a": 1}}
    assert list(delta.sparse) == list(undo.sparse) == ["weight"]


# As few vectors


def test_parts_of_one_vector_are_joined_without_a_copy():
    whole = torch.arange(9.0)
    at = torch.arange(9)
    cases = {
        "in order": ([(0, 3), (3, 5), (5, 9)], True),
        "from the middle": ([(2, 3), (3, 7)], True),
        "another order": ([(3, 5), (0, 3)], False),
        "a gap": ([(0, 3), (4, 6)], False),
    }
    for case, (cuts, shared) in cases.items():
        parts = {
            f"{k}": Sparse((9,), at[: b - a].clone(), whole[a:b]) for k, (a, b) in enumerate(cuts)
        }
        places, (values,) = Places.of(parts)
        assert values.tolist() == [x for a, b in cuts for x in whole[a:b].tolist()], case
        assert (values.untyped_storage().data_ptr() == whole.data_ptr()) == shared, case
        for name, part in places.sparse((values,)).items():
            assert torch.equal(part.values, parts[name].values)
            assert torch.equal(part.indices, parts[name].indices)


def test_places_of_several_dtypes_keep_the_order_of_names():
    at = torch.tensor([0])
    named = {
        name: Sparse((2,), at, torch.tensor([k], dtype=dtype))
        for k, (name, dtype) in enumerate(zip("abcd", [*DTYPES[:2]] * 2, strict=True))
    }
    places, values = Places.of(named)
    assert len(values) == 2
    found = places.sparse(values)
    assert list(found) == list("abcd")
    assert [part.values.item() for part in found.values()] == [0, 1, 2, 3]
    assert places.fingerprint(values) == fingerprint(dict(reversed(named.items())))


def test_nothing_at_all_has_places():
    places, values = Places.of({})
    assert (values, places.sparse(values), places.names) == ((), {}, [])
    empty = {"a": Sparse((2,), torch.tensor([], dtype=torch.int64), torch.tensor([]))}
    assert fingerprint(empty) != fingerprint({})


def test_an_undo_has_its_scalars_by_name():
    model, delta = network(), network_delta()
    undo = delta.apply(model)
    assert "sparse" not in vars(undo)
    held = {name: p.detach().clone() for name, p in network().named_parameters()}
    for name, part in undo.sparse.items():
        assert torch.equal(part.values, held[name].view(-1)[part.indices])
    assert fingerprint(undo.sparse) == undo.after == delta.base
    with pytest.raises(AttributeError, match="no attribute 'sprase'"):
        undo.sprase  # noqa: B018
