"""Sampled weight gradients: the dense mode's results within rounding, at the slots alone."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import unmask
from lockstep import Largest, chosen, same_bits, snapshot
from models import ALL, BF16, F16, MIXED, MLP, Case, Mlp, seeded, tokens
from unmask.derivatives import At
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.kernels import sampled as kernels

LR = {"lr": 0.05}
ROUGH = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(*shape, generator=seeded(seed))


def squares(output: Tensor) -> Tensor:
    return (output.float() * torch.linspace(-1, 1, output.shape[-1])).square().mean()


@contextmanager
def dense_gradients(tuner: unmask.Tuner) -> Iterator[set[str]]:
    """The names of parameters that gradients of full size came for."""
    found: set[str] = set()
    intake = tuner._driver.intake
    stream = intake._stream

    def streaming(k: int, parameter: Tensor) -> None:
        if parameter.grad is not None:
            found.add(tuner.eligible.names[k])
        stream(k, parameter)

    intake._stream = streaming
    yield found
    del intake._stream


class Run:
    """A model trained with SGD; at steps 2, 3, 5, 6, ... nothing is chosen."""

    def __init__(self, make: Callable[[], nn.Module], gradients: str, budget: Any = 0.3) -> None:
        torch.manual_seed(0)
        self.model = make()
        method = unmask.id3(budget=budget, schedule=unmask.Strided(every=3))
        self.tuner = unmask.attach(self.model, method, steps=6, gradients=gradients)
        self.optimizer = self.tuner.optimizer(torch.optim.SGD, **LR)

    def step(self, loss: Callable[[nn.Module], Tensor]) -> set[str]:
        """The parameters whose dense gradients it made."""
        with dense_gradients(self.tuner) as found:
            loss(self.model).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found


def compare(
    make: Callable[[], nn.Module],
    inputs: Callable[[int], Tensor],
    loss: Callable[[Tensor], Tensor] = squares,
    steps: int = 6,
    streams: tuple[str, ...] = (),
    budget: Any = 0.3,
    rough: float = 1e-5,
) -> Run:
    """Dense and sampled, step by step; all but `streams` must have been sampled."""
    dense, sampled = Run(make, "dense", budget), Run(make, "sampled", budget)
    for step in range(steps):
        dense.step(lambda model: loss(model(inputs(step))))  # noqa: B023
        made = sampled.step(lambda model: loss(model(inputs(step))))  # noqa: B023
        if step % 3 or step >= 6:
            assert made == set(streams)
        assert_close(dense.model, sampled.model, rough)
        assert chosen(dense.tuner) == chosen(sampled.tuner)
    assert dense.tuner.updates == sampled.tuner.updates
    return sampled


def assert_close(a: nn.Module, b: nn.Module, rough: float) -> None:
    theirs = snapshot(b)
    for name, tensor in snapshot(a).items():
        torch.testing.assert_close(theirs[name], tensor, rtol=rough, atol=rough, msg=name)


# Kernels


@pytest.mark.parametrize("dtype", ROUGH)
@pytest.mark.parametrize("size", [(0, 3, 4), (1, 1, 1), (37, 5, 7), (700, 40, 33), (130, 300, 20)])
@pytest.mark.parametrize("share", [0.02, 0.2, 1.0])
def test_product(size: tuple[int, int, int], share: float, dtype: torch.dtype) -> None:
    count, height, width = size
    left, right = (torch.randn(count, n, generator=seeded(n)).to(dtype) for n in (height, width))
    some = max(1, round(share * height * width))
    flat = torch.randperm(height * width, generator=seeded(0))[:some].sort().values
    entries = At(flat, (height, width)).entries
    expected = (left.double().t() @ right.double()).reshape(-1)[flat].to(kernels.wider(left).dtype)
    dense = some > kernels.DENSE * height * width  # rounded as the operands' own products are
    rough = ROUGH[dtype] if dense else ROUGH[torch.promote_types(dtype, torch.float32)]
    close = {"rtol": rough, "atol": rough * max(1, count) ** 0.5}
    torch.testing.assert_close(kernels.product(left, right, entries), expected, **close)
    torch.testing.assert_close(kernels.reference(left, right, entries), expected, **close)
    turned = kernels.product(left.t(), right.t(), entries, along=1)
    torch.testing.assert_close(turned, expected, **close)
    again = kernels.product(right, left, entries.transposed)
    torch.testing.assert_close(again, expected, **close)


def test_product_is_the_same_for_any_number_of_threads() -> None:
    left, right = numbers(1500, 64)(0), numbers(1500, 48)(1)
    entries = At(torch.arange(0, 64 * 48, 7), (64, 48)).entries
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(kernels.product(left, right, entries))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(found[0], other) for other in found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_product_passes_on_what_is_not_finite(bad: float) -> None:
    left, right = numbers(100, 20)(0), numbers(100, 30)(1)
    left[57, 3] = bad
    entries = At(torch.tensor([2 * 30, 3 * 30 + 4]), (20, 30)).entries
    assert kernels.product(left, right, entries).isfinite().tolist() == [True, False]


# Operations


def stack(*layers: nn.Module) -> Callable[[], nn.Module]:
    """Copies of these layers, whatever the seed is."""
    return lambda: copy.deepcopy(nn.Sequential(*layers))


class Centred(nn.Module):
    """An RMS norm as models bring their own."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * x if self.first else x * self.weight


