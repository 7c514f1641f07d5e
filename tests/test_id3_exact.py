"""Algorithm 1 to the letter: the library against the dense reference, step by step, bit by bit.

No tolerance anywhere in this file. Selection, gather and element-wise update are the same
arithmetic on the same numbers, whether they stand in one dense tensor or in a short vector.
"""

import copy
import os
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unmask
from lockstep import Pair, assert_same_state, chosen, random_grads, scalars, snapshot
from models import ALL, ALTERNATING, BAG, BF16, LORA, MLP, TRANSFORMER, Case
from reference import DenseReference, d3, smallest_magnitude

EXAMPLES = int(os.environ.get("UNMASK_EXAMPLES", "40"))
ADAMW: Mapping[str, Any] = {"optimizer": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1}


def needs(case: Case) -> None:
    if case is LORA:
        pytest.importorskip("peft")


# Whole trainings, gradients from backward


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
def test_training_step_by_step(case: Case, strategy: str) -> None:
    needs(case)
    pair = Pair(case.build(), budget=37, steps=5, strategy=strategy, **ADAMW)
    pair.train(case, 7)  # two steps beyond the schedule


@pytest.mark.parametrize("case", [TRANSFORMER, BF16, LORA], ids=str)
@pytest.mark.parametrize(("exp", "eps"), [(0, 1), (1, 0.5), (-1, 1), (0.5, 1e-3), (-2, 3), (3, 1)])
def test_any_exponent(case: Case, exp: float, eps: float) -> None:
    needs(case)
    Pair(case.build(), budget=41, steps=4, exp=exp, eps=eps, **ADAMW).train(case, 4)


@pytest.mark.parametrize("exp", [1.3, -0.7, 2.5])
def test_fractional_exponent(exp: float) -> None:
    Pair(MLP.build(), budget=29, steps=4, exp=exp, eps=0.1, **ADAMW).train(MLP, 4)


@pytest.mark.parametrize("budget", [1, 3, 10, 11, 200])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_budget_and_steps_that_do_not_divide(budget: int, steps: int) -> None:
    pair = Pair(MLP.build(), budget=budget, steps=steps, lr=0.1, momentum=0.9)
    pair.train(MLP, steps + 1)
    assert pair.tuner.active == budget


