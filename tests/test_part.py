"""Every part of a method refuses a field of another kind, when it is made and not at a step."""

import math
from dataclasses import fields, is_dataclass

import numpy as np
import pytest

import unmask
from unmask import UnmaskError, heuristics, schedules, scopes, strategies, units
from unmask.part import Part

WRONG = {
    "float": ("2", None, True, [1.0], 1j),
    "int": ("2", None, True, 2.5, math.nan),
    "int | None": ("2", True, 2.5),
    "int | float": ("2", None, True),
    "bool": ("no", None, 1),
    "str": (None, 2, ["linear"]),
    "Callable[[float], float]": ("2", None, 2.5),
}
KINDS = [
    getattr(module, name)
    for module in (heuristics, schedules, scopes, strategies, units)
    for name in module.__all__
]
FIELDS = [
    (kind, field.name, value)
    for kind in KINDS
    if is_dataclass(kind) and issubclass(kind, Part)
    for field in fields(kind)
    for value in WRONG.get(str(field.type), ())
]


@pytest.mark.parametrize(("kind", "name", "value"), FIELDS)
def test_another_kind_is_refused(kind: type, name: str, value: object) -> None:
    with pytest.raises(UnmaskError, match=rf"was asked for {name}=.*; it is"):
        kind(**{name: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: unmask.random_mask(10, seed="2"),  # type: ignore[arg-type]
        lambda: unmask.random_mask(10, seed=1.5),  # type: ignore[arg-type]
        lambda: unmask.lift(10, rank=2.5),  # type: ignore[arg-type]
        lambda: unmask.fish(10, num_samples=2.5),  # type: ignore[arg-type]
        lambda: unmask.lt_sft(10, passes=1.5),  # type: ignore[arg-type]
        lambda: unmask.PerLayer(depth=-2),
    ],
)
def test_methods_refuse_it_too(make: object) -> None:
    with pytest.raises(UnmaskError, match="was asked for"):
        make()  # type: ignore[operator]


def test_a_description_is_checked_as_well() -> None:
    described = unmask.id3(10, schedule=unmask.Plateau()).to_dict()
    described["strategy"]["schedule"]["parts"] = 2.5
    with pytest.raises(UnmaskError, match=r"parts=2\.5; it is a whole number"):
        unmask.Method.from_dict(described)


def test_whole_numbers_are_numbers_and_numpy_s_count() -> None:
    assert unmask.D3(exp=2, eps=np.float32(1)) == unmask.D3()  # type: ignore[arg-type]
    assert unmask.Strided(np.int32(10)) == unmask.Strided()  # type: ignore[arg-type]
    assert unmask.Magnitude(np.bool_(True)) == unmask.Magnitude(True)  # type: ignore[arg-type]
