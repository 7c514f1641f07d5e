"""The memory planner: foretold bytes are those of real tensors, whatever the architecture."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

import unmask
from unmask.cli import app
from unmask.recipes.plan import MODES, PARTS, Meter, parse_memory, plan


def bert(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertConfig(vocab_size=200, intermediate_size=64, **sizes | changes)


def rows(config, **given):
    found = plan(config, **{"budget": 100, "batch_size": 4, "sequence_length": 8} | given)
    return {row.mode: row for row in found.rows}


def test_parts_are_those_of_the_model():
    found = rows(bert())
    model = transformers.BertForSequenceClassification(bert())
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    gradients = sum(4 * p.numel() for p in model.parameters())
    largest = max(4 * p.numel() for p in model.parameters())
    assert tuple(found) == MODES
    assert found["full"].weights == found["dense"].weights == weights
    assert found["full"].gradients == found["dense"].gradients == gradients
    head = sum(4 * p.numel() for p in model.classifier.parameters())
    assert largest <= found["streaming"].gradients <= largest + head
    assert found["full"].optimizer >= 2 * gradients
    assert found["dense"].optimizer < gradients / 2
    assert found["full"].selection == 0 < found["dense"].selection
    for row in found.values():
        assert max(getattr(row, p) for p in PARTS) < row.peak <= sum(getattr(row, p) for p in PARTS)


def test_activations_are_what_autograd_saves():
    """Against the tensors that a real forward pass keeps for its backward."""
    model = transformers.BertForSequenceClassification(bert())
    ids, labels = torch.zeros(4, 8, dtype=torch.long), torch.zeros(4, dtype=torch.long)
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
        loss = model(input_ids=ids, labels=labels).loss
    kept = sum(size for address, (size, _) in saved.items() if address not in own)
    assert loss.requires_grad
    assert kept <= rows(bert())["full"].activations <= 1.3 * kept


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


@pytest.mark.parametrize(
    "config",
    [
        transformers.DebertaV2Config(
            vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, relative_attention=True, pos_att_type=["p2c", "c2p"],
        ),
        transformers.RobertaConfig(
            vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64,
        ),
        transformers.LlamaConfig(
            vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=64,
        ),
        transformers.GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=2),
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            image_size=32,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_other_architectures(config):
    found = rows(config)
    assert found["streaming"].peak < found["dense"].peak
    assert found["dense"].optimizer < found["full"].optimizer
    assert found["streaming"].gradients < found["dense"].gradients
    assert "lora" in found


def test_a_model_without_linear_layers_has_no_row_for_lora():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    assert "lora" not in rows(config)


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
        ({"dtype": "int4"}, "bf16"),
        ({"device": "abacus"}, "cpu, cuda"),
        ({"budget": 10**9}, "exceeds"),
        ({"method": "magic"}, "no method is called"),
    ],
)
def test_mistakes(given, said):
    with pytest.raises(unmask.UnmaskError, match=said):
        rows(bert(), **given)


def test_no_amount():
    with pytest.raises(unmask.UnmaskError, match="24GB"):
        parse_memory("plenty")


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
    wrong = CliRunner().invoke(app, ["plan", "--model", str(tmp_path / "nowhere")])
    assert wrong.exit_code == 2