def test_budget_smaller_than_steps() -> None:
    pair = Pair(MLP.build(), budget=3, steps=10, lr=0.1)
    counts = []
    for step in range(1, 11):
        pair.train(MLP, 1, first=step)
        counts.append(pair.tuner.active)
    assert counts == [3 * t // 10 for t in range(1, 11)]


@pytest.mark.parametrize("case", [TRANSFORMER, BAG, LORA], ids=str)
def test_budget_is_everything(case: Case) -> None:
    needs(case)
    model = case.build()
    Pair(model, budget=scalars(model), steps=3, **ADAMW).train(case, 4)


@pytest.mark.parametrize(
    "kw", [{"exclude": ("*bias",)}, {"include": "*mlp*"}, {"include": ("*mlp*", "*.weight")}]
)
def test_include_and_exclude(kw: Mapping[str, Any]) -> None:
    Pair(TRANSFORMER.build(), budget=20, steps=3, **kw, **ADAMW).train(TRANSFORMER, 4)


def test_tied_weights_are_one_tensor_under_their_first_name() -> None:
    pair = Pair(TRANSFORMER.build(), budget=scalars(TRANSFORMER.build()), steps=2, lr=0.1)
    pair.train(TRANSFORMER, 2)
    names = chosen(pair.tuner)
    assert "embedding.weight" in names
    assert "output.weight" not in names


def test_tied_weights_match_by_any_of_their_names() -> None:
    model = TRANSFORMER.build()
    tuner = unmask.attach(model, unmask.id3(budget=1.0), steps=1, include="output.*")
    assert tuner.budget == model.embedding.weight.numel()


def test_frozen_parameters_stay_frozen() -> None:
    model = MLP.build()
    model.first.weight.requires_grad_(False)
    pair = Pair(model, budget=scalars(model), steps=1, **ADAMW)
    pair.train(MLP, 3)
    assert not model.first.weight.requires_grad


def test_gradients_accumulate_over_micro_batches() -> None:
    pair = Pair(TRANSFORMER.build(), budget=50, steps=4, **ADAMW)
    for step in range(4):
        pair.backward(TRANSFORMER, 2 * step)
        pair.backward(TRANSFORMER, 2 * step + 1)
        pair.step()
        pair.assert_equal()


# Gradients by hand


def assigned(model: nn.Module, grads: list[dict[str, Tensor | None]], **kw: Any) -> Pair:
    """Feed the same list of gradients to both sides."""
    pair = Pair(model, **kw)
    for grad in grads:
        pair.set_grads(grad)
        pair.step()
        pair.assert_equal()
    return pair


@pytest.mark.parametrize("case", [TRANSFORMER, BF16, BAG], ids=str)
def test_assigned_gradients(case: Case) -> None:
    model = case.build()
    source = random_grads(model, 0)
    assigned(model, [next(source) for _ in range(6)], budget=60, steps=6, **ADAMW)


def test_parameter_without_gradient_scores_zero() -> None:
    model = MLP.build()
    full = next(random_grads(model, 0))
    some = {name: None if name.startswith("second") else grad for name, grad in full.items()}
    reach = sum(grad.numel() for grad in some.values() if grad is not None)
    pair = assigned(model, [some, full], budget=2 * reach - 2, steps=2, lr=0.1, momentum=0.9)
    assert pair.tuner.active == 2 * reach - 2


def test_missing_gradient_leaves_momentum_running() -> None:
    """Slots whose parameter has no gradient this step get zero; momentum and decay go on."""
    Pair(ALTERNATING.build(), budget=20, steps=2, lr=0.1, momentum=0.9, weight_decay=0.1).train(
        ALTERNATING, 6
    )


def test_step_without_any_gradient_does_nothing() -> None:
    pair = Pair(MLP.build(), budget=20, steps=4, **ADAMW)
    pair.step()
    assert pair.tuner.active == 0
    pair.assert_equal()
    pair.train(MLP, 5)


def test_zero_gradients_everywhere_select_in_order() -> None:
    model = MLP.build()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    pair = assigned(model, [zeros, zeros], budget=80, steps=2, lr=0.1)
    assert chosen(pair.tuner) == {"first.weight": list(range(72)), "first.bias": list(range(8))}


def test_two_steps_on_the_same_gradient() -> None:
    pair = Pair(MLP.build(), budget=40, steps=4, lr=0.1, momentum=0.9)
    for step in range(2):
        pair.backward(MLP, step)
        for _ in range(2):
            pair.optimizer.step()
            pair.reference.step()
            pair.assert_equal()
        pair.optimizer.zero_grad()
        pair.reference.zero_grad()


@pytest.mark.parametrize("where", ["before backward", "model.zero_grad", "set_to_none=False"])
def test_ways_to_forget_gradients(where: str) -> None:
    pair = Pair(MLP.build(), budget=40, steps=4, **ADAMW)
    for step in range(5):
        if where == "before backward":
            pair.optimizer.zero_grad()
        pair.reference.zero_grad()
        pair.backward(MLP, step)
        pair.optimizer.step()
        pair.reference.step()
        if where == "model.zero_grad":
            pair.model.zero_grad()
        elif where != "before backward":
            pair.optimizer.zero_grad(set_to_none=False)
        pair.assert_equal()


def test_zero_grad_forgets_the_models_own_gradients() -> None:
    pair = Pair(MLP.build(), budget=40, steps=4, lr=0.1)
    pair.backward(MLP, 0)
    pair.optimizer.zero_grad()
    assert all(p.grad is None or not p.grad.any() for p in pair.model.parameters())


def test_gradient_looked_at_and_then_dropped_leaves_no_trace() -> None:
    """Reading the optimiser's gradient selects; without a step the selection must not stay."""
    pair = Pair(MLP.build(), budget=40, steps=4, **ADAMW)
    for step in range(4):
        case_loss = MLP.loss(pair.model, 50 + step)
        case_loss.backward()
        for group in pair.optimizer.param_groups:
            for parameter in group["params"]:
                assert parameter.grad is not None
        pair.optimizer.zero_grad()
        pair.assert_equal()
        pair.train(MLP, 1, first=step)


def test_a_backward_after_a_look_still_counts() -> None:
    """backward, read the gradient, backward again: the step sees the sum."""
    pair = Pair(MLP.build(), budget=40, steps=2, lr=0.1)
    pair.backward(MLP, 0)
    assert pair.optimizer.param_groups[0]["params"][0].grad is not None
    pair.backward(MLP, 1)
    pair.step()
    pair.assert_equal()


def test_a_step_that_fails_leaves_no_trace() -> None:
    """An error inside the step, here in the closure, must not leave the tuner half way."""
    pair = Pair(MLP.build(), budget=40, steps=4, **ADAMW)

    def broken() -> Tensor:
        raise RuntimeError("no batch")

    for step in range(4):
        with pytest.raises(RuntimeError, match="no batch"):
            pair.optimizer.step(broken)
        MLP.loss(pair.model, 50).backward()
        assert pair.optimizer.param_groups[0]["params"][0].grad is not None  # a look, then dropped
        pair.optimizer.zero_grad()
        pair.assert_equal()
        pair.train(MLP, 1, first=step)


def test_a_copy_of_an_attached_model_is_a_plain_model() -> None:
    pair = Pair(MLP.build(), budget=40, steps=4, **ADAMW)
    pair.train(MLP, 2)
    other = copy.deepcopy(pair.model)
    kept = snapshot(other)
    unmask.attach(other, unmask.id3(budget=3), steps=1)
    pair.train(MLP, 2, first=3)
    assert_same_state(snapshot(other), kept)


def test_closure() -> None:
    pair = Pair(MLP.build(), budget=40, steps=4, **ADAMW)
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            pair.optimizer.zero_grad()
            loss = MLP.loss(pair.model, step)
            loss.backward()
            return loss

        loss = pair.optimizer.step(closure)
        MLP.loss(pair.reference.model, step).backward()
        pair.reference.step()
        pair.reference.zero_grad()
        assert isinstance(loss, Tensor)
        pair.assert_equal()


def test_strided_and_expanded_tensors() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned = nn.Parameter(torch.randn(5, 7).t())
            self.plain = nn.Parameter(torch.randn(7, 5))

    grads = next(random_grads(Odd(), 1))
    turned = {name: grad.t().contiguous().t() for name, grad in grads.items()}
    spread = {name: torch.ones(1, 1).expand(7, 5) for name in grads}
    pair = Pair(Odd(), budget=30, steps=3, lr=0.1, momentum=0.9)
    for given_grads in (grads, turned, spread):
        for model in (pair.model, pair.reference.model):
            for name, parameter in model.named_parameters():
                parameter.grad = given_grads[name]
        pair.step()
        pair.assert_equal()


def test_sparse_gradients_are_dense_ones_in_short() -> None:
    """Embedding(sparse=True): the same training, or a refusal, never something else."""

    def build(sparse: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 2))

    batch = torch.tensor([[1, 2], [2, 5]])
    ended = []
    for sparse in (False, True):
        model = build(sparse)
        tuner = unmask.attach(model, unmask.id3(budget=12), steps=3)
        optimizer = tuner.optimizer(torch.optim.SGD, lr=0.5)
        try:
            for _ in range(3):
                model(batch).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        except unmask.UnmaskError:
            assert sparse
            return
        ended.append(snapshot(model))
    assert_same_state(*ended)