class Projection(nn.Module):
    """A product with a weight of its own, no nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Score(nn.Module):
    """A product with a vector, which functional.linear takes as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def gpt2_layer() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 6)


torch.manual_seed(0)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear 2-D": (stack(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), numbers(50, 6)),
    "linear 3-D": (stack(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), numbers(4, 5, 6)),
    "linear 4-D": (stack(nn.Linear(6, 8, bias=False), nn.Tanh()), numbers(2, 3, 5, 6)),
    "linear 1-D": (stack(nn.Linear(6, 8), nn.Tanh()), numbers(6)),
    "embedding": (stack(nn.Embedding(19, 5)), tokens),
    "embedding padded": (stack(nn.Embedding(19, 5, padding_idx=3), nn.Linear(5, 3)), tokens),
    "embedding padded at the end": (stack(nn.Embedding(19, 5, padding_idx=-1)), tokens),
    "embedding sparse": (stack(nn.Embedding(19, 5, sparse=True)), tokens),
    "embedding int32": (stack(nn.Embedding(19, 5)), lambda seed: tokens(seed).int()),
    "layer norm": (stack(nn.Linear(6, 40), nn.LayerNorm(40)), numbers(4, 5, 6)),
    "layer norm 2-D": (stack(nn.Linear(6, 6), nn.LayerNorm((5, 6))), numbers(4, 5, 6)),
    "rms norm": (stack(nn.Linear(6, 40), nn.RMSNorm(40)), numbers(4, 5, 6)),
    "own norm": (stack(nn.Linear(6, 8), Centred(8, first=True), nn.Tanh()), numbers(4, 5, 6)),
    "own norm behind": (stack(nn.Linear(6, 8), Centred(8, first=False)), numbers(4, 5, 6)),
    "own product": (stack(Projection(), nn.Tanh(), nn.Linear(5, 4)), numbers(4, 5, 6)),
    "gpt2": (stack(gpt2_layer(), nn.Tanh()), numbers(4, 5, 6)),
    "conv1d": (stack(nn.Conv1d(3, 4, 3), nn.ReLU(inplace=True)), numbers(4, 3, 9)),
    "conv2d": (stack(nn.Conv2d(3, 4, 3, stride=2, padding=1)), numbers(4, 3, 9, 8)),
    "conv2d oblong": (
        stack(nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1))),
        numbers(4, 3, 9, 8),
    ),
    "conv2d grouped": (stack(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh()), numbers(4, 4, 6, 6)),
    "conv2d depthwise": (stack(nn.Conv2d(4, 4, 3, groups=4, bias=False)), numbers(4, 4, 6, 6)),
    "conv2d same": (stack(nn.Conv2d(2, 3, 4, padding="same")), numbers(4, 2, 6, 6)),
    "conv2d circular": (
        stack(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")),
        numbers(4, 2, 6, 6),
    ),
    "patches": (stack(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2)), numbers(4, 3, 8, 8)),
    "conv3d": (stack(nn.Conv3d(2, 3, 2), nn.Tanh()), numbers(4, 2, 4, 4, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("budget", [0.1, 0.9])
def test_layer(name: str, budget: float) -> None:
    make, inputs = LAYERS[name]
    compare(make, inputs, budget=budget)


def test_linear_with_a_vector_for_its_weight_streams() -> None:
    compare(stack(Score(), nn.Tanh(), nn.Linear(5, 2)), numbers(4, 5, 6), streams=("0.weight",))


class Columns(nn.Module):
    """A bias for each row of the output, which functional.linear takes as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.filterwarnings("ignore:.*can't be sampled:unmask.UnmaskWarning")
def test_linear_with_a_bias_of_another_shape_streams() -> None:
    compare(Columns, numbers(5, 6), streams=("weight", "bias"), budget=0.9)


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 4, 2), nn.Conv2d(3, 4, 2)])
def test_convolution_of_nothing(layer: nn.Module) -> None:
    shape = (0, 3, 5) if isinstance(layer, nn.Conv1d) else (0, 3, 5, 5)
    compare(lambda: copy.deepcopy(layer), numbers(*shape), lambda output: output.sum())


def test_convolution_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.derivatives.PATCHES", 600)
    compare(stack(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()), numbers(5, 3, 6, 6), budget=0.1)


@pytest.mark.filterwarnings("ignore:.*can't be sampled:unmask.UnmaskWarning")
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "method",
    [unmask.static_d3(budget=0.1), unmask.full(), unmask.random_mask(budget=0.5)],
    ids=["static", "all", "random"],
)
def test_model(case: Case, method: unmask.Method) -> None:
    """Methods that choose once, so that no rounding can sway a later choice."""
    models = []
    for mode in ("dense", "sampled"):
        model = case.build()
        tuner = unmask.attach(model, method, steps=4, gradients=mode)
        optimizer = tuner.optimizer(torch.optim.SGD, **LR)
        for step in range(4):
            case.loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append((model, chosen(tuner), tuner.updates))
    rough = 2e-2 if case in (BF16, F16, MIXED) else ROUGH[case.dtype]
    (dense, *counts), (sampled, *others) = models
    assert_close(dense, sampled, rough)
    assert counts == others


def test_sums_are_taken_in_float32_for_bf16() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    tuner = unmask.attach(model, unmask.random_mask(budget=0.1), gradients="sampled")
    optimizer = tuner.optimizer(torch.optim.SGD, **LR)
    model(x).sum().backward()
    exact = torch.cat([x.double().sum(0).expand(64, 64).reshape(-1), torch.full((64,), 300.0)])
    found = optimizer.param_groups[0]["params"][0].grad[tuner.slots.position]
    torch.testing.assert_close(found, exact[tuner.slots.index].float(), rtol=1e-5, atol=1e-4)


# Models that use their weights in more than one way


class Tied(nn.Module):
    """Embedding and output share a tensor; `functional` says how the output is computed."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(19, 8)
        self.head = nn.Linear(8, 19, bias=False)
        self.head.weight = self.embedding.weight
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).tanh()
        return F.linear(x, self.embedding.weight) if self.functional else self.head(x)


def test_tied_tensors_add_both_parts() -> None:
    compare(lambda: Tied(functional=False), tokens)


@pytest.mark.filterwarnings("ignore:.*can't be sampled:unmask.UnmaskWarning")
def test_functional_use_elsewhere_adds_what_autograd_finds() -> None:
    compare(lambda: Tied(functional=True), tokens, streams=("embedding.weight",))


class Shared(nn.Module):
    """One layer, called at several depths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.norm(self.layer(x).tanh())
        return x


def test_module_called_several_times() -> None:
    compare(Shared, numbers(4, 5, 6))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6), nn.LayerNorm(6))
        self.head, self.reentrant = nn.Linear(6, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    compare(lambda: Checkpointed(reentrant), numbers(4, 5, 6))


class CheckpointsItself(nn.Module):
    """A part of forward, with weights of the module's own, runs again in backward by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) @ self.v


@pytest.mark.filterwarnings("ignore:.*can't be sampled:unmask.UnmaskWarning")
@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 6)])
def test_checkpointing_inside_of_a_module_streams(shape: tuple[int, ...]) -> None:
    body = lambda: nn.Sequential(nn.Linear(6, 6), CheckpointsItself())  # noqa: E731
    compare(body, numbers(*shape), streams=("1.w", "1.v"))


