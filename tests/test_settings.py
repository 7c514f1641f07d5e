"""`--set`: every parameter of every method is within reach, and what isn't there is told."""

import inspect
from functools import reduce
from typing import Any

import pytest

import unmask
from unmask import UnmaskError, methods
from unmask.recipes import choose, config, parse, run

WORDS = {  # another one that is allowed, where a word is asked for
    "pruner": "magnitude", "decay": "cosine", "optimizer": "SGD", "sample_type": "model",
    "grad_type": "absolute", "of": "gradient", "by": "even", "pattern": "*weight",
    "schedule": "Cubic", "inner": "D3", "within": "Units",
}  # fmt: skip
BUDGETS = {"bitfit": 0.5, "full": 0.5}


def another(field: str, now: Any) -> Any:
    """A value of the same type that the field doesn't have yet."""
    if field in WORDS and not isinstance(now, int | float):
        return WORDS[field]
    if isinstance(now, tuple):
        return ("a.*", "b.*")
    if isinstance(now, bool):
        return not now
    return 3 if now is None else now + 1 if isinstance(now, int) else now / 2


def written(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def reached(method: unmask.Method, key: str) -> Any:
    path = ["strategy", *key.split(".")] if key.startswith("schedule") else key.split(".")
    found = reduce(getattr, path, method)
    return type(found).__name__ if isinstance(found, choose.PARTS) else found


@pytest.mark.parametrize("name", methods.__all__)
def test_every_parameter_of_every_method(name: str) -> None:
    build, budget = getattr(methods, name), BUDGETS.get(name, 100)
    for parameter, declared in inspect.signature(build).parameters.items():
        if parameter == "budget":
            continue
        new = another(parameter, declared.default)
        expected = unmask.Cubic() if parameter == "schedule" else new
        made = choose.method(name, budget, {f"method.{parameter}": written(new)})
        assert made == build(budget, **{parameter: expected})
        assert made != build(budget) or (name, parameter) == ("sparse_adapter", "seed")


@pytest.mark.parametrize("name", methods.__all__)
def test_every_field_of_every_part_of_a_method(name: str) -> None:
    budget = BUDGETS.get(name, 100)
    keys = {k: v for k, v in choose.reachable(name).items() if not k.startswith("method.")}
    assert {"heuristic", "strategy", "scope"} <= keys.keys()
    for key, now in keys.items():
        if "." in key:
            new = another(key.rpartition(".")[2], now)
            assert reached(choose.method(name, budget, {key: written(new)}), key) == new != now


PARTS = [
    (sort.__name__.lower(), kind)
    for sort in choose.PARTS
    for kind in choose._classes(sort).values()
]


@pytest.mark.parametrize(("part", "kind"), PARTS, ids=lambda part: getattr(part, "__name__", part))
def test_every_field_of_every_class(part: str, kind: type) -> None:
    assert reached(choose.method("id3", 100, {part: kind.__name__.lower()}), part) == kind.__name__
    for field in set(choose._hints(kind)) - {"curve"}:  # a function of one's own, in Python only
        key, new = f"{part}.{field}", another(field, getattr(kind(), field))
        assert (
            reached(choose.method("id3", 100, {key: written(new), part: kind.__name__}), key) == new
        )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"scope.floor": "5", "scope.cap": "0.5"}, unmask.Bounded(5, 0.5)),
        ({"scope.by": "sides"}, unmask.PerTensor("sides")),
        ({"scope.by": "even", "scope.depth": "2"}, unmask.PerLayer("even", depth=2)),
        ({"scope.rows": "none", "scope.columns": "1"}, unmask.Units(None, 1)),
        (
            {"scope.within.rows": "64", "scope": "PerLayer", "scope.patterns": "*.0.*, *.1.*"},
            unmask.PerLayer(patterns=("*.0.*", "*.1.*"), within=unmask.Units(64)),
        ),
    ],
)
def test_scopes_and_units(settings: dict[str, str], expected: unmask.Scope) -> None:
    assert choose.method("id3", 100, settings).scope == expected


def test_nested_heuristics_in_any_order() -> None:
    asked = {"heuristic.inner.exp": "0", "heuristic.inner": "D3", "heuristic": "Smoothed"}
    expected = unmask.Smoothed(unmask.D3(exp=0.0))
    for settings in (asked, dict(reversed(asked.items()))):
        assert choose.method("id3", 100, settings).heuristic == expected


def test_fields_that_belong_together_are_set_together() -> None:
    both = {"heuristic.window": "30", "heuristic.every": "40"}  # each alone is refused
    assert choose.method("sft_ag", 100, both).heuristic == unmask.Candidates(30, 40)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("pafi", {"heuristic.exp": "1"}, "D3 has one, chosen by --set heuristic=D3"),
        ("pafi", {"schedule.every": "2"}, "Static has no 'schedule'; there are none; Incr"),
        ("id3", {"schedule.every": "2", "schedule.by": "0.5"}, "Strided has one"),
        ("id3", {"schedule": "Linear", "schedule.every": "2"}, "Linear has no 'every'"),
        ("id3", {"schedule": "Linear", "strategy.schedule": "Cubic"}, "'Linear' as well; give one"),
        ("id3", {"scope": "PerRow"}, "there are Bounded, Global, PerLayer, PerTensor, Units"),
        ("id3", {"scope.by": "colour"}, "it is one of size, sides, even"),
        ("id3", {"heuristic.inner": "D3"}, "Accumulated, Calibrated, Smoothed have one"),
        ("id3", {"heuristic.exp.x": "1"}, "heuristic.exp is a value and has no fields"),
        ("id3", {"heuristic.": "1"}, "write <part>.<field>=<value>"),
        ("id3", {"method": "pafi"}, "write <part>.<field>=<value>"),
        ("id3", {"method.window": "1"}, "there are method.exp, method.eps, method.schedule"),
        ("id3", {"method.exp": "1", "heuristic.exp": "2"}, "both set exp; give one"),
        ("fish", {"method.num_samples": "many"}, "num_samples must be int"),
        ("head", {"heuristic.exp": "1"}, "--method head chooses nothing"),
    ],
)  # fmt: skip
def test_what_is_allowed_is_told(name: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(UnmaskError) as told:
        choose.method(name, 100, settings)
    assert message in str(told.value)
    assert str(told.value).startswith("--set") or message.startswith("it is")


def test_one_setting_has_one_value() -> None:
    assert parse.parse_settings(["a=1", "a=1", "b=2"]) == {"a": "1", "b": "2"}
    with pytest.raises(UnmaskError, match="--set a=2 and --set a=1; give one"):
        parse.parse_settings(["a=1", "a=2"])
    with pytest.raises(UnmaskError, match="--batch-size and --set per_device_train_batch_size are"):
        run.asked({"batch_size": 8, "settings": {"per_device_train_batch_size": "4"}}, resume=False)


def test_a_key_of_no_part_is_refused() -> None:
    with pytest.raises(UnmaskError, match=r"--set heurstic\.exp: no such key"):
        config.RunConfig(settings={"heurstic.exp": "1"}).training({})