# Other methods are the same machine with another score


def test_pafi_takes_the_smallest_weights() -> None:
    model = TRANSFORMER.build()
    reference = DenseReference(
        model, budget=40, steps=1, strategy="static", score=smallest_magnitude, lr=0.1, momentum=0.9
    )
    tuner = unmask.attach(model, unmask.pafi(budget=40))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    for step in range(3):
        for trained, stepper in ((model, optimizer), (reference.model, reference)):
            TRANSFORMER.loss(trained, step).backward()
            stepper.step()
            stepper.zero_grad()
        assert_same_state(snapshot(model), snapshot(reference.model))
    assert chosen(tuner) == {name: i.tolist() for name, i in reference.selected().items()}


def test_composition_equals_the_named_method() -> None:
    method = unmask.Method(
        heuristic=unmask.D3(exp=2.0, eps=1.0),
        strategy=unmask.Increment(schedule=unmask.Uniform()),
        budget=40,
    )
    assert method == unmask.id3(budget=40)
    assert unmask.Method.from_dict(method.to_dict()) == method


def test_strided_schedule_against_the_reference() -> None:
    budget, steps = 45, 12
    schedule = unmask.Strided(every=5)
    targets = [0, *(schedule.target(t, steps, budget) for t in range(1, steps + 1))]
    quotas = [after - before for before, after in pairwise(targets)]
    model = MLP.build()
    reference = DenseReference(model, budget=budget, steps=steps, schedule=quotas, lr=0.1)
    tuner = unmask.attach(model, unmask.id3(budget=budget, schedule=schedule), steps=steps)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(steps):
        for trained, stepper in ((model, optimizer), (reference.model, reference)):
            MLP.loss(trained, step).backward()
            stepper.step()
            stepper.zero_grad()
        assert chosen(tuner) == {name: i.tolist() for name, i in reference.selected().items()}
    assert_same_state(snapshot(model), snapshot(reference.model))
    assert tuner.active == budget


