"""`UnmaskConfig` in scripts as they are written for LoRA, with nothing but the config swapped."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import PeftModel, get_peft_model  # noqa: E402

import unmask  # noqa: E402
from models import NO_DROPOUT, pretrained  # noqa: E402
from unmask.integrations import peft_registration  # noqa: E402
from unmask.integrations.peft import UnmaskConfig  # noqa: E402

pytestmark = [
    # PEFT and transformers about each other, whatever the method
    pytest.mark.filterwarnings("ignore:.*will be removed in v6.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:.*was active which is now deleted"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),  # until 0.21
]
TOKENS = torch.arange(32).reshape(4, 8) % 29
LABELS = torch.tensor([0, 1, 2, 0])
ADAM = {"lr": 1e-2, "weight_decay": 0.1}


def bert(seed: int = 0, **kw: Any) -> nn.Module:
    return pretrained(seed=seed, **kw)


def gpt(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def config(**kw: Any) -> UnmaskConfig:
    return UnmaskConfig(**{"budget": 40, "steps": 6, "task_type": "SEQ_CLS", **kw})


def wrapped(seed: int = 0, **kw: Any) -> PeftModel:
    return get_peft_model(bert(seed), config(**kw))


def loss(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    value: Tensor = model(input_ids=tokens, labels=LABELS[: len(tokens)]).loss
    return value


def train(model: nn.Module, steps: int = 6, optimizer: Any = None) -> Any:
    """A loop as in any LoRA script."""
    model.train()
    if optimizer is None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, **ADAM)
    for step in range(steps):
        loss(model, TOKENS.roll(step, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(input_ids=TOKENS).logits
    return out


def weights(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict().items()
    return {
        k.replace(".original_module", ""): v.clone()
        for k, v in state
        if not k.startswith("unmask.") and ".modules_to_save." not in k
    }


def listed(folder: str | Path) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[PeftModel, str, Tensor]:
    """A trained model, where its adapter was saved, and its logits."""
    model = wrapped()
    train(model)
    model.save_pretrained(str(tmp_path / "out"))
    return model, str(tmp_path / "out"), logits(model)


# Training


def test_it_is_peft_and_counts_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    model = wrapped()
    assert isinstance(model, PeftModel)
    assert isinstance(config(), peft.PeftConfig)
    model.print_trainable_parameters()
    assert "trainable params: 91 " in capsys.readouterr().out  # 40, and the new head's 51
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 3)[-3] for n in names} == {"unmask", "modules_to_save"}


METHODS = {
    "id3": {},
    "strided": {"method_kwargs": {"schedule": unmask.Strided(every=2), "exp": 1.0}},
    "pafi": {"method": "pafi"},
    "random": {"method": "random_mask", "method_kwargs": {"seed": 3}},
    "static": {"method": "static_d3", "budget": 0.01},
    "repeat": {"method": "repeat_d3"},
}


@pytest.mark.parametrize(
    ("name", "clip"), [*((name, False) for name in METHODS), ("id3", True), ("repeat", True)]
)
def test_it_trains_as_attach_does(name: str, clip: bool) -> None:
    """Same choice, same weights, bit for bit, whoever makes the optimiser."""
    model = wrapped(**METHODS[name])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM)
    plain = bert()
    tuner = unmask.attach(
        plain, config(**METHODS[name]).build(), steps=6, train_fully="classifier*"
    )
    other = tuner.optimizer(torch.optim.AdamW, **ADAM)
    for step in range(6):
        for m, o, all_of in ((model, optimizer, model.parameters()), (plain, other, None)):
            m.train()
            torch.manual_seed(step)
            loss(m, TOKENS.roll(step, 1)).backward()
            if clip:
                params = o.param_groups[0]["params"] if all_of is None else all_of
                nn.utils.clip_grad_norm_(params, 0.5)
            o.step()
            o.zero_grad()
    model.eval()
    tuned, delta = model.base_model.delta(), tuner.delta()
    assert tuned.sparse.keys() == delta.sparse.keys()
    for key, part in delta.sparse.items():
        assert torch.equal(part.indices, tuned.sparse[key].indices)
        assert torch.equal(part.values, tuned.sparse[key].values)
    assert tuned.base == delta.base
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("name", ["fish", "lt_sft", "diff_pruning"])
def test_a_method_of_data_chooses_as_attach_does(name: str) -> None:
    batches = [{"input_ids": TOKENS.roll(i, 1), "labels": LABELS} for i in range(2)]
    plain, asked = bert(**NO_DROPOUT), config(method=name)
    tuner = unmask.attach(
        plain, asked.build(), train_fully="classifier*", calibration=copy.deepcopy(batches)
    )
    model = get_peft_model(bert(**NO_DROPOUT), asked)
    with pytest.raises(unmask.UnmaskError, match="needs data before training"):
        loss(model)
    model.base_model.calibrate(batches)
    train(model, 2)
    chosen = {n: part.indices for n, part in model.base_model.delta().sparse.items()}
    expected = tuner.selected()
    assert chosen.keys() == expected.keys()
    assert all(torch.equal(chosen[n], flat) for n, flat in expected.items())


def test_data_is_looked_at_once(tmp_path: Path) -> None:
    """What was chosen from it for good is in the adapter, in this process and a later one."""
    batch = {"input_ids": TOKENS, "labels": LABELS}
    model = wrapped(method="fish")
    model.base_model.calibrate(batch for batch in [batch])
    train(model, 2)
    chosen = model.base_model.delta().sparse
    model.base_model.adapters.to(torch.device("cpu"))  # ends the run for now
    train(model, 2)
    model.save_pretrained(str(tmp_path))
    read = PeftModel.from_pretrained(bert(), str(tmp_path), is_trainable=True)
    train(read, 2)
    for later in (model, read):
        now = later.base_model.delta()
        assert now.sparse.keys() == chosen.keys()
        assert all(torch.equal(now.sparse[n].indices, p.indices) for n, p in chosen.items())


def test_outside_of_a_pass_only_the_vector_requires_a_gradient() -> None:
    model = wrapped()
    before = model.get_nb_trainable_parameters()
    for _ in range(2):
        value = loss(model)
        assert model.get_nb_trainable_parameters() == before
        value.backward()
        assert model.get_nb_trainable_parameters() == before
    eligible = model.base_model.adapters.eligible["default"].tensors
    assert all(p.grad is None and not p.requires_grad for p in eligible)
    assert model.base_model.adapters.unmask_values["default"].grad is not None


def test_an_optimiser_of_all_parameters_moves_only_the_chosen() -> None:
    model = wrapped()
    before = weights(model.get_base_model())
    train(model, optimizer=torch.optim.AdamW(model.parameters(), **ADAM))
    after = weights(model.get_base_model())
    assert sum(int((after[k] != before[k]).sum()) for k in before) <= 40


@pytest.mark.parametrize("gradients", ["streaming", "dense"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_summed_before_the_choice(gradients: str, parts: int) -> None:
    whole, split = wrapped(), wrapped(gradients=gradients)
    for model in (whole, split):
        model.eval()  # no dropout
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            for tokens, labels in (
                [(TOKENS, LABELS)]
                if model is whole
                else zip(TOKENS.chunk(parts), LABELS.chunk(parts), strict=True)
            ):
                share = len(tokens) / len(TOKENS)
                (model(input_ids=tokens, labels=labels).loss * share).backward()
                assert model.base_model.adapters.unmask_values["default"].grad is not None
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(logits(whole), logits(split), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    plain, checkpointed = wrapped(), wrapped()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        train(model, 3)
    assert torch.equal(logits(plain), logits(checkpointed))


def test_a_part_called_past_the_model_trains_too() -> None:
    model = get_peft_model(gpt(), UnmaskConfig(budget=9, steps=2, task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    inner = model.get_base_model().transformer
    for _ in range(2):
        inner(input_ids=TOKENS).last_hidden_state.pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.base_model.delta().active == 9


def test_the_base_may_be_asked_between_forward_and_backward() -> None:
    """As DPO does, for its reference."""
    plain, asked = wrapped(), wrapped()
    for model in (plain, asked):
        torch.manual_seed(0)
        optimizer = train(model, 3)
        model.train()
        value = loss(model)
        if model is asked:
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=TOKENS)
        value.backward()
        optimizer.step()
    assert torch.equal(logits(plain), logits(asked))


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped() -> None:
    model = wrapped()
    optimizer = train(model, 2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    (loss(model) * torch.nan).backward()
    with pytest.warns(unmask.UnmaskWarning, match="skipped"):
        optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    train(model, 4, optimizer)
    assert model.base_model.delta().active == 40


def test_a_gradient_scaler() -> None:
    plain, scaled = wrapped(), wrapped()
    for model in (plain, scaled):
        model.eval()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=model is scaled)
        for _ in range(3):
            scaler.scale(loss(model)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    torch.testing.assert_close(logits(scaled), logits(plain))


def test_a_closure() -> None:
    model = wrapped(method="pafi")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    assert optimizer.step(closure) > optimizer.step(closure)
    assert model.base_model.delta().active == 40


def test_accelerate_accumulates_and_restores(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = wrapped(steps=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = torch.utils.data.DataLoader(Rows(), batch_size=2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    model.train()
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(str(tmp_path))
    expected, adapters = logits(model), model.base_model.adapters
    assert model.base_model.delta().active == 40
    adapters.set_content("default", torch.arange(40), torch.ones(40))
    assert not torch.equal(logits(model), expected)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert same(weights(model.get_base_model()), weights(bert()))


def test_other_precisions() -> None:
    model = get_peft_model(bert().bfloat16(), config())
    before = logits(model)
    train(model)
    assert model.base_model.adapters.unmask_values["default"].dtype == torch.float32
    assert not torch.equal(logits(model), before)
    model.half()
    assert model.base_model.adapters.unmask_values["default"].dtype == torch.float32


def test_a_sequential_and_its_own_parameters() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(3, 3), nn.ReLU()), UnmaskConfig(budget=4, steps=1)
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert model.base_model.delta().active == 4


# Targets


def eligible(**kw: Any) -> set[str]:
    model = get_peft_model(gpt(), UnmaskConfig(budget=5, steps=1, **kw))
    return set(model.base_model.adapters.eligible["default"].names)


def test_targets() -> None:
    everything = eligible()
    assert everything == {n for n, _ in gpt().named_parameters()}  # the tied head once
    assert eligible(target_modules=["c_attn"]) == {n for n in everything if ".c_attn." in n}
    assert eligible(target_modules=r".*\.mlp") == {n for n in everything if ".mlp." in n}
    assert eligible(target_modules="all-linear") == {n for n in everything if ".c_" in n}
    assert eligible(exclude_modules=["wte", "h"]) == {
        "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias",
    }  # fmt: skip
    assert eligible(modules_to_save=["ln_f"]) == everything - {
        "transformer.ln_f.weight", "transformer.ln_f.bias",
    }  # fmt: skip
    assert eligible(method="bitfit") == {n for n in everything if n.endswith("bias")}
    assert eligible(target_modules=["c_attn"], layers_to_transform=[1]) == {
        n for n in everything if ".h.1." in n and ".c_attn." in n
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": None}, "budget"),
        ({"budget": -1}, "budget"),
        ({"method": "lora"}, "id3"),
        ({"method_kwargs": {"rank": 8}}, "rank"),
        ({"gradients": "sampled"}, r"streaming, dense .*unmask\.attach"),
        ({"method_kwargs": {"schedule": {"kind": "Nope"}}}, "Nope"),
        ({"method_kwargs": {"schedule": {"kind": "attach"}}}, "attach"),
        ({"method_kwargs": {"schedule": {"kind": "Strided", "evry": 2}}}, "evry"),
    ],
)
def test_mistakes_in_the_config(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(unmask.UnmaskError, match=message):
        config(**wrong)


def test_mistakes_in_use() -> None:
    with pytest.raises(ValueError, match="target"):
        wrapped(target_modules=["nowhere"])
    with pytest.raises(unmask.UnmaskError, match="exceeds"):
        wrapped(budget=10**9)
    model = wrapped(steps=None)
    with pytest.raises(unmask.UnmaskError, match="UnmaskConfig"):
        train(model, 1)
    model = wrapped(method="pafi")
    muon = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(unmask.UnmaskError, match="Adafactor"):
        train(model, 1, muon)


def test_a_method_of_parts_and_the_config_survives_json(tmp_path: Path) -> None:
    method = unmask.Method(
        unmask.Magnitude(largest=True), unmask.Increment(unmask.Strided(every=3)), 25
    )
    for written in (
        config(method=method, budget=None),
        config(**METHODS["strided"], target_modules=["query", "value"], exclude_modules="x"),
        config(method_kwargs={"schedule": unmask.Custom(), "exp": np.float32(1)}),
    ):
        written.save_pretrained(str(tmp_path))
        read = peft.PeftConfig.from_pretrained(str(tmp_path))
        assert type(read) is UnmaskConfig
        assert read.build() == written.build()
        assert read.target_modules == written.target_modules
    assert config(method=method, budget=None).build() == method


# Files


def test_the_files_hold_the_adapter_only(trained: Any) -> None:
    model, out, _ = trained
    assert {"adapter_config.json", "adapter_model.safetensors"} <= listed(out)
    assert json.loads(Path(out, "adapter_config.json").read_text())["peft_type"] == "UNMASK"
    from safetensors.torch import load_file

    tensors = load_file(Path(out, "adapter_model.safetensors"))
    assert tensors["base_model.model.unmask.unmask_indices"].dtype == torch.int32
    head = sum(t.nbytes for k, t in tensors.items() if ".classifier." in k)
    assert sum(t.nbytes for t in tensors.values()) <= 8 * 40 + 32 + 24 + head
    assert sorted(tensors) == sorted(peft.get_peft_model_state_dict(model))


@pytest.mark.parametrize("low", [False, True])
def test_from_pretrained(trained: Any, low: bool) -> None:
    model, out, expected = trained
    again = PeftModel.from_pretrained(bert(), out, low_cpu_mem_usage=low)
    assert torch.equal(logits(again), expected)
    assert again.get_nb_trainable_parameters()[0] == 0
    with again.disable_adapter():
        base = logits(again)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert same(weights(again.unload()), weights(model.unload()))


def test_auto_classes(tmp_path: Path) -> None:
    gpt().save_pretrained(str(tmp_path / "base"))
    base = transformers.GPT2LMHeadModel.from_pretrained(str(tmp_path / "base"))
    model = get_peft_model(
        base,
        UnmaskConfig(
            budget=0.05, method="pafi", task_type="CAUSAL_LM", target_modules="all-linear"
        ),
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    model.save_pretrained(str(tmp_path / "out"))
    for auto in (peft.AutoPeftModelForCausalLM, transformers.AutoModelForCausalLM):
        again = auto.from_pretrained(str(tmp_path / "out"))
        assert torch.equal(logits(again), logits(model))
    tokens = again.generate(TOKENS[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(
        tokens, model.generate(input_ids=TOKENS[:1], max_new_tokens=3, do_sample=False)
    )


def test_transformers_own_load_adapter(trained: Any, tmp_path: Path) -> None:
    model, out, expected = trained
    other = wrapped(budget=30, target_modules="all-linear", method="pafi")
    train(other)
    other.save_pretrained(str(tmp_path / "two"))
    plain = bert()
    plain.load_adapter(out)
    assert torch.equal(logits(plain), expected)
    plain.load_adapter(str(tmp_path / "two"), "two")
    plain.set_adapter("two")
    assert torch.equal(logits(plain), logits(other))
    plain.set_adapter("default")
    assert torch.equal(logits(plain), expected)
    plain.save_pretrained(str(tmp_path / "again"))
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), str(tmp_path / "again"))), expected)
    plain.disable_adapters()
    with model.disable_adapter():
        assert torch.equal(logits(plain), logits(model))


def test_another_base_is_noticed(trained: Any) -> None:
    with pytest.warns(unmask.UnmaskWarning, match="another base"):
        PeftModel.from_pretrained(bert(seed=1), trained[1])
    with pytest.warns(unmask.UnmaskWarning, match="another base"):
        half = PeftModel.from_pretrained(bert().bfloat16(), trained[1])
    torch.testing.assert_close(logits(half).float(), trained[2], rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda index: index.index_fill(0, torch.tensor([0]), -7), "damaged"),
        (lambda index: index.index_fill(0, torch.tensor([0]), int(index[1])), "damaged"),
        (lambda index: index.index_fill(0, torch.tensor([0]), 10**6), "another model"),
    ],
    ids=["negative", "twice", "too high"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["file", "state dict"])
def test_a_damaged_adapter_is_refused(trained: Any, damage: Any, message: str, whole: bool) -> None:
    from safetensors.torch import load_file, save_file

    model, out, _ = trained
    file = Path(out, "adapter_model.safetensors")
    tensors = model.state_dict() if whole else load_file(file)
    key = next(key for key in tensors if "unmask_indices" in key)
    tensors[key] = damage(tensors[key])
    with pytest.raises(unmask.UnmaskError, match=message):
        if whole:
            wrapped().load_state_dict(tensors)
        else:
            save_file(tensors, file)
            PeftModel.from_pretrained(bert(), out)


def test_the_whole_state_dict_loads_too(trained: Any) -> None:
    model, _, expected = trained
    again = wrapped()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(logits(again), expected)
    with again.disable_adapter(), model.disable_adapter():
        assert torch.equal(logits(again), logits(model))


def test_copies_are_independent(trained: Any) -> None:
    model, _, expected = trained
    twin = copy.deepcopy(model)
    train(twin, 2)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(twin), expected)
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("name", ["id3", "random", "repeat"])
def test_resuming_is_exact(name: str, tmp_path: Path) -> None:
    straight, stopped = wrapped(**METHODS[name]), wrapped(**METHODS[name])
    for model in (straight, stopped):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM)
        model.eval()  # no dropout, so no random numbers
        for step in range(6 if model is straight else 3):
            loss(model, TOKENS.roll(step, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
    stopped.save_pretrained(str(tmp_path))
    state = copy.deepcopy(optimizer.state_dict())
    again = PeftModel.from_pretrained(bert(), str(tmp_path), is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], **ADAM)
    optimizer.load_state_dict(state)
    again.eval()
    for step in range(3, 6):
        loss(again, TOKENS.roll(step, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(logits(again), logits(straight))
    assert again.base_model.delta() == straight.base_model.delta()


@pytest.mark.parametrize("remembers", [True, False])
def test_a_memory_that_no_adapter_holds_is_missed(remembers: bool, tmp_path: Path) -> None:
    heuristic = unmask.Accumulated(unmask.D3()) if remembers else unmask.D3()
    method = unmask.Method(heuristic, unmask.Increment(), 40)
    model = wrapped(method=method, budget=None)
    train(model, 3)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(bert(), str(tmp_path), is_trainable=True)
    if remembers:
        with pytest.warns(
            unmask.UnmaskWarning, match="without what Accumulated remembers of its 3"
        ):
            train(again, 3)
    else:
        train(again, 3)
    assert again.base_model.delta().active == 40


# Several adapters


@pytest.fixture
def two(tmp_path: Path) -> tuple[PeftModel, dict[str, Tensor]]:
    """A model with two trained adapters, and what each gives (and the base)."""
    known, paths = {}, {}
    for name, seed in (("one", 1), ("two", 2)):
        model = get_peft_model(bert(), config(method="random_mask", method_kwargs={"seed": seed}))
        train(model)
        model.save_pretrained(str(tmp_path / name))
        known[name], paths[name] = logits(model), str(tmp_path / name)
    with model.disable_adapter():
        known["base"] = logits(model)
    model = PeftModel.from_pretrained(bert(), paths["one"], adapter_name="one")
    model.load_adapter(paths["two"], adapter_name="two")
    return model, known


def test_switching_touches_nothing_else(two: Any) -> None:
    model, known = two
    base, spots = weights(bert()), {}
    for name in ("one", "two"):
        spots[name] = {k: v.indices for k, v in model.base_model.delta(name).sparse.items()}
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(logits(model), known[name])
        now = weights(model.get_base_model())
        for key, tensor in base.items():
            changed = (now[key] != tensor).flatten().nonzero().flatten()
            if not key.startswith("classifier"):
                assert set(changed.tolist()) <= set(spots[name].get(key, torch.empty(0)).tolist())
        with model.disable_adapter():
            assert torch.equal(logits(model), known["base"])
            assert same(weights(model.get_base_model()), base)


def test_deleting(two: Any) -> None:
    model, known = two
    model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    assert torch.equal(logits(model), known["two"])
    with model.disable_adapter():
        assert torch.equal(logits(model), known["base"])


def test_merging(two: Any, tmp_path: Path) -> None:
    model, known = two
    model.merge_adapter(["one"])
    assert torch.equal(logits(model), known["one"])
    model.unmerge_adapter()
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(bert())
    assert merged.state_dict().keys() == bert().state_dict().keys()
    assert torch.equal(logits(merged), known["one"])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in merged.modules())
    merged.save_pretrained(str(tmp_path / "merged"))
    again = type(merged).from_pretrained(str(tmp_path / "merged"))
    assert torch.equal(logits(again), known["one"])


def test_unloading(two: Any) -> None:
    model, _ = two
    plain = {k: v for k, v in weights(model.unload()).items() if not k.startswith("classifier")}
    assert same(plain, {k: v for k, v in weights(bert()).items() if not k.startswith("classifier")})


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = wrapped()
    train(model)
    with torch.no_grad():
        model.base_model.adapters.unmask_values["default"][0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        model.merge_and_unload(safe_merge=True)


@pytest.fixture
def headless() -> PeftModel:
    """Two adapters, trained in turn, that save no module whole."""
    model = get_peft_model(gpt(), UnmaskConfig(budget=30, steps=3), adapter_name="one")
    model.add_adapter("two", UnmaskConfig(budget=20, method="random_mask"))
    for name in ("one", "two"):
        model.set_adapter(name)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(3):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def changes(model: PeftModel, name: str) -> dict[str, Tensor]:
    model.set_adapter(name)
    base, now = weights(gpt()), weights(model.get_base_model())
    return {k: now[k] - base[k] for k in base}


def test_weighted_adapters(headless: PeftModel) -> None:
    model = headless
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both", combination_type="linear")
    one, two, both = (changes(model, name) for name in ("one", "two", "both"))
    for key in both:
        torch.testing.assert_close(both[key], 0.5 * one[key] + 2 * two[key], atol=1e-6, rtol=1e-4)
    assert model.get_nb_trainable_parameters()[0] == model.base_model.delta("both").active
    for kind in ("ties", "dare_ties", "dare_linear", "magnitude_prune"):
        model.add_weighted_adapter(["one", "two"], [1, 1], kind, combination_type=kind, density=0.5)
        model.set_adapter(kind)
    with model.disable_adapter():
        assert same(weights(model.get_base_model()), weights(gpt()))
    with pytest.raises(unmask.UnmaskError, match="three"):
        model.add_weighted_adapter(["one", "three"], [1, 1], "x")
    with pytest.raises(unmask.UnmaskError, match="density"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "x", combination_type="ties")


def test_two_in_force_at_once_add_up(headless: PeftModel) -> None:
    model = headless
    one, two = (changes(model, name) for name in ("one", "two"))
    model.base_model.set_adapter(["one", "two"])
    base, now = weights(gpt()), weights(model.get_base_model())
    for key in base:
        expected = base[key] + one[key] + two[key]
        torch.testing.assert_close(now[key], expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(unmask.UnmaskError, match="set_adapter"):
        model.train()(input_ids=TOKENS)


def test_a_delta_is_not_taken_for_an_adapter(headless: PeftModel, tmp_path: Path) -> None:
    headless.base_model.delta("one").save(tmp_path)
    with pytest.raises(unmask.UnmaskError, match=r"unmask\.Delta"):
        PeftModel.from_pretrained(gpt(), str(tmp_path))


@pytest.mark.parametrize("kind", ["unmask", "lora"])
def test_an_adapter_is_not_taken_for_a_delta(kind: str, tmp_path: Path) -> None:
    own = kind == "unmask"
    asked = config(steps=1) if own else peft.LoraConfig(r=2, target_modules=["query"])
    get_peft_model(bert(), asked).save_pretrained(str(tmp_path))
    remedy = f"PEFT adapter of type {kind.upper()}.*PeftModel.from_pretrained"
    with pytest.raises(unmask.UnmaskError, match=remedy) as refused:
        unmask.Delta.load(tmp_path)
    assert ("base_model.delta()" in str(refused.value)) == own


def test_the_adapter_as_a_delta(headless: PeftModel) -> None:
    plain = gpt()
    headless.set_adapter("one")
    undo = headless.base_model.delta("one").apply(plain)
    assert torch.equal(logits(plain), logits(headless))
    undo.apply(plain)
    assert same(weights(plain), weights(gpt()))


# Trainers


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": (TOKENS[i % 4] + i) % 29, "labels": LABELS[i % 4]}


def trainer(model: nn.Module, out: Path, **kw: Any) -> Any:
    args = transformers.TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2,
        report_to=[], logging_steps=1, disable_tqdm=True, use_cpu=True, save_steps=3, seed=0,
        **kw,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=args, train_dataset=Rows())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stock_trainer(tmp_path: Path, accumulation: int) -> None:
    """No optimiser, no callback, no steps: and it saves adapters only, and resumes exactly."""
    runs = []
    for resume in (False, True):
        model = wrapped(steps=None)
        run = trainer(model, tmp_path, gradient_accumulation_steps=accumulation)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        runs.append(logits(model))
        assert model.base_model.delta().active == 40
    assert torch.equal(*runs)
    files = listed(tmp_path / "checkpoint-6")
    assert "adapter_model.safetensors" in files
    assert not {"model.safetensors", "pytorch_model.bin"} & files
    norms = [log["grad_norm"] for log in run.state.log_history if "grad_norm" in log]
    assert all(norm > 0 for norm in norms)
    state = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert sum(t.numel() for s in state["state"].values() for t in s.values()) < 2 * 91 + 9
    again = PeftModel.from_pretrained(bert(), str(tmp_path / "checkpoint-6"))
    assert torch.equal(logits(again), runs[0])


def test_a_trainer_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pass ends a step, no two weights' gradients are held at once."""
    model = wrapped()
    run, held = trainer(model, tmp_path, gradient_accumulation_steps=2), []
    from unmask.integrations.peft_run import Run

    end = Run._end

    def count(self: Run) -> None:
        held.append(len(self.tuner._driver.intake._held))
        end(self)

    monkeypatch.setattr(Run, "_end", count)
    run.train()
    assert len(held) == 12
    assert all(
        first > 30 and second == 0 for first, second in zip(held[::2], held[1::2], strict=True)
    )


