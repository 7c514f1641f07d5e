"""A pretrained model and labelled rows, tiny enough to train in a second."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["good", "fine", "bad", "poor", *(f"w{i}" for i in range(40))]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write_model(folder: Path, seed: int = 0) -> Path:
    """A BERT of 2 layers x 16 with random weights, dropout included, and its tokenizer."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            initializer_range=0.4,  # else nothing is learnt from random weights in a second
        )
    ).save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Sentences that are about something good (label "pos") or bad ("neg")."""
    draw = random.Random(seed)
    made: list[dict[str, object]] = []
    for i in range(count):
        label = ("pos", "neg")[i % 2]
        said = draw.choices(WORDS[:2] if label == "pos" else WORDS[2:4], k=4)
        said += draw.choices(WORDS[4:], k=draw.randint(0, 8))
        draw.shuffle(said)
        made.append({"text": " ".join(said), "label": label})
    return made


def write_rows(file: Path, made: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return file
