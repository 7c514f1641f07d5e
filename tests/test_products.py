"""Products that backward makes again: not kept, the same bits, and nobody else's business."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import unmask
from lockstep import assert_same_state, chosen, same_bits, same_tree, snapshot
from models import seeded
from unmask import products

WIDTH = 16


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST", 0)


Form = Callable[["Norm", Tensor, Tensor], Tensor]


def size(x: Tensor) -> Tensor:
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)


# A norm's end: from x and its scale to the output. Each saves the product by `self.of`.
NORMS: dict[str, Form] = {
    "llama": lambda norm, x, r: norm.weight * norm.of(x.float() * r, x.dtype),
    "behind": lambda norm, x, r: norm.of(x * r, x.dtype) * norm.weight,
    "gemma": lambda norm, x, r: (
        norm.of(x.float() * r, torch.float32) * (1.0 + norm.weight.float())
    ).to(x.dtype),
    "olmo": lambda norm, x, r: (
        norm.weight * norm.of(x.to(torch.float32) * r, torch.float32)
    ).type_as(x),
    "quotient": lambda norm, x, r: norm.weight * norm.of(x / (1 / r), x.dtype) + norm.bias,
    "in place": lambda norm, x, r: norm.weight * norm.of((1 * x).mul_(r.to(x.dtype)), x.dtype),
    "reshaped": lambda norm, x, r: (
        norm.weight.view(1, -1) * norm.of(x * r, x.dtype) + norm.bias[None]
    ),
    "two vectors": lambda norm, x, r: norm.weight * norm.bias * norm.of(x * r, x.dtype),
    "a view": lambda norm, x, r: norm.weight * norm.of((x * r).view(-1, WIDTH), x.dtype),
}
# What can't be, or needn't.
OTHER_NORMS: dict[str, Form] = {
    "a constant's": lambda norm, x, r: norm.weight * norm.of(x * r.detach(), x.dtype),
    "a sum": lambda norm, x, r: norm.weight * norm.of(x + r, x.dtype),
    "no scaling": lambda norm, x, r: norm.of(x * r, x.dtype) + norm.weight,
}
# A gated layer's end: what holds a matrix, and what goes in, from two halves.
Halves = Callable[["Gate", Tensor, Tensor], Tensor]
GATES: dict[str, tuple[Callable[[], nn.Module], Halves]] = {
    "gated": (lambda: plain(), lambda gate, a, u: gate.of(a.sigmoid() * u, u.dtype)),
    "biased": (lambda: linear(), lambda gate, a, u: gate.of(a.tanh() * u, u.dtype)),
    "addmm": (lambda: Conv1D(), lambda gate, a, u: gate.of(0.5 * a * (1 + a.tanh()), u.dtype)),
    "divided": (lambda: linear(), lambda gate, a, u: gate.of(u / (1 + a.exp()), u.dtype)),
    "rows": (lambda: linear(), lambda gate, a, u: gate.of((a * u).view(-1, WIDTH), u.dtype)),
    "matmul": (lambda: Matrix(), lambda gate, a, u: gate.of(a.sigmoid() * u, u.dtype)),
    "cast": (lambda: plain(), lambda gate, a, u: gate.of(a.double() * u.double(), u.dtype)),
    "squeezed": (
        lambda: nn.Conv1d(5, 5, 3, padding=1),
        lambda gate, a, u: gate.of(u * a.mean(-1, keepdim=True).sigmoid(), u.dtype),
    ),
    "dropped": (
        lambda: plain(),
        lambda gate, a, u: gate.of(nn.functional.dropout(a.sigmoid() * u, 0.5), u.dtype),
    ),
    "rectified": (
        lambda: plain(),
        lambda gate, a, u: gate.of(nn.functional.dropout((a + u).relu(), 0.5), u.dtype),
    ),
}
OTHER_GATES: dict[str, tuple[Callable[[], nn.Module], Halves]] = {
    "transposed": (
        lambda: plain(),
        lambda gate, a, u: gate.of((a.sigmoid() * u).transpose(0, 1), u.dtype),
    ),
    "a vector's": (lambda: linear(), lambda gate, a, u: gate.of(u * a.mean((0, 1)), u.dtype)),
    "an activation": (lambda: linear(), lambda gate, a, u: gate.of((a + u).tanh(), u.dtype)),
    "cast twice": (
        lambda: plain(),
        lambda gate, a, u: gate.of((a.sigmoid() * u).to(torch.float16), u.dtype),
    ),
}
# Attention's weights, from scores.
ATTENTION: dict[str, Callable[["Attention", Tensor], Tensor]] = {
    "attention": lambda part, x: part.of(
        nn.functional.dropout(x.softmax(-1), 0.3, part.training), x.dtype
    ),
    "in float32": lambda part, x: part.of(
        nn.functional.dropout(x.softmax(-1, dtype=torch.float32).to(x.dtype), 0.3), x.dtype
    ),
    "then cast": lambda part, x: part.of(
        nn.functional.dropout(x.softmax(-1, dtype=torch.float32), 0.3), x.dtype
    ),
    "gated attention": lambda part, x: part.of(x.softmax(-1) * x.sigmoid(), x.dtype),
    "dropped twice": lambda part, x: part.of(
        nn.functional.dropout(nn.functional.dropout(x.relu(), 0.3), 0.3), x.dtype
    ),
}
OTHER_ATTENTION: dict[str, Callable[["Attention", Tensor], Tensor]] = {
    "nothing dropped": lambda part, x: part.of(x.softmax(-1), x.dtype),
    "a dropped sum": lambda part, x: part.of(nn.functional.dropout(x + 1, 0.3), x.dtype),
    "a vector": lambda part, x: part.of(
        x.softmax(-1) * torch.ones(5).bernoulli_(0.5).to(x), x.dtype
    ),
}
EXPERTS = ["experts", "experts with a bias"]
FORMS = [*NORMS, *GATES, *ATTENTION]
OTHERS = [*OTHER_NORMS, *OTHER_GATES, *OTHER_ATTENTION]


class Part(nn.Module):
    """Knows whether its product is still there."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.product: Any = None
        self.watched = False

    def of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        if self.watched:
            self.product = StorageWeakRef(x.untyped_storage())
        return x


