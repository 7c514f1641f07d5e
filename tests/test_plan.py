"""The memory planner: foretold bytes are those of real tensors, whatever the architecture."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

import unmask
from unmask import derivatives, intake
from unmask import rows as table_rows
from unmask.cli import app
from unmask.recipes.plan import MODES, PARTS, parse_memory, plan
from unmask.recipes.plan_blank import SAMPLED, TOKENS
from unmask.recipes.plan_meter import Meter
from unmask.recipes.plan_step import TOGETHER

LARGER = {  # more weights than wait for each other when streaming
    "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2048,
}  # fmt: skip


def bert(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertConfig(**{"vocab_size": 200, "intermediate_size": 64} | sizes | changes)


def blank(config):
    with torch.device("meta"):
        return transformers.BertForSequenceClassification(config)


def rows(config, **given):
    found = plan(config, **{"budget": 100, "batch_size": 4, "sequence_length": 8} | given)
    return {row.mode: row for row in found.rows}


def test_parts_are_those_of_the_model():
    config = bert(**LARGER)
    found = rows(config)
    model = blank(config)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    gradients = sum(4 * p.numel() for p in model.parameters())
    assert tuple(found) == MODES
    assert found["full"].weights == found["dense"].weights == weights
    assert found["full"].gradients == found["dense"].gradients == gradients
    largest = max(4 * p.numel() for p in model.parameters())
    head = sum(4 * p.numel() for p in model.classifier.parameters())
    assert TOGETHER <= found["streaming"].gradients <= TOGETHER + largest + head
    assert found["full"].optimizer >= 2 * gradients
    assert found["dense"].optimizer < gradients / 2
    assert found["full"].selection == 0 < found["dense"].selection
    for row in found.values():
        assert max(getattr(row, p) for p in PARTS) < row.peak <= sum(getattr(row, p) for p in PARTS)


TINY_T5 = transformers.T5Config(
    d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=64, vocab_size=200
)
TINY_BART = transformers.BartConfig(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, vocab_size=200,
    decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
)  # fmt: skip


TINY_FALCON = transformers.FalconConfig(  # whose attention has one head of keys
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=200, pad_token_id=0,
    use_cache=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "config", [bert(), TINY_T5, TINY_BART, TINY_FALCON], ids=lambda c: c.model_type
)
def test_activations_are_what_autograd_saves(config):
    """Against the tensors that a real forward pass keeps for its backward."""
    config.decoder_start_token_id = 0
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    ids, labels = torch.full((4, 8), 3), torch.zeros(4, dtype=torch.long)
    if config.is_encoder_decoder:
        ids[:, -1] = config.eos_token_id
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (
            storage.nbytes(),
            tensor,
        )  # alive, so the address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    kept = sum(size for address, (size, _) in saved.items() if address not in own)
    assert loss.requires_grad
    assert kept <= rows(config)["full"].activations <= 1.3 * kept


def test_a_meter_counts_real_tensors():
    with Meter("cpu") as meter:
        x = torch.ones(1000)
        y = x * 2
        assert meter.live.total() == 8000
        view = y[10:]
        assert view.numel() == 990
        del x
        assert meter.live.total() == 4000
        del y
        assert meter.live.total() == 4000  # the view holds it
        del view
    assert meter.live.total() == 0
    assert meter.peak == 8000


def test_a_layer_by_hand():
    """One linear layer, all known: the largest gradient is all there is of them."""
    layer = nn.Linear(64, 32, bias=False)
    with Meter("cpu") as meter:
        meter.add(layer.weight, "weights")
        layer(torch.ones(4, 64)).sum().backward()
        meter.add(layer.weight.grad, "gradients")
    assert meter.most["weights"] == meter.most["gradients"] == 4 * 64 * 32


def test_more_rows_more_activations_and_nothing_else():
    few, many = rows(bert(), batch_size=2), rows(bert(), batch_size=8)
    for mode in MODES:
        assert many[mode].activations > 3 * few[mode].activations
        assert many[mode].weights == few[mode].weights
        assert many[mode].selection == few[mode].selection


def test_bf16_halves_weights_and_gradients():
    wide, narrow = rows(bert())["dense"], rows(bert(), dtype="bf16")["dense"]
    assert narrow.gradients * 2 == wide.gradients
    assert narrow.selection == pytest.approx(wide.selection, rel=0.01)  # masters are float32


def test_fused_attention_keeps_no_matrix():
    """On a CPU dropout prevents it."""
    size = {"batch_size": 2, "sequence_length": 256}
    slow, fused = (rows(bert(), device=d, **size)["dense"] for d in ("cpu", "cuda"))
    assert slow.activations > 1.5 * fused.activations
    without = rows(bert(attention_probs_dropout_prob=0.0), **size)["dense"]
    assert without.activations == pytest.approx(fused.activations, rel=0.05)


def test_attention_with_one_head_of_keys_is_not_fused():
    heads, length = 2 * TINY_FALCON.num_attention_heads, 256  # of two layers
    found = rows(TINY_FALCON, sequence_length=length)["full"]
    assert found.activations > 4 * heads * length * length * 4  # rows, bytes


@pytest.mark.parametrize(
    "config",
    [
        transformers.DebertaV2Config(
            vocab_size=200, relative_attention=True, pos_att_type=["p2c", "c2p"], **LARGER
        ),
        transformers.RobertaConfig(vocab_size=200, **LARGER),
        transformers.LlamaConfig(vocab_size=200, num_key_value_heads=2, **LARGER),
        transformers.GPT2Config(vocab_size=200, n_embd=512, n_layer=2, n_head=4),
        transformers.ViTConfig(image_size=32, **LARGER),
        transformers.T5Config(vocab_size=200, d_model=512, num_layers=2),
        transformers.BartConfig(
            vocab_size=200, d_model=512, encoder_layers=1, decoder_layers=1,
            encoder_ffn_dim=2048, decoder_ffn_dim=2048,
        ),
        transformers.MixtralConfig(
            vocab_size=200, num_key_value_heads=2, num_local_experts=4, **LARGER
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_other_architectures(config):
    found = rows(config)
    assert found["streaming"].peak <= found["dense"].peak
    assert found["dense"].optimizer < found["full"].optimizer
    assert found["streaming"].gradients < found["dense"].gradients
    assert "lora" in found


def test_products_are_not_kept():
    """Where gradients stream, and between selections; full fine-tuning and dense gradients do."""
    config = transformers.LlamaConfig(vocab_size=200, num_key_value_heads=2, **LARGER)
    found = rows(config, sequence_length=64)
    norms, gates = 4 * 512, 2 * LARGER["intermediate_size"]  # of both layers
    again = LARGER["intermediate_size"]  # the last layer's, when backward begins
    products = 4 * 64 * (norms + gates - again) * 4  # rows, tokens, width, bytes
    assert found["full"].activations == found["dense"].activations
    assert found["dense"].activations - found["streaming"].activations == products
    size = {"budget": 2000, "batch_size": 4, "sequence_length": 64}
    resting = plan(config, **size, settings={"schedule.every": "10"}).resting
    assert resting <= found["streaming"].peak


def test_experts():
    """LoRA leaves them alone and keeps nothing for them; streaming keeps what enters their first
    matrices, and not the product that enters the second."""
    config = transformers.MixtralConfig(
        vocab_size=200, num_key_value_heads=2, num_local_experts=2, **LARGER
    )
    found = rows(config, sequence_length=64)
    routed = 2 * 4 * 64  # to two experts each
    outer, inner = routed * 512 * 4, routed * LARGER["intermediate_size"] * 4
    assert found["full"].activations - found["lora"].activations >= 2 * (outer + inner)
    assert found["dense"].activations - found["streaming"].activations >= inner


def test_what_is_known_of_the_modes_is_so():
    assert set(SAMPLED) == set(derivatives.RULES)
    assert (TOGETHER, TOKENS) == (intake.TOGETHER, table_rows.TOKENS)


def test_steps_between_selections():
    """Where nothing is chosen no weight has a gradient; those of a head still do."""
    size = {"budget": 2000, "batch_size": 4, "sequence_length": 8}
    assert plan(bert(), **size).resting is None
    strided = plan(bert(), **size, settings={"schedule.every": "10"})
    sampled = {row.mode: row for row in strided.rows}["sampled"]
    weights = sum(4 * math.prod(shape) for shape in [(200, 32), (512, 32), (2, 32)])
    assert strided.resting < sampled.peak - weights
    before = plan(bert(), "random_mask", **size)
    assert {row.mode: row for row in before.rows}["sampled"].peak == before.resting


def test_what_a_method_chooses_from():
    named = dict(blank(bert()).named_parameters())
    body = {n: p.numel() for n, p in named.items() if not n.startswith("classifier")}
    assert plan(bert(), "id3", 100, 4, 8).eligible == sum(body.values())
    biases = sum(size for n, size in body.items() if n.endswith(".bias"))
    found = plan(bert(), "bitfit", 1.0, 4, 8)
    assert found.eligible == found.budget == biases
    head = sum(p.numel() for n, p in named.items() if n.startswith("classifier"))
    found = plan(bert(), "head", 1.0, 4, 8)
    assert found.eligible == found.budget == head
    rows = {row.mode: row for row in found.rows}
    assert rows["dense"].gradients == 4 * head


def test_what_is_needed_before_training():
    assert plan(bert(), "id3", 100, 4, 8).before is None
    assert "8 bytes x N" in plan(bert(), "fish", 100, 4, 8).before


@pytest.mark.parametrize(
    ("peft", "scalars"),
    [
        ("lora:r=4,target=query", 2 * 2 * 4 * 32),
        ("ia3:target=key,feedforward=key", 2 * 32),
        ("pfeiffer:reduction=16", 2 * (2 * 2 * 32 + 2 + 32)),
    ],
)
def test_inside_other_methods(peft, scalars):
    found = plan(bert(), "id3", 10, 4, 8, peft=peft)
    assert found.eligible == scalars
    rows = {row.mode: row for row in found.rows}
    assert rows["dense"].gradients < rows["full"].gradients / 10
    assert rows["full"].gradients == 4 * sum(p.numel() for p in blank(bert()).parameters())


def test_a_model_without_linear_layers_has_no_row_for_lora():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    assert "lora" not in rows(config)


def test_a_model_that_lora_is_refused_on_has_no_row_for_it():
    config = transformers.MambaConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=1, pad_token_id=0
    )
    assert set(rows(config)) == set(MODES) - {"lora"}


def test_lora_goes_on_subclasses_of_linear_layers():
    assert set(rows(TINY_FALCON)) == set(MODES)


def test_what_fits():
    found = plan(bert(), budget=100, batch_size=4, sequence_length=8)
    peaks = {row.mode: row.peak for row in found.rows}
    assert found.fitting(peaks["dense"]) == tuple(m for m in peaks if peaks[m] <= peaks["dense"])
    assert found.fitting(0) == ()
    assert json.loads(json.dumps(found.to_dict()))["eligible"] < found.parameters


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("1 GiB", 2**30), ("512mb", 512 * 10**6), ("7", 7)]
)
def test_amounts(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"sequence_length": 1000}, "512 positions"),
        ({"peft": "magic:r=8"}, "magic"),
        ({"settings": {"max_steps": "5"}}, "method's own keys"),
        ({"peft": "lora:target=nowhere"}, "called"),
        ({"dtype": "int4"}, "bf16"),
        ({"device": "abacus"}, "cpu, cuda"),
        ({"budget": 10**9}, "exceeds"),
        ({"method": "magic"}, "no method is called"),
    ],
)
def test_mistakes(given, said):
    with pytest.raises(unmask.UnmaskError, match=said):
        rows(bert(), **given)


def test_roberta_counts_from_past_its_padding():
    config = transformers.RobertaConfig(max_position_embeddings=20, num_hidden_layers=1)
    with pytest.raises(unmask.UnmaskError, match="18 positions"):
        rows(config, sequence_length=19)


def test_a_config_that_makes_no_model():
    with pytest.raises(unmask.UnmaskError, match=r"config\.json"):
        rows(bert(hidden_size=33))


@pytest.mark.parametrize("text", ["plenty", "1XB", f"{'9' * 400}GB"], ids=["word", "unit", "huge"])
def test_no_amount(text):
    with pytest.raises(unmask.UnmaskError, match="24GB"):
        parse_memory(text)


def test_the_command_needs_a_config_and_no_weights(tmp_path: Path):
    bert().save_pretrained(tmp_path)
    size = ["--batch-size", "4", "--sequence-length", "8"]
    asked = ["plan", "--model", str(tmp_path), "--method", "id3", "--budget", "100", *size]
    shown = CliRunner().invoke(app, [*asked, "--memory", "1GB"])
    assert shown.exit_code == 0, shown.output
    for word in (*MODES, *PARTS, "peak", "fits in 1GB", "yes"):
        assert word in shown.output
    said = json.loads(CliRunner().invoke(app, [*asked, "--dtype", "bf16", "--json"]).output)
    assert said["budget"] == 100
    assert [row["mode"] for row in said["rows"]] == list(MODES)
    inside = ["--peft", "lora:r=2,target=query", "--method", "fish"]
    inside = [*asked, *inside, "--set", "method.num_samples=8"]
    inside = CliRunner().invoke(app, inside)
    for word in ("fish in lora:r=2,target=query", "steps that choose nothing", "before training"):
        assert word in inside.output
    wrong = CliRunner().invoke(app, ["plan", "--model", str(tmp_path / "nowhere")])
    assert wrong.exit_code == 2