class Odd(nn.Module):
    """Weights in ways that no rule knows, next to one that has."""

    def __init__(self) -> None:
        super().__init__()
        self.known = nn.Linear(6, 6)
        self.mixing = nn.Parameter(torch.randn(6, 6))
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(2)])
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("...i,ij->...j", self.known(x), self.mixing)
        x = x @ torch.cat([part[:3] for part in self.parts])
        return self.attention(x, x, x, need_weights=False)[0]


def test_what_cannot_be_sampled_streams_and_says_so_once() -> None:
    names = (
        "mixing",
        "parts.0",
        "parts.1",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    )
    biases = ("attention.in_proj_bias", "attention.out_proj.bias")
    with pytest.warns(UnmaskWarning) as said:
        compare(Odd, numbers(4, 5, 6), streams=names + biases)
    (message,) = [str(one.message) for one in said]
    assert all(name in message for name in names)
    assert "known" not in message


def test_bert_and_gpt2_say_nothing() -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    bert = BertConfig(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    gpt2 = GPT2Config(
        vocab_size=19, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    compare(lambda: BertModel(bert), tokens, lambda out: squares(out.pooler_output))
    compare(lambda: GPT2LMHeadModel(gpt2), tokens, lambda out: squares(out.logits))


# Ways to train


@pytest.mark.parametrize("backwards", [2, 3])
def test_accumulation(backwards: int) -> None:
    dense, sampled = Run(Mlp, "dense"), Run(Mlp, "sampled")
    sampled.tuner.detach()
    sampled.tuner = unmask.attach(
        sampled.model, dense.tuner.method, steps=6, gradients="sampled", accumulation=backwards
    )
    sampled.optimizer = sampled.tuner.optimizer(torch.optim.SGD, **LR)
    for step in range(6):
        for run in (dense, sampled):
            for part in range(backwards):
                MLP.loss(run.model, 10 * step + part).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        assert_close(dense.model, sampled.model, 1e-5)
    assert chosen(dense.tuner) == chosen(sampled.tuner)


def test_autocast() -> None:
    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return squares(model(numbers(4, 5, 6)(0)))

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8))

    models = []
    for mode in ("dense", "sampled"):
        torch.manual_seed(0)
        model = make()
        tuner = unmask.attach(model, unmask.random_mask(budget=0.5), gradients=mode)
        optimizer = tuner.optimizer(torch.optim.SGD, **LR)
        for _ in range(3):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert_close(*models, 2e-3)


