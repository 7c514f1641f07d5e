"""A pretrained model and labelled rows, tiny enough to train in a second."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from unmask.recipes.trainer import Recorder

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


def asked(home: Path) -> dict[str, Any]:
    """A model and rows on disk, as a run's config wants them: 10 steps an epoch."""
    return {
        "model": str(write_model(home / "model")),
        "train_file": str(write_rows(home / "train.jsonl", rows(80))),
        "validation_file": str(write_rows(home / "held.jsonl", rows(40, seed=1))),
        "batch_size": 8,
        "epochs": 2,
        "lr": 0.05,
    }


@contextmanager
def interrupted(step: int) -> Iterator[None]:
    """A run within is stopped by its user at the end of this step."""
    on_step_end = Recorder.on_step_end

    def stop(self: Recorder, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
        on_step_end(self, args, state, control, **more)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Recorder, "on_step_end", stop)
        yield