# Any small problem: many ties, zeros, empty tensors, odd shapes

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=4)


class Loose(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors):
            self.register_parameter(f"p{number}", nn.Parameter(tensor))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Loose, list[dict[str, Tensor | None]], dict[str, Any]]:
    shapes = draw(SHAPES.filter(lambda all_: any(0 not in shape for shape in all_)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))

    def integers(shape: tuple[int, ...], reach: int) -> Tensor:
        return torch.randint(-reach, reach + 1, shape, generator=generator).to(dtype)

    model = Loose([integers(shape, 2) for shape in shapes])
    steps = draw(st.integers(1, 6))
    reach = draw(st.sampled_from([0, 1, 3]))
    grads: list[dict[str, Tensor | None]] = []
    for _ in range(steps + 1):
        missing = draw(st.sets(st.integers(1, len(shapes)), max_size=len(shapes) - 1))
        grads.append(
            {
                f"p{i}": None if i in missing else integers(shape, reach)
                for i, shape in enumerate(shapes)
            }
        )
    options = {
        "budget": draw(st.integers(1, scalars(model))),
        "steps": steps,
        "strategy": draw(st.sampled_from(["increment", "static", "repeat"])),
        "exp": draw(st.sampled_from([0.0, 1.0, 2.0, -1.0, 0.5, 3.0])),
        "eps": draw(st.sampled_from([1.0, 0.5, 1e-3])),
    }
    return model, grads, options


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES <= 40)
@given(problems())
def test_any_small_problem(
    problem: tuple[Loose, list[dict[str, Tensor | None]], dict[str, Any]],
) -> None:
    model, grads, options = problem
    assigned(model, grads, lr=0.25, momentum=0.5, weight_decay=0.5, **options)


# Tensors large enough for blocks, thresholds and threads to matter

LARGE = (700, 301)


def large(kind: str, seed: int) -> Loose:
    torch.manual_seed(seed)
    shapes = [LARGE, (5,), (100_003,), (300, 400), (7,), (90_001,)]
    weights = [torch.randn(shape) for shape in shapes]
    if kind == "tied":
        weights = [weight.round() for weight in weights]
    return Loose(weights)


def large_grads(kind: str, model: nn.Module, steps: int) -> list[dict[str, Tensor]]:
    source = random_grads(model, 3)
    out = []
    for step in range(steps):
        grads = next(source)
        if kind == "tied":
            grads = {name: grad.round() for name, grad in grads.items()}
        elif kind == "rising":  # the best come last: a streaming threshold helps least
            grads = {n: g.flatten().abs().sort().values.view_as(g) for n, g in grads.items()}
        elif kind == "falling":
            grads = {
                n: -g.flatten().abs().sort().values.flip(0).view_as(g) for n, g in grads.items()
            }
        elif kind == "scales":  # last step's threshold is far too high, then far too low
            grads = {name: grad * 10.0 ** (-6 * (step % 2)) for name, grad in grads.items()}
        elif kind == "equal":
            grads = {name: torch.ones_like(grad) for name, grad in grads.items()}
        elif kind == "few":  # fewer non-zero scores than scalars to unmask
            grads = {name: grad * (grad > 3.5) for name, grad in grads.items()}
        out.append(grads)
    return out