class Norm(Part):
    """Ends in one of these forms."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        if form in ("quotient", "reshaped", "two vectors"):
            self.bias = nn.Parameter(0.1 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (NORMS | OTHER_NORMS)[self.form](self, x, size(x))


def plain() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, bias=False)


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Conv1D(Matrix):
    """As GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, WIDTH), self.weight).view(x.shape)


class Gate(Part):
    """Ends in one of these forms."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.halves, self.matrix = nn.Linear(WIDTH, 2 * WIDTH), (GATES | OTHER_GATES)[form][0]()
        nn.init.normal_(self.matrix.weight, 0, 4)  # type: ignore[arg-type]  # so some are chosen

    def forward(self, x: Tensor) -> Tensor:
        enter = (GATES | OTHER_GATES)[self.form][1]
        return self.matrix(enter(self, *self.halves(x).chunk(2, -1)))  # type: ignore[no-any-return]


class Attention(Part):
    """Of two heads."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.into, self.matrix = nn.Linear(WIDTH, 3 * WIDTH), plain()
        nn.init.normal_(self.matrix.weight, 0, 4)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        heads = self.into(x).view(*x.shape[:2], 3, 2, WIDTH // 2)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        weights = (ATTENTION | OTHER_ATTENTION)[self.form](self, query @ key.mT)
        return self.matrix((weights @ value).transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Experts(Part):
    """Two, that each take half of the rows, as transformers has them multiplied."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.halves = nn.Parameter(torch.randn(2, 2 * WIDTH, WIDTH))
        self.matrices = nn.Parameter(4 * torch.randn(2, WIDTH, WIDTH))
        if form == "experts with a bias":
            self.bias = nn.Parameter(torch.randn(2, WIDTH))

    def grouped(self, x: Tensor, matrices: Tensor) -> Tensor:
        ends = torch.tensor([len(x) // 2, len(x)], dtype=torch.int32)
        return nn.functional.grouped_mm(x, matrices.transpose(1, 2), offs=ends)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        twice = torch.arange(len(rows)).repeat(2)
        a, u = self.grouped(rows[twice], self.halves).chunk(2, -1)
        out = self.grouped(self.of(a.sigmoid() * u, u.dtype), self.matrices)
        if self.form == "experts with a bias":
            out = out + self.bias[torch.arange(2).repeat_interleave(len(rows))]
        out = out * rows.float().mean(-1, keepdim=True).softmax(0).to(out)[twice]
        back = twice.argsort(stable=True)
        return out[back].view(*x.shape[:2], 2, WIDTH).sum(2).to(x.dtype)


class Model(nn.Module):
    def __init__(self, form: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, WIDTH)
        kinds: dict[str, type[Part]] = dict.fromkeys(GATES | OTHER_GATES, Gate)
        kinds |= dict.fromkeys(EXPERTS, Experts)
        kinds |= dict.fromkeys(ATTENTION | OTHER_ATTENTION, Attention)
        self.part: Part = kinds.get(form, Norm)(form)
        self.last = nn.Linear(WIDTH, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(self.first(x)).reshape(len(x), -1, WIDTH)).square().mean()


def keeps(model: Model, x: Tensor) -> bool:
    """Whether a forward pass keeps the part's product for backward, which is run, too."""
    model.part.watched = True
    loss = model(x)
    kept = not model.part.product.expired()
    model.part.watched = False
    loss.backward()
    return kept


def inputs(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 5, 6, generator=seeded(step)).to(dtype)


def attached(model: nn.Module, gradients: str = "streaming", **how: Any) -> unmask.Tuner:
    return unmask.attach(model, unmask.id3(40, exp=-2, **how), steps=4, gradients=gradients)


def trained(
    form: str, gradients: str, dtype: torch.dtype, schedule: unmask.Schedule
) -> tuple[Any, ...]:
    model = Model(form, dtype)
    tuner = attached(model, gradients, schedule=schedule)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    for step in range(4):
        torch.manual_seed(step)
        model(inputs(step, dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return chosen(tuner), snapshot(model), optimizer.state_dict()


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def check_it_is_not_kept(form: str, dtype: torch.dtype) -> None:
    """As long as a tuner that streams is on the model."""
    model, x = Model(form, dtype), inputs(0, dtype)
    for gradients, kept in (("dense", True), ("streaming", False), ("sampled", False)):
        tuner = attached(model, gradients)
        assert keeps(model, x) == kept, gradients
        tuner.detach()
        assert keeps(model, x)


def check_it_is_the_dense_mode(form: str, dtype: torch.dtype) -> None:
    dense, streaming = (
        trained(form, mode, dtype, unmask.Uniform()) for mode in ("dense", "streaming")
    )
    assert dense[0] == streaming[0]
    assert any(name.startswith("part") for name in dense[0])
    assert_same_state(dense[1], streaming[1])
    assert same_tree(dense[2], streaming[2])


@DTYPES
@pytest.mark.parametrize("form", FORMS)
def test_it_is_not_kept(form: str, dtype: torch.dtype) -> None:
    check_it_is_not_kept(form, dtype)


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="PyTorch has no grouped_mm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", EXPERTS)
def test_experts(form: str, dtype: torch.dtype) -> None:
    check_it_is_not_kept(form, dtype)
    check_it_is_the_dense_mode(form, dtype)


@pytest.mark.parametrize("form", OTHERS)
def test_others_are_let_be(form: str) -> None:
    model, x = Model(form), inputs(0)
    kept = keeps(model, x)
    attached(model)
    assert keeps(model, x) == kept


@DTYPES
@pytest.mark.parametrize("form", FORMS + OTHERS)
def test_it_is_the_dense_mode(form: str, dtype: torch.dtype) -> None:
    check_it_is_the_dense_mode(form, dtype)


@pytest.mark.parametrize("form", FORMS + OTHERS)
def test_between_selections(form: str) -> None:
    """Rounding apart, as sums are taken in another order there."""
    every = unmask.Strided(every=2)
    dense, sampled = (trained(form, mode, torch.float32, every) for mode in ("dense", "sampled"))
    assert dense[0] == sampled[0]
    for name, tensor in dense[1].items():
        torch.testing.assert_close(sampled[1][name], tensor)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "squeezed"])
def test_it_is_not_kept_between_selections(form: str) -> None:
    """Convolutions apart, which keep their input for its own gradient, too."""
    model = Model(form)
    tuner = attached(model, "sampled", schedule=unmask.Strided(every=4))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=1e-2)
    model(inputs(0)).backward()
    optimizer.step()
    assert chosen(tuner).keys() & {"part.weight", "part.matrix.weight"}
    assert not keeps(model, inputs(1))