def test_clipping_and_a_second_look_at_the_gradient() -> None:
    dense, sampled = Run(Mlp, "dense"), Run(Mlp, "sampled")
    for step in range(5):
        norms = []
        for run in (dense, sampled):
            MLP.loss(run.model, step).backward()
            (values,) = run.optimizer.param_groups[0]["params"]
            norms.append(nn.utils.clip_grad_norm_([values], 0.01))
            run.optimizer.step()
            run.optimizer.zero_grad()
        torch.testing.assert_close(*norms)
    assert_close(dense.model, sampled.model, 1e-5)


def test_a_gradient_that_is_not_finite_skips_the_step() -> None:
    run = Run(Mlp, "sampled", budget=1.0)
    for step in range(2):
        run.step(lambda model: MLP.loss(model, step))  # noqa: B023
    before = snapshot(run.model)
    with pytest.warns(UnmaskWarning, match="step 3 was skipped"):
        run.step(lambda model: MLP.loss(model, 2) * float("nan"))
    assert all(same_bits(before[n], t) for n, t in snapshot(run.model).items())
    run.step(lambda model: MLP.loss(model, 2))
    assert run.tuner.step == 3


def test_no_gradients_and_evaluation_change_nothing() -> None:
    run, x = Run(Mlp, "sampled"), numbers(5, 6)(0)
    run.step(lambda model: squares(model(x)))
    plain = copy.deepcopy(run.model)
    with torch.no_grad():
        assert same_bits(run.model(x), plain(x))
    with torch.inference_mode():
        run.model(x)
    assert same_bits(run.model.eval()(x), plain(x))
    run.optimizer.zero_grad()
    before = run.optimizer.param_groups[0]["params"][0].grad
    x.requires_grad_()
    (of_input,) = torch.autograd.grad(run.model(x).sum(), x)
    (expected,) = torch.autograd.grad(plain(x).sum(), x)
    torch.testing.assert_close(of_input, expected)
    assert before is None
    assert run.optimizer.param_groups[0]["params"][0].grad is None


