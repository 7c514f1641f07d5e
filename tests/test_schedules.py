"""Every schedule adds up to the budget exactly, for any budget and any number of steps."""

import copy
import inspect
import math
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import unmask
from models import MLP
from test_methods import Run
from unmask import UnmaskError, schedules

CLASSES = [
    kind
    for name in schedules.__all__
    if inspect.isclass(kind := getattr(schedules, name)) and not inspect.isabstract(kind)
]


def named(schedule: unmask.Schedule) -> str:
    """As str(), but the same in every process."""
    return re.sub(r" at 0x\w+", "", str(schedule))


def squared(share: float) -> float:
    return share**2


def humped(share: float) -> float:
    return math.sin(math.pi * share)


SCHEDULES = [
    *(kind() for kind in CLASSES),
    unmask.Strided(every=1),
    unmask.Strided(every=7),
    unmask.FrontLoaded(by=0.1),
    unmask.FrontLoaded(by=1.0),
    unmask.Exponential(rate=-4.0),
    unmask.Exponential(rate=1e-9),
    unmask.Custom(squared),
    unmask.Plateau(parts=3, patience=2, reached=2),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@given(budget=st.integers(1, 10**9), steps=st.integers(1, 5000), data=st.data())
@example(budget=1, steps=1, data=None)
def test_adds_up_exactly(
    schedule: unmask.Schedule, budget: int, steps: int, data: st.DataObject | None
) -> None:
    assert schedule.target(steps, steps, budget) == budget
    assert schedule.target(steps + 3, steps, budget) == budget
    if data is not None:
        t = data.draw(st.integers(1, steps))
        before = schedule.target(t - 1, steps, budget) if t > 1 else 0
        now = schedule.target(t, steps, budget)
        assert type(now) is int
        assert 0 <= before <= now <= budget


@pytest.mark.parametrize("schedule", [*SCHEDULES, unmask.Custom(humped)], ids=named)
def test_quotas_add_up_through_increment(schedule: unmask.Schedule) -> None:
    for budget, steps in ((40, 14), (3, 50), (1000, 7)):
        active = 0
        for t in range(1, steps + 1):
            drop, grow = unmask.Increment(schedule).quota(t, active, budget, steps)
            assert drop == 0 <= grow
            active += grow
        assert active == budget


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_in_a_run(schedule: unmask.Schedule) -> None:
    run = Run(unmask.id3(budget=40, schedule=schedule)).train()
    assert run.tuner.active == 40


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_as_json(schedule: unmask.Schedule) -> None:
    method = unmask.id3(budget=9, schedule=schedule)
    assert unmask.Method.from_dict(method.to_dict()) == method


def test_special_cases() -> None:
    b, steps = 977, 60
    for t in range(1, steps + 1):
        uniform = unmask.Uniform().target(t, steps, b)
        assert unmask.Strided(every=1).target(t, steps, b) == uniform
        assert unmask.FrontLoaded(by=1.0).target(t, steps, b) == uniform
        assert unmask.Custom().target(t, steps, b) == uniform
        assert unmask.Exponential(rate=1e-9).target(t, steps, b) == uniform
        squares = unmask.Custom(lambda x: 1 - (1 - x) ** 2).target(t, steps, b)
        assert unmask.Linear().target(t, steps, b) == squares
        assert unmask.FrontLoaded(by=1 / steps).target(t, steps, b) == b
        assert unmask.Plateau(parts=1).target(t, steps, b) == b
    for t in range(1, steps + 1):  # u_t = B·(2·(T - t) + 1) / T², but for rounding
        quota = unmask.Linear().target(t, steps, b) - unmask.Linear().target(t - 1, steps, b)
        assert abs(quota - b * (2 * (steps - t) + 1) / steps**2) < 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: unmask.Strided(every=0),
        lambda: unmask.Strided(every=2.5),
        lambda: unmask.FrontLoaded(by=0.0),
        lambda: unmask.FrontLoaded(by=1.5),
        lambda: unmask.Exponential(rate=0.0),
        lambda: unmask.Plateau(parts=0),
        lambda: unmask.Plateau(patience=0),
        lambda: unmask.Plateau(tolerance=-1.0),
    ],
)
def test_refused(make: object) -> None:
    with pytest.raises(UnmaskError, match="was asked for"):
        make()  # type: ignore[operator]