def gradients_of(model: Model, run: Callable[[Model], Tensor], second: bool) -> list[Tensor]:
    torch.manual_seed(0)
    wanted = [*model.parameters()]
    loss = run(model)
    found = torch.autograd.grad(loss, wanted, create_graph=second, retain_graph=True)
    again = torch.autograd.grad(loss, wanted, create_graph=second)
    assert all(map(same_bits, found, again))
    if second:
        found += torch.autograd.grad(sum(g.square().sum() for g in found), wanted)
    return list(found)


class Doubled(torch.nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.model(x)


def offloaded(model: Model) -> Tensor:
    with save_on_cpu():
        return model(inputs(0))


def marked(model: Model) -> Tensor:
    with saved_tensors_hooks(lambda x: (x, 1), lambda pair: pair[0]):
        return model(inputs(0))


def autocast(model: Model) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(inputs(0))


RUNS: dict[str, Callable[[Model], Tensor]] = {
    "plain": lambda model: model(inputs(0)),
    "autocast": autocast,
    "checkpoint": lambda model: checkpoint(model, inputs(0), use_reentrant=False),
    "offloaded": offloaded,
    "marked": marked,
    "twice": lambda model: model(inputs(0)) + model(inputs(1)),
    "a copy": lambda model: torch.func.functional_call(
        model, dict(model.named_parameters()), inputs(0)
    ),
    "within another": lambda model: Doubled(model)(inputs(0)),
}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_asked_for_are_the_plain_model_s(form: str, run: str, second: bool) -> None:
    """To any order, as often as asked, whoever else sees to what autograd keeps."""
    plain, model = Model(form), Model(form)
    attached(model)
    expected, found = (gradients_of(m, RUNS[run], second) for m in (plain, model))
    assert all(map(same_bits, expected, found))


def test_an_offload_has_what_it_had() -> None:
    """All that a plain model would have given it."""

    def count(model: Model) -> int:
        seen = []
        with saved_tensors_hooks(lambda x: (seen.append(x.shape), x)[1], lambda x: x):
            model(inputs(0))
        return len(seen)

    plain, model = Model("llama"), Model("llama")
    attached(model)
    assert count(plain) == count(model)


@pytest.mark.parametrize("gradients", ["streaming", "sampled"])
def test_a_checkpoint_s_inside_is_had_once(gradients: str) -> None:
    """What is within it is no part of what is made again outside."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Gate("gated")

        def forward(self, x: Tensor) -> Tensor:
            def within(x: Tensor) -> Tensor:
                a, u = self.part.halves(x).chunk(2, -1)
                return a.sigmoid() * u

            return self.part.matrix(checkpoint(within, x, use_reentrant=False)).square().mean()  # type: ignore[no-any-return]

    found = []
    for mode in ("dense", gradients):
        torch.manual_seed(0)
        model = Half()
        tuner = attached(model, mode, schedule=unmask.Strided(every=2))
        optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
        for step in range(4):
            model(torch.randn(3, 5, WIDTH, generator=seeded(step))).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((chosen(tuner), snapshot(model)))
    assert found[0][0] == found[1][0]
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor)


def test_pytorch_s_own_root_mean_square() -> None:
    """Of operations, where PyTorch has none of its own for it."""
    model = nn.Sequential(nn.Linear(6, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3))
    attached(model)
    node = model[1](torch.randn(4, 5, WIDTH, requires_grad=True)).grad_fn
    assert node is not None
    assert node.name() == "MulBackward0"
    assert node._raw_saved_self.unpack_hook is not None  # type: ignore[attr-defined]


def operations(node: Any, seen: set[Any]) -> set[Any]:
    """All that autograd knows to have led here."""
    if node is not None and node not in seen:
        seen.add(node)
        for before, _ in node.next_functions:
            operations(before, seen)
    return seen


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True),
    "layer, batch second": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 32),
    "attention": lambda: Whole(nn.MultiheadAttention(WIDTH, 2, 0.1, batch_first=True)),
}


class Whole(nn.Module):
    """Attention that gives its weights, too."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(x, x, x)
        return out + weights.mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", LAYERS)
def test_pytorch_s_own_attention(name: str) -> None:
    """Fused in one operation, it has no such product where nothing is dropped."""
    found = []
    for gradients in ("dense", "streaming"):
        torch.manual_seed(0)
        model = nn.Sequential(LAYERS[name](), nn.Linear(WIDTH, 3))
        tuner = attached(model, gradients)
        optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
        for step in range(4):
            torch.manual_seed(step)
            loss = model(torch.randn(4, 5, WIDTH)).square().mean()
            made = {
                node.name()
                for node in operations(loss.grad_fn, set())
                for place in ("_raw_saved_self", "_raw_saved_mat1")
                if getattr(getattr(node, place, None), "unpack_hook", None) is not None
            }
            assert not made or gradients == "streaming"
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((chosen(tuner), snapshot(model), made))
    assert found[0][0] == found[1][0]
    assert_same_state(found[0][1], found[1][1])
    assert found[1][2] == {"BmmBackward0"} | ({"AddmmBackward0"} if "layer" in name else set())


@pytest.mark.parametrize("form", ["llama", "gated"])
def test_compiled_in_one_piece(form: str) -> None:
    model = Model(form)
    attached(model)
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(inputs(0)).backward()


def test_the_transforms_of_torch() -> None:
    plain, model = Model("llama"), Model("llama")
    attached(model)
    found = []
    for m in (plain, model):
        values = {name: p.detach() for name, p in m.named_parameters()}

        def loss(values: dict[str, Tensor], x: Tensor, m: Model = m) -> Tensor:
            return torch.func.functional_call(m, values, (x[None],))

        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(values, inputs(0)))
    for name, gradient in found[0].items():
        assert same_bits(gradient, found[1][name])


