"""Statistics of batches: taken right, by the batch's conventions, and with no trace in the
model."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unmask
from lockstep import assert_same_state, same_tree, snapshot
from models import CONV, MIXED, MLP, TRANSFORMER, Case, seeded
from test_methods import batches
from unmask import UnmaskError

HEURISTICS = [
    unmask.Fisher(num_samples=5),
    unmask.Fisher(num_samples=5, sample_type="model", grad_type="absolute"),
    unmask.Calibrated(),
    unmask.Movement(lr=0.1),
    unmask.Movement("SGD", lr=0.1, passes=2),
    unmask.DiffPruning(lr=0.1),
]


def data(case: Case) -> list[tuple[Tensor, Tensor]]:
    made = []
    for step in range(3):
        x = case.inputs(step)
        classes = case.logits(case.build(), step).shape[:-1]
        made.append((x, torch.randint(0, 3, classes, generator=seeded(step))))
    return made


class Output(dict[str, Any]):
    """As transformers' outputs: attributes and keys."""

    __getattr__ = dict.__getitem__


class Hugging(nn.Module):
    """A classifier that is called with keywords and gives a loss with its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP.build()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, labels: Tensor | None = None, scale: float = 1.0) -> Output:
        logits = self.body(self.dropout(x)) * scale
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return Output(loss=loss, logits=logits)


class Language(nn.Module):
    """Scores for the next token at each position; position t is held to label t + 1."""

    loss_type = "ForCausalLM"

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.output = nn.Linear(6, 11)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.output(self.embedding(input_ids))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(loss=loss, logits=logits)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("heuristic", HEURISTICS, ids=str)
@pytest.mark.parametrize("case", [CONV, TRANSFORMER, MIXED], ids=str)
def test_without_a_trace(case: Case, heuristic: unmask.Heuristic, training: bool) -> None:
    model = case.build().train(training)
    model.add_module("dropout", nn.Dropout(0.3))
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    modes = [m.training for m in model.modules()]
    before, state = snapshot(model), torch.get_rng_state()
    parameters = dict(model.named_parameters())
    found = heuristic.calibrate(model, parameters, data(case))
    assert_same_state(snapshot(model), before)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert found.keys() == parameters.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert tensor.shape == parameters[name].shape
        assert torch.isfinite(tensor).all()
    assert same_tree(found, heuristic.calibrate(model, parameters, data(case)))


@pytest.mark.parametrize("heuristic", HEURISTICS, ids=str)
def test_frozen_parameters_are_measured_as_well(heuristic: unmask.Heuristic) -> None:
    """Whoever hosts a run may unfreeze the eligible parameters only when it trains them."""
    model, frozen = MLP.build(), MLP.build().requires_grad_(False)
    found = [heuristic.calibrate(m, dict(m.named_parameters()), batches()) for m in (model, frozen)]
    assert same_tree(*found)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("heuristic", HEURISTICS, ids=str)
def test_without_a_trace_when_it_fails(heuristic: unmask.Heuristic) -> None:
    model = CONV.build()
    before = snapshot(model)
    good = data(CONV)[0]
    with pytest.raises((UnmaskError, RuntimeError)):
        heuristic.calibrate(
            model, dict(model.named_parameters()), [good[:1], (torch.ones(2, 9), good[1])][1:]
        )
    assert_same_state(snapshot(model), before)
    assert all(m.training for m in model.modules())


def test_mappings_tuples_and_a_loss_of_ones_own_agree() -> None:
    model = Hugging().eval()
    parameters = dict(model.named_parameters())
    rows = batches()
    mappings = [{"x": x, "labels": y} for x, y in rows]
    own = unmask.Calibration(rows, lambda m, b: F.cross_entropy(m(b[0])["logits"], b[1]))
    for heuristic in (HEURISTICS[0], HEURISTICS[2], HEURISTICS[3]):
        torch.manual_seed(0)
        first = heuristic.calibrate(model, parameters, mappings)
        torch.manual_seed(0)
        second = heuristic.calibrate(model, parameters, own)
        for name in parameters:
            torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-6)


def test_scores_without_a_batch_axis_go_along() -> None:
    """What isn't as long as the batch belongs to every sample of it."""
    model = Hugging()
    parameters = dict(model.named_parameters())
    plain = [{"x": x, "labels": y} for x, y in batches()]
    extra = [batch | {"scale": 1.0} for batch in plain]
    heuristic = unmask.Fisher(num_samples=7)
    found = [heuristic.calibrate(model, parameters, b) for b in (plain, extra)]
    assert same_tree(*found)


def test_single_samples_are_squared_not_batches() -> None:
    model = MLP.build()
    parameters = dict(model.named_parameters())
    rows = batches()
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in rows for i in range(len(x))]
    heuristic = unmask.Fisher()
    for a, b in zip(
        heuristic.calibrate(model, parameters, rows).values(),
        heuristic.calibrate(model, parameters, singles).values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    x, y = rows[0]
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(parameters.values()))
    batch = unmask.Fisher(num_samples=5).calibrate(model, parameters, rows)
    assert (batch["first.weight"] > grads[0].square() * 1.01).any()