def test_forward_before_steps_are_known() -> None:
    model = Mlp()
    tuner = unmask.attach(model, unmask.id3(budget=4), gradients="sampled")
    model(numbers(5, 6)(0))
    tuner.steps = 4
    assert tuner.steps == 4


def test_nothing_is_unmasked_yet() -> None:
    """Two scalars in eight steps: the first steps choose nothing and train nothing."""
    for mode in ("dense", "sampled"):
        model = MLP.build()
        tuner = unmask.attach(model, unmask.id3(budget=2), steps=8, gradients=mode)
        optimizer = tuner.optimizer(torch.optim.SGD, **LR)
        for step in range(4):
            MLP.loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (tuner.step, tuner.active, tuner.updates) == (4, 1, 1)


def test_late_backward_is_refused_rather_than_wrong() -> None:
    run = Run(Mlp, "sampled")
    for step in range(2):
        run.step(lambda model: MLP.loss(model, step))  # noqa: B023
    early = MLP.loss(run.model, 2), MLP.loss(run.model, 3)
    early[0].backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    with pytest.raises(UnmaskError, match="forward pass made before"):
        early[1].backward()


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    run = Run(Mlp, "sampled")
    run.step(lambda model: MLP.loss(model, 0))
    x = numbers(5, 6)(0).requires_grad_()
    with pytest.raises(UnmaskError, match="create_graph"):
        torch.autograd.grad(run.model(x).sum(), x, create_graph=True)


def test_only_what_backward_was_asked_for() -> None:
    dense, sampled = Run(Mlp, "dense"), Run(Mlp, "sampled")
    for run in (dense, sampled):
        run.step(lambda model: MLP.loss(model, 0))
        loss = MLP.loss(run.model, 1)
        loss.backward(inputs=[run.model.first.bias, run.model.second.weight], retain_graph=True)
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert_close(dense.model, sampled.model, 1e-5)
    with pytest.raises(UnmaskError, match="whole gradient"):
        torch.autograd.grad(MLP.loss(sampled.model, 2), sampled.model.first.weight)


def test_weights_that_a_module_keeps_a_list_of() -> None:
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    with pytest.warns(UnmaskWarning, match="weight_hh_l0"):
        compare(lambda: nn.LSTM(6, 4), numbers(4, 5, 6), lambda out: squares(out[0]), streams=names)


def test_a_hook_on_a_weight_is_heard() -> None:
    run = Run(Mlp, "sampled")
    run.step(lambda model: MLP.loss(model, 0))
    handle = run.model.first.weight.register_hook(lambda g: 2 * g)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnmaskWarning)
        assert run.step(lambda model: MLP.loss(model, 1)) == {"first.weight"}
    handle.remove()


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return dy @ weight.t(), x.t() @ dy


class Unseen(nn.Module):
    """A weight that reaches code which Tensor subclasses can't follow."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Own.apply(x, self.weight))


@pytest.mark.filterwarnings("ignore:.*can't be sampled:unmask.UnmaskWarning")
def test_what_goes_past_the_rules_has_a_gradient_still() -> None:
    compare(Unseen, numbers(5, 6), streams=("weight",))


def test_an_error_in_forward_leaves_the_parameters_in_place() -> None:
    run = Run(Mlp, "sampled")
    run.step(lambda model: MLP.loss(model, 0))
    with pytest.raises(RuntimeError):
        run.model(torch.randn(2, 99))
    assert all(type(p) is nn.Parameter for p in run.model.parameters())


class Interrupted(nn.Module):
    """A module whose forward is stopped from outside once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.stops = nn.Parameter(torch.randn(6, 6)), False

    def forward(self, x: Tensor) -> Tensor:
        if self.stops:
            raise KeyboardInterrupt
        return x @ self.weight


