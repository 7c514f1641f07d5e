"""What can be told of a batch without being told: its loss, its samples, how it is moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.errors import UnmaskError

__all__ = ["loss_of", "loss_of_drawn", "moved", "samples"]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The loss by the conventions that `Calibration` states."""
    if isinstance(batch, Mapping):
        output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            return loss
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        output, target = model(*batch[:-1]), batch[-1]
        if isinstance(output, Tensor) and isinstance(target, Tensor):
            if target.is_floating_point():
                return F.mse_loss(output, target)
            return F.cross_entropy(output.flatten(0, -2), target.flatten())
    raise UnmaskError(
        f"no loss can be had from a calibration batch of type {type(batch).__name__}; give a "
        "mapping with labels to a model that returns .loss, or (inputs, target), or say how: "
        "unmask.Calibration(batches, loss=lambda model, batch: ...)"
    )


def loss_of_drawn(model: nn.Module, sample: Any, draw: torch.Generator) -> Tensor:
    """-log p(y | x) of a y drawn from the model's output; a mean over y's positions that count."""
    labels = sample.get("labels") if isinstance(sample, Mapping) else sample[-1]
    output = model(**sample) if isinstance(sample, Mapping) else model(*sample[:-1])
    logits = output["logits"] if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[-1] < 2:
        raise UnmaskError(
            "sample_type='model' draws labels from the model's class scores, and it gives none; "
            "use sample_type='label'"
        )
    flat = logits.flatten(0, -2).float()
    chances = flat.detach().softmax(-1).cpu()
    drawn = torch.multinomial(chances, 1, generator=draw).squeeze(1).to(flat.device)
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]:
        if getattr(model, "loss_type", None) == "ForCausalLM":  # there position t predicts t + 1
            labels = F.pad(labels[..., 1:], (0, 1), value=-100)
        drawn = drawn.masked_fill(labels.flatten() == -100, -100)
    return F.cross_entropy(flat, drawn)


def samples(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches' samples, as batches of one; what isn't as long as its batch goes along whole."""
    for batch in batches:
        size = next((len(tensor) for tensor in _tensors(batch) if tensor.ndim), None)
        if size is None:
            raise UnmaskError(
                f"a calibration batch of type {type(batch).__name__} holds no tensors to take "
                "single samples from; give mappings or tuples of tensors"
            )
        for i in range(size):
            yield _mapped(batch, partial(_row, i, size))


def _row(i: int, size: int, tensor: Tensor) -> Tensor:
    return tensor[i : i + 1] if tensor.ndim and len(tensor) == size else tensor


def moved(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches on this device."""
    for batch in batches:
        yield _mapped(batch, lambda tensor: tensor.to(device))


def _mapped(batch: Any, form: Callable[[Tensor], Tensor]) -> Any:
    """The batch with another form of each tensor in it."""
    if isinstance(batch, Tensor):
        return form(batch)
    if isinstance(batch, Mapping):
        return {name: _mapped(part, form) for name, part in batch.items()}
    if isinstance(batch, list | tuple):
        return tuple(_mapped(part, form) for part in batch)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