def test_labels_of_a_language_model_are_drawn_where_they_count() -> None:
    """One position counts; its gradient is that of the token that the model itself would say."""
    model = Language()
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.copy_(torch.tensor([50.0] + [0.0] * 10))  # it always says token 0
    parameters = dict(model.named_parameters())
    tokens = torch.tensor([[1, 2, 3, 4]])
    labels = torch.tensor([[-100, -100, 3, -100]])
    batch = [{"input_ids": tokens, "labels": labels}]
    drawn = unmask.Fisher(1, "model").calibrate(model, parameters, batch)
    assert drawn["output.bias"].abs().max() < 1e-12  # it is sure of what it drew
    given = unmask.Fisher(1, "label").calibrate(model, parameters, batch)
    assert given["output.bias"][3] == 1.0
    with torch.no_grad():
        model.output.bias.zero_()
    drawn = unmask.Fisher(1, "model").calibrate(model, parameters, batch)
    rows = drawn["output.weight"].sum(0) != 0
    assert rows.any()
    assert drawn["embedding.weight"].eq(0).all()  # the output's weights are zero
    with torch.no_grad():
        model.output.weight.normal_()
    drawn = unmask.Fisher(1, "model").calibrate(model, parameters, batch)
    touched = drawn["embedding.weight"].sum(1).nonzero().flatten().tolist()
    assert touched == [2]  # position 1 predicts the label at position 2


@pytest.mark.parametrize(
    ("heuristic", "told"),
    [
        (unmask.Fisher(num_samples=7), [(i, 7) for i in range(1, 8)]),
        (unmask.Calibrated(), [(i, 4) for i in range(1, 5)]),
        (unmask.Movement(passes=2), [(i, 8) for i in range(1, 9)]),
        (unmask.DiffPruning(), [(i, 4) for i in range(1, 5)]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_progress(heuristic: unmask.Heuristic, told: list[tuple[int, int]]) -> None:
    heard: list[tuple[int, int | None]] = []
    calibration = unmask.Calibration(
        batches(), progress=lambda done, total: heard.append((done, total))
    )
    method = unmask.Method(heuristic, unmask.Static(), 9)
    unmask.attach(MLP.build(), method, calibration=calibration)
    assert heard == told


def test_refused() -> None:
    def attach(calibration: Any, method: unmask.Method | None = None, **kw: Any) -> None:
        model = kw.pop("model", None) or MLP.build()
        unmask.attach(model, method or unmask.fish(9), calibration=calibration)

    with pytest.raises(UnmaskError, match=r"Fisher needs data before training.*calibration="):
        attach(None)
    with pytest.raises(UnmaskError, match="calibration=3; give an iterable"):
        attach(3)
    with pytest.raises(UnmaskError, match="without a single batch"):
        attach(iter([]))
    with pytest.raises(UnmaskError, match="no loss can be had"):
        attach([torch.ones(3, 6)], unmask.lt_sft(9))
    with pytest.raises(UnmaskError, match="holds no tensors"):
        attach([("text", "label")])
    with pytest.raises(UnmaskError, match="no loss can be had"):
        attach([{"x": torch.ones(3, 6)}], model=Hugging())
    for name in ("LBFGS", "SparseAdam", "Muon", "Optimizer"):
        with pytest.raises(UnmaskError, match=rf"can't train by torch\.optim\.{name}"):
            attach(batches(), unmask.lt_sft(9, optimizer=name))
    unlabelled = [(torch.ones(2, 6), torch.tensor([0, -100]))]
    with pytest.raises(UnmaskError, match="one finite number"):
        attach(unlabelled)
    for wrong in (lambda m, b: m(b[0]), lambda m, b: 1.0):
        with pytest.raises(UnmaskError, match="one finite number"):
            attach(unmask.Calibration(batches(), wrong))
    with pytest.raises(UnmaskError, match=r"NaN or infinity in 'first\.weight'"):
        attach(unmask.Calibration(batches(), lambda m, b: (0 * m(b[0]).abs().sum()).sqrt()))
    with pytest.raises(UnmaskError, match="can be read only once"):
        attach(iter(batches()), unmask.lt_sft(9, passes=2))
    rows = [(torch.ones(2, 6), torch.ones(2, 1))]
    with pytest.raises(UnmaskError, match="use sample_type='label'"):
        attach(rows, unmask.fish(3, sample_type="model"), model=nn.Linear(6, 1))


def test_a_generator_serves_once() -> None:
    made = (batch for batch in copy.deepcopy(batches()))
    a = unmask.attach(MLP.build(), unmask.fish(9), calibration=made)
    b = unmask.attach(MLP.build(), unmask.fish(9), calibration=batches())
    assert a.slots.index.tolist() == b.slots.index.tolist()


def test_frozen_and_fully_trained_parameters() -> None:
    """What isn't eligible isn't measured; what is trained fully takes part in full training."""
    model = MLP.build()
    before = snapshot(model)
    tuner = unmask.attach(
        model, unmask.lt_sft(9, lr=0.1), include="first*", train_fully="classifier*",
        calibration=batches(),
    )  # fmt: skip
    assert set(tuner.selected()) <= {"first.weight", "first.bias"}
    assert_same_state(snapshot(model), before)


def test_samples_of_any_structure() -> None:
    """A tensor by itself, and tensors within: each sample has its own row of all of them."""
    rows = batches()
    parameters = dict((model := MLP.build()).named_parameters())

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["in"][0]), batch["of"])

    def square(model: nn.Module, batch: Any) -> Tensor:
        return model(batch).square().mean()

    nested = [{"in": [x, "a word"], "of": y} for x, y in rows]
    given = unmask.Fisher().calibrate(model, parameters, unmask.Calibration(nested, loss))
    assert same_tree(given, unmask.Fisher().calibrate(model, parameters, rows))
    alone = unmask.Calibration([x for x, _ in rows], square)
    one = unmask.Calibration([x[i : i + 1] for x, _ in rows for i in range(len(x))], square)
    assert same_tree(*(unmask.Fisher().calibrate(model, parameters, c) for c in (alone, one)))