KINDS = ["random", "tied", "rising", "falling", "scales", "equal", "few"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [5_003, 150_000])
def test_large_tensors(kind: str, budget: int) -> None:
    model = large(kind, 0)
    assigned(model, large_grads(kind, model, 3), budget=budget, steps=3, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("budget", [40_001, 150_001])
@pytest.mark.parametrize("threads", [1, 2])
def test_ties_across_tensors_of_every_kind(value: float, budget: int, threads: int) -> None:
    """Whatever order tensors are looked at in, and by however many: equal scores go by index."""
    kinds = [
        (70_003, torch.float32),
        (30_001, torch.float16),
        (90_007, torch.float32),
        (20_005, torch.bfloat16),
        (30_009, torch.float32),
    ]
    model = Loose([torch.ones(size, dtype=dtype) for size, dtype in kinds])
    grads = {name: torch.full_like(p, value) for name, p in model.named_parameters()}
    some = {**grads, "p1": None, "p4": None}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assigned(model, [some, grads], budget=budget, steps=2, lr=0.5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["equal", "random"])
def test_tensors_of_millions(kind: str) -> None:
    """Longer than what is looked at in one go."""
    torch.manual_seed(0)
    model = Loose([torch.randn(1_300_000), torch.randn(11), torch.randn(1_200_000)])
    assigned(model, large_grads(kind, model, 2), budget=200_001, steps=2, lr=0.1)


@pytest.mark.parametrize("exp", [-1.0, 0.0])
def test_large_tensors_where_large_weights_win(exp: float) -> None:
    model = large("tied", 0)
    assigned(model, large_grads("tied", model, 3), budget=9_001, steps=3, exp=exp, eps=0.5, lr=0.1)


@pytest.mark.parametrize("kind", ["random", "tied", "few"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_large_tensors_of_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    model = large(kind, 0).to(dtype)
    grads = [{n: g.to(dtype) for n, g in step.items()} for step in large_grads(kind, model, 2)]
    assigned(model, grads, budget=20_001, steps=2, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("kind", ["random", "tied"])
@pytest.mark.parametrize("exp", [2.0, 1.3])
def test_threads_do_not_matter(kind: str, exp: float) -> None:
    threads = torch.get_num_threads()
    ended = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            model = large(kind, 0)
            tuner = unmask.attach(model, unmask.id3(budget=30_011, exp=exp, eps=0.1), steps=3)
            optimizer = tuner.optimizer(torch.optim.Adam, lr=0.1)
            for grads in large_grads(kind, model, 3):
                for name, parameter in model.named_parameters():
                    parameter.grad = grads[name]
                optimizer.step()
                optimizer.zero_grad()
            ended.append((chosen(tuner), snapshot(model)))
    finally:
        torch.set_num_threads(threads)
    assert ended[0][0] == ended[1][0]
    assert_same_state(ended[0][1], ended[1][1])


@pytest.mark.parametrize("exp", [2.0, 1.3, -0.7])
def test_equal_inputs_tie_wherever_they_stand(exp: float) -> None:
    """Same weight, same gradient: the smaller index first, in any lane of any block."""
    torch.manual_seed(0)
    model = Loose([torch.randn(7)[torch.randint(0, 7, (50_021,))]])
    weight = model.p0.detach().clone()
    tuner = unmask.attach(model, unmask.id3(budget=20_000, exp=exp, eps=0.3), steps=1)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    model.p0.grad = torch.ones_like(weight)
    optimizer.step()
    picked = torch.zeros(len(weight), dtype=torch.bool)
    picked[tuner.selected()["p0"]] = True
    for value in weight.unique():
        of_value = picked[weight == value]
        count = int(of_value.sum())
        assert of_value[:count].all()


# What float32 makes of extremes


@pytest.mark.parametrize(("exp", "eps"), [(2.0, 1e-30), (20.0, 1e-3), (-200.0, 1.0), (100.0, 5.0)])
def test_scores_that_overflow_underflow_or_are_zero_over_zero(exp: float, eps: float) -> None:
    model = Loose([torch.tensor([0.0, 1.0, 0.0, -3.0, 0.0, 2.0, 10.0])])
    grad = torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0, -1.0, 1e-38])
    assert d3(exp, eps)("", model.p0.detach(), grad).isfinite().logical_not().any() or exp > 2
    assigned(model, [{"p0": grad}] * 7, budget=7, steps=7, exp=exp, eps=eps, lr=0.0)


def test_extreme_gradients() -> None:
    model = Loose([torch.zeros(6)])
    grad = torch.tensor([1e-45, 3e38, -3.4e38, 0.0, 1e-40, 1.0])
    assigned(model, [{"p0": grad}] * 6, budget=6, steps=6, lr=0.0)


def test_negative_zero_survives_where_masked() -> None:
    model = Loose([torch.full((8,), -0.0)])
    grad = torch.tensor([0.0, 1.0] * 4)
    assigned(model, [{"p0": grad}] * 2, budget=2, steps=2, weight_decay=0.1, lr=0.1)
