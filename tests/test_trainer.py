"""A stock `transformers.Trainer` with the callback: what it leaves behind."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import unmask
from models import pretrained

transformers = pytest.importorskip("transformers")

from unmask.integrations.transformers import UnmaskCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")


def trainer(kind: type, folder: Path, tuner: unmask.Tuner) -> Any:
    rows = [{"input_ids": torch.arange(i, i + 8), "labels": torch.tensor(i % 3)} for i in range(8)]
    return kind(
        tuner.model,
        transformers.TrainingArguments(
            str(folder), max_steps=4, report_to=[], save_strategy="no", disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
        callbacks=[UnmaskCallback(tuner)],
        optimizers=(tuner.optimizer(torch.optim.SGD, lr=1.0), None),
    )  # fmt: skip


def test_an_interruption_within_a_step_leaves_no_trace(tmp_path: Path) -> None:
    """While a step is under way the trainer sees what is trained only; afterwards nobody does."""
    model: Any = pretrained()
    names = [name for name, _ in model.named_parameters()]
    tuner = unmask.attach(model, unmask.id3(budget=40))

    class Interrupted(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        trainer(Interrupted, tmp_path, tuner).train()
    assert tuner.step == 1
    tuner.detach()
    assert len(list(model.parameters())) == len(names)
    assert "parameters" not in vars(model)


def test_a_model_that_is_dropped_is_freed(tmp_path: Path) -> None:
    tuner = unmask.attach(pretrained(), unmask.id3(budget=40), gradients="streaming")
    running = trainer(transformers.Trainer, tmp_path, tuner)
    running.train()
    assert tuner.step == 4
    refs = [weakref.ref(tuner), *map(weakref.ref, tuner.model.parameters())]
    del tuner, running
    gc.collect()
    assert not [ref for ref in refs if ref() is not None]