def test_compiled() -> None:
    plain, model = Model("llama"), Model("llama")
    attached(model)
    found = []
    for m in (plain, model):
        torch._dynamo.reset()
        compiled = torch.compile(m, backend="aot_eager", fullgraph=m is plain)
        found.append(torch.autograd.grad(compiled(inputs(0)), [*m.parameters()]))
    assert all(map(same_bits, *found))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_theirs(copied: Callable[[Model], Model]) -> None:
    model = Model("llama")
    attached(model)
    other = copied(model)
    assert keeps(other, inputs(0))


def test_what_is_written_over_is_noticed() -> None:
    """As autograd does: a factor changed in place before backward."""
    model = Model("llama")
    attached(model)
    model.first.register_forward_hook(lambda _, __, out: setattr(model, "out", out))
    loss = model(inputs(0))
    with torch.no_grad():
        model.out.add_(1)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_written_over_is_backward_s_business() -> None:
    """Who only runs forward may do so."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halves, self.matrix = nn.Linear(6, 2 * WIDTH), plain()

        def forward(self, x: Tensor) -> Tensor:
            a, u = (half.exp() for half in self.halves(x).chunk(2, -1))
            product = a * u
            u += 1
            return self.matrix(product)  # type: ignore[no-any-return]

    model = Written()
    attached(model)
    out = model(inputs(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def watched(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_a_module_may_give_anything() -> None:
    class Gives(nn.Module):
        def __init__(self, output: Any) -> None:
            super().__init__()
            self.weight, self.output = nn.Parameter(torch.ones(2)), output

        def forward(self) -> Any:
            return self.output

    for output in ((), [], {}, None, 3, (None, 1)):
        model = Gives(output)
        unmask.attach(model, unmask.id3(1), steps=1, gradients="streaming")
        assert model() is output


def test_what_could_keep_a_product_is_watched() -> None:
    """Not what isn't chosen from, nor PyTorch's norms and embeddings."""
    model = nn.Sequential(nn.Embedding(3, 6), Model("llama"), nn.LayerNorm(3))
    parameters = dict(model.named_parameters())
    assert len(products.watch(model, [*parameters.values()])) == watched(model) == 3
    model = Model("llama")
    tuner = unmask.attach(model, unmask.id3(40), steps=4, gradients="streaming", exclude="part*")
    assert not model.part._forward_hooks
    assert watched(model) == 2
    tuner.detach()
    assert not watched(model)


@pytest.mark.parametrize("gradients", ["streaming", "sampled"])
@pytest.mark.parametrize("form", ["llama", "gated"])
def test_what_is_small_is_kept(form: str, gradients: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It isn't worth the time; a larger batch's is, later on, and between selections."""
    monkeypatch.setattr(products, "LEAST", 4 * 5 * WIDTH * 4)
    model, small, large = Model(form), inputs(0)[:3], inputs(1)
    tuner = attached(model, gradients, schedule=unmask.Strided(every=4))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=1e-2)
    for _step in range(2):
        for x in (small, large):
            assert keeps(model, x) == (x is small)
            optimizer.zero_grad()
        model(large).backward()
        optimizer.step()


