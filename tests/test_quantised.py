"""A base in 4, 8 or 16 bits under LoRA, whose scalars are trained; those of 4 and 8 are refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unmask
from models import NO_DROPOUT, pretrained

TOKENS = torch.arange(32).reshape(4, 8) % 29
LABELS = torch.tensor([0, 1, 2, 0])
BITS: dict[str, dict[str, Any]] = {
    "4-bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "8-bit": {"load_in_8bit": True},
}
bitsandbytes = pytest.mark.parametrize("bits", BITS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("base")
    model: Any = pretrained(hidden_size=64, intermediate_size=64, **NO_DROPOUT)
    model.save_pretrained(path)
    return str(path)


def quantised(folder: str, bits: str) -> Any:
    pytest.importorskip("bitsandbytes", reason="4 and 8-bit bases need bitsandbytes")
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForSequenceClassification.from_pretrained(
        folder,
        quantization_config=transformers.BitsAndBytesConfig(
            **BITS[bits], llm_int8_skip_modules=["classifier"]
        ),
    )
    assert model.bert.encoder.layer[0].attention.self.query.weight.dtype.itemsize == 1
    return model


def lora(folder: str, bits: str, seed: int = 1) -> nn.Module:
    """LoRA over the quantised base, drawn as a process of that seed would."""
    peft = pytest.importorskip("peft")
    model = quantised(folder, bits)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    model.train()
    for step in steps:
        model(input_ids=TOKENS.roll(step, 1), labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=TOKENS).logits
    return out


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


QUIET = [
    pytest.mark.filterwarnings("ignore:.*will be removed in v6.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]


class TestLora:
    pytestmark = QUIET

    @bitsandbytes
    @pytest.mark.parametrize("gradients", ["dense", "streaming", "sampled"])
    def test_over_a_quantised_base(
        self, bits: str, gradients: str, folder: str, tmp_path: Path
    ) -> None:
        model = lora(folder, bits)
        before = state(model)
        tuner = unmask.attach(model, unmask.id3(budget=30), steps=4, gradients=gradients)
        assert all(".lora_" in name for name in tuner.eligible.names)
        optimizer = tuner.optimizer(torch.optim.AdamW, lr=0.05)
        train(model, optimizer, range(4))
        after = state(model)
        changed = {n: int((after[n] != before[n]).sum()) for n in before}
        assert 0 < sum(changed.values()) <= tuner.active == 30
        assert all(".lora_" in name for name, count in changed.items() if count)

        delta = tuner.delta()
        assert all(".lora_" in name for name in (*delta.sparse, *delta.full))
        delta.save(tmp_path)
        other = lora(folder, bits, seed=2)
        drawn = state(other)
        undo = unmask.Delta.load(tmp_path).apply(other)
        assert torch.equal(logits(other), logits(model))
        undo.apply(other)
        assert all(torch.equal(p, drawn[n]) for n, p in state(other).items() if ".lora_" in n)

    @bitsandbytes
    def test_resuming_is_exact(self, bits: str, folder: str) -> None:
        models = [lora(folder, bits), lora(folder, bits), lora(folder, bits, seed=2)]
        tuners = [unmask.attach(m, unmask.id3(budget=30), steps=4) for m in models]
        straight, stopped, again = (t.optimizer(torch.optim.AdamW, lr=0.05) for t in tuners)
        train(models[0], straight, range(4))
        train(models[1], stopped, range(2))
        tuners[2].load_state_dict(tuners[1].state_dict())
        again.load_state_dict(copy.deepcopy(stopped.state_dict()))
        train(models[2], again, range(2, 4))
        assert torch.equal(logits(models[0]), logits(models[2]))
        assert tuners[0].delta() == tuners[2].delta()

    @bitsandbytes
    def test_what_the_quantised_weights_are_passed_over_for(self, bits: str, folder: str) -> None:
        """The rest of such a model may be trained without LoRA, too: biases, say."""
        model = quantised(folder, bits)
        tuner = unmask.attach(model, unmask.bitfit(), include="*.layer.*")
        assert all(name.endswith("bias") for name in tuner.eligible.names)
        with pytest.raises(unmask.UnmaskError, match=r"LoRA.*in bfloat16"):
            unmask.attach(quantised(folder, bits), unmask.id3(budget=3), include="*.query.weight")

    @bitsandbytes
    def test_inside_peft_too(self, bits: str, folder: str) -> None:
        peft = pytest.importorskip("peft")
        from unmask.integrations.peft import UnmaskConfig

        model = peft.get_peft_model(quantised(folder, bits), UnmaskConfig(budget=9, steps=1))
        assert not any(
            name.endswith("query.weight")
            for name in model.base_model.adapters.eligible["default"].names
        )


class TestHalf:
    pytestmark = QUIET

    @pytest.mark.parametrize("own", [True, False])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_lora_over_it(self, dtype: torch.dtype, own: bool, folder: str, tmp_path: Path) -> None:
        """LoRA in float32, as PEFT has it if not told otherwise, or in the base's dtype."""
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")

        def make(seed: int) -> Any:
            model = transformers.BertForSequenceClassification.from_pretrained(folder, dtype=dtype)
            torch.manual_seed(seed)
            config = peft.LoraConfig(r=4, target_modules=["query", "value"])
            return peft.get_peft_model(model, config, autocast_adapter_dtype=own)

        model = make(1)
        tuner = unmask.attach(model, unmask.id3(budget=30), steps=4)
        assert {p.dtype for p in tuner.eligible.tensors} == {torch.float32 if own else dtype}
        optimizer = tuner.optimizer(torch.optim.AdamW, lr=0.05, eps=1e-6)
        train(model, optimizer, range(4))
        assert tuner.slots.values.dtype == torch.float32
        table = tuner.slots
        masters = table.values.detach()[table.position]
        rounded = masters if own else masters.to(dtype).float()
        assert torch.equal(table.read(table.index), rounded)
        assert own or not torch.equal(masters, rounded)
        tuner.delta().save(tmp_path)
        other = make(2)
        unmask.Delta.load(tmp_path).apply(other)
        assert torch.equal(logits(other), logits(model))


class Packed(Tensor):
    """A weight in a format of its own that says its dtype is a float's, as torchao's."""


def packed() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(torch.ones(4, 4).as_subclass(Packed))
    return model


def test_a_weight_in_a_format_of_its_own_is_passed_over_or_refused() -> None:
    tuner = unmask.attach(packed(), unmask.pafi(budget=3))
    assert tuner.eligible.names == ("0.weight", "0.bias")
    for asked in ({"include": "1.*"}, {"include": ["0.*", "1.weight"]}, {"train_fully": "*"}):
        with pytest.raises(unmask.UnmaskError, match=r"'1\.weight' \(Packed, .*LoRA"):
            unmask.attach(packed(), unmask.pafi(budget=3), **asked)
    with pytest.raises(unmask.UnmaskError, match=r"no parameter is eligible.*LoRA"):
        unmask.attach(packed(), unmask.pafi(budget=3), exclude="0.*")


def test_nor_does_peft_reach_such_a_weight() -> None:
    peft = pytest.importorskip("peft")
    from unmask.integrations.peft import UnmaskConfig

    model = peft.get_peft_model(packed(), UnmaskConfig(budget=3, steps=1))
    assert model.base_model.adapters.eligible["default"].names == ("0.weight", "0.bias")
    with pytest.raises(unmask.UnmaskError, match=r"no parameter is eligible.*LoRA"):
        peft.get_peft_model(packed(), UnmaskConfig(budget=3, steps=1, target_modules=["1"]))