def test_a_loop_after_a_trainer_that_ended_within_an_epoch(tmp_path: Path) -> None:
    """Of which accelerate goes on saying that each pass ends a step."""
    run = trainer(wrapped(), tmp_path, gradient_accumulation_steps=1)
    run.args.max_steps = 5  # of 4 in an epoch
    run.train()
    state = run.accelerator.gradient_state
    assert state.in_dataloader
    assert state.sync_gradients
    test_accumulated_gradients_are_summed_before_the_choice("streaming", 2)
    run.train()  # and it begins anew
    assert state.in_dataloader


def test_sft(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": (TOKENS[i % 4] + i).remainder(29).tolist()} for i in range(8)]
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, save_steps=3, learning_rate=1e-2, bf16=False,
        max_length=16, logging_steps=1,
    )  # fmt: skip
    run = trl.SFTTrainer(
        model=gpt(), args=args, train_dataset=datasets.Dataset.from_list(rows),
        peft_config=UnmaskConfig(budget=25, task_type="CAUSAL_LM"), processing_class=tokenizer(),
    )  # fmt: skip
    run.train()
    assert isinstance(run.model, PeftModel)
    files = listed(tmp_path / "checkpoint-3")
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    again = PeftModel.from_pretrained(gpt(), str(tmp_path / "checkpoint-3"))
    assert again.base_model.delta().active == 25
    assert torch.equal(logits(again), logits(run.model))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", *map(str, range(27))])}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "</s>")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>",
    )  # fmt: skip


