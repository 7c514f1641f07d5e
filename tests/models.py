"""Small models of every kind that the tests train, each with its own data and loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Transformer(nn.Module):
    """One block of attention and MLP; the output layer is the embedding."""

    def __init__(self, vocabulary: int = 19, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(6, width) * 0.1)
        self.before = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.between = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.output(x + self.mlp(self.between(x)))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        )
        self.classifier = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).relu().mean((2, 3)))


class Bag(nn.Module):
    """Embedding, norm, layer, and a single number: a parameter with no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 5, padding_idx=0)
        self.norm = nn.LayerNorm(5)
        self.classifier = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(self.norm(self.embedding(tokens).mean(1))) * self.scale


class Volume(nn.Module):
    """Conv3d: five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 2)
        self.classifier = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.conv(x).tanh().mean((2, 3, 4)))


class Alternating(nn.Module):
    """Two branches of which only one is in the graph of a given step."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.left if int(x[0, 0] * 1000) % 2 else self.right)(x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(12, 12)
        self.classifier = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.second(self.first(x).tanh()).tanh())


def lora() -> nn.Module:
    """Build an MLP under LoRA: the frozen base has no gradient, the adapters are eligible."""
    import peft

    config = peft.LoraConfig(r=3, target_modules=["first", "second"], lora_dropout=0.0)
    return peft.get_peft_model(Mlp(), config)


def channels_last() -> nn.Module:
    return Conv().to(memory_format=torch.channels_last)


def mixed() -> nn.Module:
    """Half-precision layers around float32 norms, as large models are often kept."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8).bfloat16()
            self.norm = nn.LayerNorm(8)
            self.classifier = nn.Linear(8, 3).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.norm(self.first(x.bfloat16()).float())
            return self.classifier(hidden.bfloat16())

    return Mixed()


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 19, (4, 6), generator=seeded(seed))


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(*shape, generator=seeded(seed))


@dataclass(frozen=True)
class Case:
    """A model, its inputs by step number, its loss."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    dtype: torch.dtype = torch.float32
    head: tuple[str, ...] = ()  # what to train fully, where that is asked for

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().to(self.dtype) if self.dtype != torch.float32 else self.make()

    def logits(self, model: nn.Module, step: int) -> Tensor:
        x = self.inputs(step)
        return model(x.to(self.dtype) if x.is_floating_point() else x)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        logits = self.logits(model, step).float()
        logits = logits.flatten(0, -2)
        classes = logits.shape[-1]
        target = torch.randint(0, classes, (len(logits),), generator=seeded(1000 + step))
        return F.cross_entropy(logits, target)

    def __str__(self) -> str:
        return self.name


SIZES: dict[str, Any] = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 16, "num_labels": 3,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pretrained(kind: str = "Bert", seed: int = 0, **changes: Any) -> nn.Module:
    """A classifier of that kind as transformers has it, two layers of 16 with three classes."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    torch.manual_seed(seed)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


CLASSIFIER = ("classifier*",)

TRANSFORMER = Case("transformer-tied", Transformer, tokens, head=("mlp.2.*",))
CONV = Case("conv-batchnorm", Conv, numbers(4, 2, 8, 8), head=CLASSIFIER)
BAG = Case("embedding-norm-scalar", Bag, tokens, head=CLASSIFIER)
VOLUME = Case("conv3d", Volume, numbers(4, 2, 4, 4, 4), head=CLASSIFIER)
ALTERNATING = Case("missing-gradients", Alternating, numbers(4, 4))
MLP = Case("mlp", Mlp, numbers(5, 6), head=CLASSIFIER)
LORA = Case("lora", lora, numbers(5, 6))
MIXED = Case("bf16-with-f32-norms", mixed, numbers(5, 6), head=CLASSIFIER)
CHANNELS_LAST = Case("channels-last", channels_last, numbers(4, 2, 8, 8), head=CLASSIFIER)
BF16 = Case("transformer-bf16", Transformer, tokens, torch.bfloat16, ("mlp.2.*",))
F64 = Case("transformer-f64", Transformer, tokens, torch.float64, ("mlp.2.*",))
# No head in float16: AdamW's eps underflows there, and turns such a parameter into NaN.
F16 = Case("mlp-f16", Mlp, numbers(5, 6), torch.float16)

ALL = (
    TRANSFORMER, CONV, BAG, VOLUME, ALTERNATING, MLP, LORA, MIXED, CHANNELS_LAST, BF16, F64, F16,
)  # fmt: skip
