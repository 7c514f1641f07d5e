"""A model to plan for, from its config alone: sizes on the meta device, no weights."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from unmask.errors import UnmaskError
from unmask.recipes import models

KINDS = ("AutoModelForSequenceClassification", "AutoModelForImageClassification", "AutoModel")
LORA_RANK = 8


def config(model: Any) -> Any:
    """The config of a folder or hub id, or a copy of the one given, with what a batch needs."""
    import transformers

    if isinstance(model, str):
        source = models.located(model)
        with models.explained(source):
            found: Any = transformers.AutoConfig.from_pretrained(source)
    else:
        found = copy.deepcopy(model)
    found.problem_type = "single_label_classification"
    found.use_cache = False
    if getattr(found, "pad_token_id", None) is None:
        found.pad_token_id = 0  # decoders look for where a row ends
    if found.is_encoder_decoder and getattr(found, "decoder_start_token_id", None) is None:
        found.decoder_start_token_id = found.pad_token_id
    return found


def build(config: Any, dtype: torch.dtype) -> Any:
    """A model with a head to classify with, as `unmask train` builds it; else the bare model."""
    import transformers

    for name in KINDS:
        kind = getattr(transformers, name)
        if type(config) in kind._model_mapping:
            try:
                with torch.device("meta"):
                    return kind.from_config(config, dtype=dtype)
            except Exception as problem:
                raise UnmaskError(
                    f"no model can be built from this {type(config).__name__}: "
                    f"{said(problem)}; see that its config.json is whole"
                ) from problem
    raise UnmaskError(f"no model of transformers is built from a {type(config).__name__}")


def batch(model: Any, rows: int, length: int) -> dict[str, Tensor]:
    """Full rows for the model: nothing is padded, as memory is largest then."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None)
        height, width = (size, size) if isinstance(size, int) else size or (224, 224)
        dtype = next(model.parameters()).dtype
        shape = rows, getattr(config, "num_channels", 3), height, width
        given = {"pixel_values": torch.empty(shape, dtype=dtype, device="meta")}
    else:
        longest = _positions(model)
        if longest is not None and length > longest:
            raise UnmaskError(
                f"sequence_length={length} exceeds the model's {longest} positions; lower it"
            )
        ids = torch.empty(rows, length, dtype=torch.long, device="meta")
        given = {model.main_input_name: ids}
        if model.main_input_name == "input_ids":
            given["attention_mask"] = torch.empty_like(ids)
    if "Classification" in type(model).__name__:
        given["labels"] = torch.empty(rows, dtype=torch.long, device="meta")
    return given


def _positions(model: Any) -> int | None:
    """How long a row may be, where the model has a limit."""
    for name, module in model.named_modules():
        padded = isinstance(module, nn.Embedding) and module.padding_idx is not None
        if padded and name.endswith("position_embeddings"):
            # Counted from past the padding token's number, as RoBERTa does.
            return int(module.num_embeddings - module.padding_idx - 1)
    longest = getattr(model.config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def head(model: Any) -> set[str]:
    """Names of what `unmask train` trains in full: all that isn't the pretrained body."""
    if "Classification" not in type(model).__name__:
        return set()
    body = {id(p) for p in model.base_model.parameters()}
    return {n for n, p in model.named_parameters() if id(p) not in body}


def with_lora(model: Any) -> Any:
    """As PEFT puts it on all linear layers, the new head trained in full."""
    import peft

    new = head(model)
    config = peft.LoraConfig(r=LORA_RANK, target_modules=_linear(model, new))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between PEFT and transformers, no user's business
        adapted = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if name in new:
            parameter.requires_grad_(True)
    return adapted


def can_lora(model: Any) -> bool:
    """Whether PEFT is there, and puts it on this model's linear layers. Changes the model."""
    if find_spec("peft") is None or not _linear(model, head(model)):
        return False
    try:
        with_lora(model)
    except ValueError:  # Mamba's layers, for one, it refuses
        return False
    return True


def _linear(model: Any, head: set[str]) -> list[str]:
    """The layers that LoRA is put on: every linear one but the head's."""
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's
    ]
    return [name for name in layers if f"{name}.weight" not in head]


def said(problem: Exception) -> str:
    """What another library said, short."""
    return str(problem).strip().split("\n")[0] or type(problem).__name__