def test_what_is_repeated_is_let_be() -> None:
    """It takes the room of one; in its own shape it is the product."""
    x, y = torch.randn(2, 1, 5, WIDTH, requires_grad=True)
    made = products.factors((x * y).expand(1, 5, WIDTH))
    assert made is not None
    assert same_bits(made[0](*made[1]), x * y)
    assert products.factors((x * y).expand(3, 5, WIDTH)) is None


@pytest.mark.parametrize("gradients", ["streaming", "sampled"])
def test_small_attention_is_kept(gradients: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside an output that isn't small; and longer rows' later on."""
    monkeypatch.setattr(products, "LEAST", 4 * 2 * 5 * 5 * 4)
    model, short, long = Model("attention"), torch.randn(5, 4, 6), inputs(1)
    optimizer = attached(model, gradients).optimizer(torch.optim.SGD, lr=1e-2)
    for x in (short, long):
        assert keeps(model, x) == (x is short)
        optimizer.zero_grad()


def test_what_nothing_was_dropped_in_is_looked_at_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = []
    look = products._spare
    monkeypatch.setattr(products, "_spare", lambda node: (looks.append(node), look(node))[1])
    model = Model("attention").eval()
    attached(model)
    for _step in range(3):
        model(inputs(0))
    assert len(looks) == 4  # each module's output once
    assert not keeps(model.train(), inputs(0))
    assert watched(model) == 1


def test_what_shows_none_is_let_be() -> None:
    """Once it has run as it does in training."""
    model = Model("gated")
    tuner = attached(model)
    before = watched(model)
    with torch.no_grad():
        model(inputs(0))
    assert watched(model) == before == 4
    model(inputs(0))
    assert watched(model) == 1
    assert not keeps(model, inputs(0))
    tuner.detach()
    assert not watched(model)
    assert keeps(model, inputs(0))