def test_an_interrupt_in_forward_and_detach_leave_the_parameters_in_place() -> None:
    run = Run(lambda: nn.Sequential(nn.Linear(6, 6), Interrupted()), "sampled")
    run.step(lambda model: squares(model(numbers(5, 6)(0))))
    run.model[1].stops = True
    with pytest.raises(KeyboardInterrupt):
        run.model(numbers(5, 6)(1))
    run.tuner.detach()
    assert all(type(p) is nn.Parameter for p in run.model.parameters())


class LooksAtItself(nn.Module):
    """What modules do with a parameter besides operations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.weight.gain = 2.0

    def forward(self, x: Tensor) -> Tensor:
        self.weight = self.weight
        self.weight.calls = getattr(self.weight, "calls", 0) + 1
        other = copy.deepcopy(self.weight).detach()
        assert type(other) is Tensor or type(other) is nn.Parameter
        gain = self.weight.gain if isinstance(self.weight, nn.Parameter) else 0.0
        return F.linear(x, self.weight) * gain + other.sum()


def test_a_module_that_looks_at_its_parameter_sees_the_parameter() -> None:
    run = compare(LooksAtItself, numbers(5, 6))
    assert run.model.weight.calls == 6
    assert type(run.model.weight) is nn.Parameter


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_transforms_of_the_model_work_between_selections() -> None:
    run = Run(Mlp, "sampled")
    run.step(lambda model: MLP.loss(model, 0))
    x = MLP.inputs(1)
    expected = run.model(x)
    torch.testing.assert_close(torch.func.vmap(run.model)(x), expected)
    assert torch.func.jacrev(run.model)(x[0]).shape == (*expected[0].shape, *x[0].shape)
    torch.testing.assert_close(torch.func.jvp(run.model, (x,), (x,))[0], expected)
    torch.testing.assert_close(torch.jit.trace(run.model, x)(x), expected)


def test_copies_are_models_of_their_own() -> None:
    run = Run(Mlp, "sampled")
    run.step(lambda model: MLP.loss(model, 0))
    for other in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
        MLP.loss(other, 1).backward()
        assert all(p.grad is not None for p in other.parameters())
    functional = {n: p.detach().clone().requires_grad_() for n, p in run.model.named_parameters()}
    torch.func.functional_call(run.model, functional, (MLP.inputs(0),)).sum().backward()
    assert all(p.grad is not None for p in functional.values())
    run.optimizer.zero_grad()


def test_detach_leaves_no_hook() -> None:
    run = Run(Mlp, "sampled")
    run.step(lambda model: MLP.loss(model, 0))
    run.tuner.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())
    MLP.loss(run.model, 1).backward()
    assert all(p.grad is not None for p in run.model.parameters())


def test_embedding_never_makes_a_gradient_of_its_size() -> None:
    """On a sampled step no tensor of the vocabulary's size is made."""
    run = Run(lambda: nn.Sequential(nn.Embedding(5000, 4), nn.Linear(4, 3)), "sampled", 100)
    run.step(lambda model: squares(model(tokens(0))))
    with Largest(run.model[0].weight) as largest:
        squares(run.model(tokens(1))).backward()
    assert 0 < largest.size < 1000
    run.optimizer.zero_grad()


@pytest.mark.slow
def test_compiled_models_stream() -> None:
    dense, sampled = Run(Mlp, "dense"), Run(Mlp, "sampled")
    compiled = torch.compile(sampled.model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(4):
            dense.step(lambda model: squares(model(numbers(5, 6)(step))))  # noqa: B023
            sampled.step(lambda _: squares(compiled(numbers(5, 6)(step))))  # noqa: B023
    assert_close(dense.model, sampled.model, 1e-5)
    assert chosen(dense.tuner) == chosen(sampled.tuner)
