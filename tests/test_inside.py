"""Selection inside other methods' modules: LoRA and its kin, bottleneck adapters.

What a run over a fresh module leaves must give the same model in another process, whose modules are
drawn from another seed.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unmask
from models import MLP, SIZES, pretrained
from unmask.integrations import adapters
from unmask.integrations.adalora import follow_ranks

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*will be removed in v6.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),  # until PEFT 0.21
]
TOKENS = torch.arange(32).reshape(4, 8) % 29
LABELS = torch.tensor([0, 1, 2, 0])
SEED = 1
QV = {"target_modules": ["query", "value"]}


def base(name: str = "Bert") -> nn.Module:
    model = pretrained(name)
    torch.manual_seed(SEED)
    return model.eval()  # no dropout


def in_peft(config: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: peft.get_peft_model(base(), config()).eval()


def in_adapters(kind: Any, name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = base(name)
        adapters.add(model, kind, reduction=4)
        return model

    return make


MODULES: dict[str, Callable[[], nn.Module]] = {
    "lora": in_peft(lambda: peft.LoraConfig(r=4, **QV)),
    "lora-all-linear": in_peft(lambda: peft.LoraConfig(r=16, target_modules="all-linear")),
    "dora": in_peft(lambda: peft.LoraConfig(r=2, use_dora=True, **QV)),
    "adalora": in_peft(lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=8, **QV)),
    "ia3": in_peft(lambda: peft.IA3Config(**QV, feedforward_modules=[])),
    "pfeiffer-bert": in_adapters("pfeiffer", "Bert"),
    "houlsby-bert": in_adapters("houlsby", "Bert"),
    "houlsby-roberta": in_adapters("houlsby", "Roberta"),
}
METHODS = {
    "id3": unmask.id3(budget=30),
    "static": unmask.static_d3(budget=30),
    "pafi": unmask.pafi(budget=30),
    "random": unmask.random_mask(budget=30),
}


def build(name: str, seed: int = 1) -> nn.Module:
    """The model, its modules drawn as a process of that seed would; the base is always the same."""
    global SEED
    SEED = seed
    return MODULES[name]()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=TOKENS).logits
    return out


def train(model: nn.Module, tuner: unmask.Tuner, steps: int = 4, done: Any = None) -> Any:
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=0.05)
    for step in range(steps):
        model(input_ids=TOKENS.roll(step, 1), labels=LABELS).loss.backward()
        optimizer.step()
        if done is not None:
            done(step)
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODULES)
def test_the_delta_gives_the_same_model_in_another_process(
    name: str, method: str, tmp_path: Path
) -> None:
    model = build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuner = unmask.attach(model, METHODS[method], steps=4)
    train(model, tuner)
    assert tuner.active == 30
    changed = sum(int((v != before[k]).sum()) for k, v in model.state_dict().items())
    assert 0 < changed <= 30
    tuner.delta().save(tmp_path)
    other = build(name, seed=2)
    drawn = {k: v.clone() for k, v in other.state_dict().items()}
    undo = unmask.Delta.load(tmp_path).apply(other)
    assert torch.equal(logits(other), logits(model))
    undo.apply(other)
    assert all(torch.equal(v, drawn[k]) for k, v in other.state_dict().items())
    tuner.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["lora", "adalora", "houlsby-bert"])
def test_resuming_in_another_process(name: str) -> None:
    straight, stopped = build(name), build(name)
    tuner = unmask.attach(straight, unmask.id3(budget=30), steps=4)
    train(straight, tuner)
    half = unmask.attach(stopped, unmask.id3(budget=30), steps=4)
    optimizer = train(stopped, half, 2)
    again = build(name, seed=2)
    rest = unmask.attach(again, unmask.id3(budget=30), steps=4)
    rest.load_state_dict(half.state_dict())
    other = rest.optimizer(torch.optim.AdamW, lr=0.05)
    other.load_state_dict(optimizer.state_dict())
    for step in (2, 3):
        again(input_ids=TOKENS.roll(step, 1), labels=LABELS).loss.backward()
        other.step()
        other.zero_grad()
    assert torch.equal(logits(again), logits(straight))


def test_what_began_as_a_constant_is_in_the_delta_by_scalars_only() -> None:
    model = build("lora")
    tuner = unmask.attach(model, unmask.id3(budget=30), steps=4)
    train(model, tuner)
    delta = tuner.delta()
    assert {n.split(".")[-3] for n in delta.full} == {"lora_A"}
    assert all("lora_B" in n for n in delta.sparse)
    assert sum(row.changed for row in delta.tensors) <= 30


def test_a_trained_lora_may_be_saved_by_peft(tmp_path: Path) -> None:
    model = build("lora")
    train(model, unmask.attach(model, unmask.id3(budget=30), steps=4))
    model.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    assert torch.equal(logits(again), logits(model))


# AdaLoRA


def pruned(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() == 0 for n, p in model.named_parameters() if "lora_E" in n}


def adalora(budget: int | float = 0.9, **kw: Any) -> tuple[nn.Module, unmask.Tuner, Any]:
    """Train with ranks moving; returns what was pruned right after each allocation."""
    config = peft.AdaLoraConfig(
        init_r=4, target_r=1, total_step=10, tinit=1, tfinal=3, deltaT=1, **QV
    )
    model = peft.get_peft_model(base(), config).eval()
    tuner = unmask.attach(model, unmask.static_d3(budget=budget), **kw)
    follow_ranks(tuner)
    seen: list[dict[str, Tensor]] = []

    def allocate(step: int) -> None:
        model.base_model.update_and_allocate(step)
        seen.append(pruned(model))

    train(model, tuner, 10, allocate)
    return model, tuner, seen


def test_what_adalora_prunes_is_pruned() -> None:
    model, tuner, seen = adalora()
    assert sum(int(zero.sum()) for zero in seen[-1].values()) == 16 - 4  # target_r of 4 modules
    table = tuner.slots
    values = table.values.detach()[table.position]
    assert torch.equal(values, table.read(table.index))  # the masters follow
    kept = {n: torch.tensor(p) for n, p in model.peft_config["default"].rank_pattern.items()}
    for name, zero in pruned(model).items():
        key = next(k for k in kept if name.endswith(k))
        assert torch.equal(~zero.flatten(), kept[key])


def test_adalora_rebuilds_too(tmp_path: Path) -> None:
    model, tuner, _ = adalora()
    tuner.delta().save(tmp_path)
    other = build("adalora", seed=2)
    unmask.Delta.load(tmp_path).apply(other)
    assert torch.equal(logits(other), logits(model))
    tuner.detach()
    assert "update_and_allocate" not in vars(model.base_model)


def test_adalora_needs_dense_gradients() -> None:
    with pytest.raises(unmask.UnmaskError, match="gradients='dense'"):
        adalora(gradients="streaming")
    with pytest.raises(unmask.UnmaskError, match="AdaLoRA"):
        follow_ranks(unmask.attach(base(), unmask.pafi(budget=3)))


def test_following_twice_is_following() -> None:
    model = MODULES["adalora"]()
    tuner = unmask.attach(model, unmask.id3(budget=4), steps=1)
    for _ in range(2):
        follow_ranks(tuner)
    tuner.detach()
    assert "update_and_allocate" not in vars(model.base_model)


def test_modules_of_another_size_are_refused() -> None:
    first, second = (
        peft.get_peft_model(MLP.build(), peft.LoraConfig(r=r, target_modules=["first"]))
        for r in (2, 3)
    )
    tuners = [unmask.attach(model, unmask.id3(budget=9), steps=1) for model in (first, second)]
    optimizer = tuners[0].optimizer(torch.optim.SGD, lr=1.0)
    MLP.loss(first, 0).backward()
    optimizer.step()
    with pytest.raises(unmask.UnmaskError, match=r"a model of its base's sizes"):
        tuners[1].adopt(tuners[0].delta())


# Bottleneck adapters


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "DistilBert"])
def test_where_they_are(name: str) -> None:
    small = SIZES
    if name == "DistilBert":
        small = {"vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**small))
    frozen = model.state_dict().keys()
    one = adapters.add(model, "pfeiffer", reduction=4)
    assert len(one) == 2
    assert frozen <= model.state_dict().keys()  # the base keeps its names
    assert all("_adapter." in n for n, p in model.named_parameters() if p.requires_grad)
    adapters.remove(model)
    assert model.state_dict().keys() == frozen
    assert len(adapters.add(model, "houlsby")) == 4


def test_they_act_where_they_are() -> None:
    model = base()
    plain = logits(model)
    adapters.add(model, "houlsby", reduction=2, std=0.5)
    assert not torch.allclose(logits(model), plain)
    adapters.remove(model)
    assert torch.equal(logits(model), plain)
    adapters.add(model, "pfeiffer", std=0.0)  # nothing yet: the identity
    assert torch.equal(logits(model), plain)


def test_a_copy_has_adapters_of_its_own() -> None:
    model = base()
    adapters.add(model, std=0.5)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "_adapter.up" in name:
                parameter.zero_()
    assert torch.equal(logits(twin), logits(base()))
    assert not torch.equal(logits(twin), logits(model))


def test_a_decoder_and_layers_by_name() -> None:
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    assert [n.rsplit(".", 2)[1] for n in adapters.add(model, "houlsby")] == ["attn", "mlp"] * 2
    adapters.remove(model)
    assert len(adapters.add(model, after="*.h.1.mlp.c_fc")) == 1
    assert model.transformer.h[1].mlp.c_fc_adapter.up.out_features == 64
    others = nn.ModuleDict({"bag": nn.EmbeddingBag(3, 4), "norm": nn.LayerNorm(4)})
    assert adapters.add(nn.ModuleDict({**others, "end": nn.Linear(4, 4)}), after="*") == ["end"]
    model(input_ids=TOKENS).logits.sum().backward()


def test_mistakes_with_adapters() -> None:
    model = base()
    with pytest.raises(unmask.UnmaskError, match="after="):
        adapters.add(nn.Linear(2, 2))
    with pytest.raises(unmask.UnmaskError, match="houlsby"):
        adapters.add(model, "parallel")
    with pytest.raises(unmask.UnmaskError, match="reduction"):
        adapters.add(model, reduction=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    adapters.add(model)
    with pytest.raises(unmask.UnmaskError, match="already"):
        adapters.add(model)