def test_a_function_without_a_name_is_refused_as_json() -> None:
    method = unmask.id3(budget=9, schedule=unmask.Custom(lambda share: share))
    with pytest.raises(UnmaskError, match="at the top of a module"):
        method.to_dict()


def test_reading_a_function_runs_nothing_and_imports_nothing() -> None:
    described = unmask.id3(budget=9, schedule=unmask.Custom(squared)).to_dict()
    for name in ("no.such.module:f", "os:system", "math:sin", "unmask:id4"):
        other = copy.deepcopy(described)
        other["strategy"]["schedule"]["curve"] = {"function": name}
        with pytest.raises(UnmaskError, match="no function"):
            unmask.Method.from_dict(other)


# Plateau


def heard(schedule: unmask.Plateau, losses: list[float]) -> unmask.Schedule:
    state: tuple[float, ...] = ()
    for loss in losses:
        state = schedule.hear(state, loss)
        assert all(type(x) is float for x in state)
    return schedule.hearing(state)


def test_a_falling_loss_goes_by_the_clock_and_a_flat_one_ahead() -> None:
    schedule = unmask.Plateau(parts=5, patience=4)
    falling = heard(schedule, [1 / (1 + t) for t in range(60)])
    flat = heard(schedule, [1.0] * 11)
    assert [falling.target(t, 100, 100) for t in (1, 39, 40, 60, 100)] == [20, 20, 40, 60, 100]
    assert flat.target(12, 100, 100) == 60  # 1 + two waits of four after a best each


def test_plateau_in_a_run_and_through_a_checkpoint() -> None:
    method = unmask.id3(budget=40, schedule=unmask.Plateau(parts=8, patience=2))
    losses = [1.0, 0.9, 0.9, 0.9, 0.8, 0.9, 0.85, 0.85, 0.8, 0.8]

    def go(run: Run, first: int, last: int) -> list[int]:
        counts = []
        for t in range(first, last + 1):
            MLP.loss(run.model, t).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.tuner.report(torch.tensor(losses[t - 1]))
            counts.append(run.tuner.active)
        return counts

    whole = go(Run(method, steps=100), 1, 10)
    assert whole == [5, 5, 5, 5, 10, 10, 10, 15, 15, 15]
    first = Run(method, steps=100)
    counts = go(first, 1, 4)
    counts += go(Run(method, steps=100).load(first.save()), 5, 10)
    assert counts == whole


def test_reports_are_for_nothing_elsewhere() -> None:
    run = Run(unmask.id3(budget=40)).train()
    assert run.tuner.state_dict()["heard"] == []


def test_the_last_digit_of_a_float_costs_no_scalar() -> None:
    assert unmask.Custom(lambda _: 0.29).target(1, 4, 100) == 29  # 28.999999999999996
    assert unmask.Custom(lambda _: 0.29).target(1, 4, 10**8) == 29 * 10**6
    assert unmask.FrontLoaded(by=0.07).target(7, 100, 1000) == 1000  # 7.000000000000001 steps
    assert unmask.FrontLoaded(by=0.07).target(6, 100, 1000) == 6000 // 7


@pytest.mark.parametrize("share", [math.nan, math.inf])
def test_a_curve_that_gives_no_number_is_refused(share: float) -> None:
    with pytest.raises(UnmaskError, match=r"curve\(0\.25\) is (nan|inf)"):
        unmask.Custom(lambda _: share).target(1, 4, 100)


def test_a_first_loss_that_is_no_number_is_no_best() -> None:
    schedule = unmask.Plateau(parts=5, patience=3)
    assert heard(schedule, [math.nan, 5.0, 4.0, 3.0, 2.0, 1.0]).target(7, 100, 100) == 20


def test_losses_that_are_no_numbers_say_nothing() -> None:
    schedule = unmask.Plateau(parts=5, patience=4)
    assert heard(schedule, [math.nan] * 100) == schedule
    losses = [1.0, 0.9, 0.95, 0.91, 0.92]
    assert heard(schedule, [x for loss in losses for x in (loss, math.nan)]) == heard(
        schedule, losses
    )
