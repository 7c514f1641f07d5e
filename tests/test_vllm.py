"""Patches do to a server's weights what `apply` does to a model; the merged model goes round."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from unmask.delta import Delta, Sparse, fingerprint
from unmask.errors import UnmaskError
from unmask.integrations.vllm import Patch, patches

transformers = pytest.importorskip("transformers")


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def delta_of(base: nn.Module, **rest) -> Delta:
    generator = torch.Generator().manual_seed(1)
    before, after = {}, {}
    for name, p in base.named_parameters():
        at = torch.rand(p.numel(), generator=generator).lt(0.2).nonzero().squeeze(1)
        before[name] = Sparse(p.shape, at, p.detach().view(-1)[at])
        after[name] = Sparse(p.shape, at, torch.randn(len(at), generator=generator).to(p.dtype))
    return Delta(after, base=fingerprint(before), **rest)


@dataclass
class Server:
    """As vLLM keeps a Llama: projections of one input fused, embeddings tied, any dtype; its loader
    copies a checkpoint's tensor to where it belongs, and NaN marks what stays."""

    weights: dict[str, Tensor]

    FUSED: ClassVar = {
        "q_proj": "qkv",
        "k_proj": "qkv",
        "v_proj": "qkv",
        "gate_proj": "up",
        "up_proj": "up",
    }

    @classmethod
    def of(cls, base: nn.Module, dtype: torch.dtype) -> "Server":
        groups: dict[str, list[Tensor]] = {}
        for name, p in base.named_parameters():
            groups.setdefault(cls.home(name), []).append(p.detach().to(dtype))
        return cls({name: torch.cat(parts) for name, parts in groups.items()})

    @classmethod
    def home(cls, name: str) -> str:
        for part, fused in cls.FUSED.items():
            if f".{part}." in name:
                return name.replace(part, fused)
        return name

    def take(self, sent: Iterable[Patch], base: nn.Module) -> None:
        sent = {patch.name: patch for patch in sent}
        starts: dict[str, int] = {}
        for name, p in base.named_parameters():
            home = self.home(name)
            start = starts.get(home, 0)
            starts[home] = start + len(p)
            if name not in sent:
                continue
            patch = sent.pop(name)
            assert patch.full_shape == patch.shape == tuple(p.shape)
            assert patch.indices.dtype == torch.int32
            assert patch.indices.shape == patch.values.shape == (len(patch.values),)
            staged = torch.full(patch.shape, float("nan"), dtype=patch.dtype)
            staged.view(-1).index_copy_(0, patch.indices.long(), patch.values)
            place = self.weights[home][start : start + len(p)]
            staged = staged.to(place.dtype)
            place.copy_(torch.where(staged.isnan(), place, staged))
        assert not sent


@pytest.mark.parametrize(
    ("dtype", "cast"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16,) * 2]
)
def test_a_patched_server_holds_what_a_server_of_the_merged_model_would(dtype, cast):
    base, merged = model(), model()
    server, before = Server.of(base, dtype), Server.of(base, dtype)
    head = {"model.norm.weight": torch.full((8,), 2.0)}
    delta = delta_of(base)
    sparse = {name: part for name, part in delta.sparse.items() if name not in head}
    kept = {name: part for name, part in delta.verify(base).items() if name not in head}
    delta = Delta(sparse, head, base=fingerprint(kept))
    undo = delta.apply(merged)
    server.take(patches(delta, dtype=cast), base)
    wanted = Server.of(merged, dtype)
    assert all(torch.equal(server.weights[n], w) for n, w in wanted.weights.items())
    server.take(patches(undo, dtype=cast), base)
    assert all(torch.equal(server.weights[n], w) for n, w in before.weights.items())


def test_names_dtypes_and_shapes_are_what_vllm_reads():
    base = model(dtype=torch.bfloat16)
    sent = patches(delta_of(base), rename=lambda name: f"language_{name}", device="cpu")
    assert [p.name for p in sent] == [f"language_{n}" for n, _ in sorted(base.named_parameters())]
    assert {p.dtype for p in sent} == {p.values.dtype for p in sent} == {torch.bfloat16}
    assert sent[0]._replace(name="x").full_shape == (30, 8)  # as vLLM does with tied names
    assert all((p.indices[1:] > p.indices[:-1]).all() for p in sent)


def test_what_vllm_could_not_take_is_refused_with_a_way_out():
    base = nn.Linear(2, 2)
    with pytest.raises(UnmaskError, match=r"buffer 'n'.*merged"):
        patches(delta_of(base, buffers={"n": torch.tensor(1)}))
    with pytest.raises(UnmaskError, match="'x'"):
        patches(delta_of(base), rename=lambda _: "x")
    part = Sparse((3,), torch.tensor([1]), torch.tensor([float("nan")]))
    with pytest.raises(UnmaskError, match="NaN"):
        patches(Delta({"w": part}, base="0" * 64))
    wide = Sparse((2**31,), torch.tensor([1]), torch.ones(1))
    with pytest.raises(UnmaskError, match="int32"):
        patches(Delta({"w": wide}, base="0" * 64))


def test_the_merged_model_goes_round_through_from_pretrained(tmp_path: Path):
    base, tokens = model(), torch.arange(12)[None]
    delta = delta_of(base)
    base.save_pretrained(tmp_path / "base")
    fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    Delta.load(delta.save(tmp_path / "delta")).apply(fresh)
    fresh.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    delta.apply(base)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, base(tokens).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