def test_push_to_hub(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a hub that is a folder on this machine."""
    import shutil

    from huggingface_hub import HfApi, RepoUrl

    def create(_: HfApi, repo_id: str, **__: Any) -> RepoUrl:
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload(_: HfApi, *, operations: Any, **__: Any) -> None:
        for operation in operations:
            (tmp_path / "hub").mkdir(exist_ok=True)
            shutil.copy(operation.path_or_fileobj, tmp_path / "hub" / operation.path_in_repo)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no card up there
    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "create_commit", upload)
    model, _, expected = trained
    model.push_to_hub("me/adapter")
    again = PeftModel.from_pretrained(bert(), str(tmp_path / "hub"))
    assert torch.equal(logits(again), expected)


# Registration


@pytest.mark.parametrize("version", ["0.19.1", "0.31.0", "1.0.0"])
def test_a_peft_never_tried_is_refused(version: str) -> None:
    with pytest.raises(unmask.UnmaskError, match=r"0\.20"):
        peft_registration.check(version)


def test_a_peft_that_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(**_: Any) -> None:
        raise TypeError("register_peft_method() takes other arguments now")

    monkeypatch.setattr("peft.utils.register_peft_method", changed)
    with pytest.raises(unmask.UnmaskError, match="other arguments now"):
        peft_registration.register("other", UnmaskConfig, object, "other_")


def test_the_new_type_is_a_member_like_any() -> None:
    kind = peft.PeftType("UNMASK")
    assert kind is peft.PeftType.UNMASK is peft.PeftType["UNMASK"]
    assert kind in list(peft.PeftType)
    assert copy.deepcopy(kind) is kind
    assert kind == "UNMASK"
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind] is UnmaskConfig


def test_lora_is_left_alone() -> None:
    model = get_peft_model(
        bert(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    )
    train(model, 2)
    assert model.get_nb_trainable_parameters()[0] > 0


OTHER = os.environ.get("UNMASK_OTHER_PEFT")


@pytest.mark.skipif(not OTHER, reason="set UNMASK_OTHER_PEFT to a folder with another peft")
def test_another_peft() -> None:
    """This and `test_inside` again, with the peft installed by `pip install --target FOLDER`."""
    path = os.pathsep.join(filter(None, [OTHER, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "UNMASK_OTHER_PEFT": ""}
    files = [__file__, str(Path(__file__).with_name("test_inside.py"))]
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
