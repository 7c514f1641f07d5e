"""Two processes with a copy of the model each: as one process with the whole batch, or refused."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import unmask
from models import MLP, NO_DROPOUT, TRANSFORMER, Case, pretrained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
WORLD, STEPS, BATCH = 2, 4, 8
Found = dict[str, Any]


def exact() -> nn.Module:
    """Weights, data and gradients are short binary fractions, so that sums are exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape) / 4)
    return model


def data(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    x, y = (torch.randint(-2, 3, (BATCH, n), generator=draw).float() for n in (6, 4))
    return x, y


def descend(model: nn.Module, tuner: unmask.Tuner, rank: int, world: int, passes: int) -> Found:
    """SGD on this process's share of each batch, in that many passes a step."""
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.25)
    for step in range(STEPS):
        parts = [part.chunk(world)[rank].chunk(passes) for part in data(step)]
        for i, (x, y) in enumerate(zip(*parts, strict=True)):
            silent = isinstance(model, DistributedDataParallel) and i < passes - 1
            with model.no_sync() if silent else contextlib.nullcontext():
                ((model(x) * y).sum() / len(x) / passes).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcome(tuner)


def outcome(tuner: unmask.Tuner) -> Found:
    return {
        "selected": tuner.selected(),
        "weights": {n: p.detach().clone() for n, p in tuner.model.named_parameters()},
        "updates": tuner.updates,
    }


EXACT: dict[str, dict[str, Any]] = {
    "id3": {"method": unmask.id3(budget=20)},
    "head": {"method": unmask.id3(budget=20), "train_fully": "2.*"},
    "repeat": {"method": unmask.repeat_d3(budget=20)},
    "static": {"method": unmask.static_d3(budget=0.3)},
    "random": {"method": unmask.random_mask(budget=20)},
    "fish": {"method": unmask.fish(budget=20), "calibration": True},
}


def attached(model: nn.Module, asked: dict[str, Any], seed: int = 0) -> unmask.Tuner:
    if asked.get("calibration"):
        asked = {**asked, "calibration": [data(100 + seed)]}
    return unmask.attach(model, steps=STEPS, **asked)


def in_one(name: str) -> Found:
    model = exact()
    return descend(model, attached(model, EXACT[name]), 0, 1, 1)


def in_many(rank: int, folder: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What each process does, by name."""
    for name in EXACT:
        for passes in (1, 2):
            yield f"{name}-{passes}", partial(wrapped, rank, EXACT[name], passes=passes)
    yield "adamw", lambda: adamw(rank, TRANSFORMER)
    for gradients in ("streaming", "sampled"):
        asked = {"method": unmask.id3(budget=20), "gradients": gradients}
        yield gradients, partial(wrapped, rank, asked)
        yield f"trainer {gradients}", partial(trainer, folder, WORLD, gradients)
    yield "trainer", partial(trainer, folder, WORLD)
    yield "other data", partial(wrapped, rank, EXACT["fish"], seed=rank)
    yield "other base", partial(wrapped, rank, {"method": unmask.pafi(budget=20)}, off=rank)
    yield "wrapped", lambda: unmask.attach(DistributedDataParallel(exact()), unmask.pafi(budget=3))
    yield "peft", in_peft


def wrapped(
    rank: int, asked: dict[str, Any], passes: int = 1, seed: int = 0, off: float = 0
) -> Found:
    model = exact()
    with torch.no_grad():
        model[0].weight[0] += off
    tuner = attached(model, asked, seed)
    return descend(DistributedDataParallel(model), tuner, rank, WORLD, passes)


def adamw(rank: int, case: Case) -> Found:
    """Sums that are rounded: then at least all processes end alike."""
    model = case.build()
    tuner = unmask.attach(model, unmask.id3(budget=60), steps=STEPS, train_fully=case.head)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=0.01)
    ddp = DistributedDataParallel(model)
    for step in range(STEPS):
        case.loss(ddp, 10 * step + rank).backward()
        nn.utils.clip_grad_norm_([tuner.slots.values, *tuner.full.values()], 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return outcome(tuner)


def in_peft() -> None:
    peft = pytest.importorskip("peft")
    from unmask.integrations.peft import UnmaskConfig

    model = peft.get_peft_model(exact(), UnmaskConfig(budget=9, steps=2))
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    ddp(data(0)[0]).sum().backward()


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(i, i + 8) % 29, "labels": torch.tensor(i % 3)}


def trainer(out: str, world: int, gradients: str = "dense") -> Found:
    """A stock Trainer, which clips and has accelerate wrap the model."""
    transformers = pytest.importorskip("transformers")
    from unmask.integrations.transformers import UnmaskCallback

    model = pretrained(**NO_DROPOUT)
    tuner = unmask.attach(
        model, unmask.id3(budget=40), train_fully="classifier*", gradients=gradients
    )
    arguments = transformers.TrainingArguments(
        out, per_device_train_batch_size=4 // world, max_steps=STEPS, max_grad_norm=0.01,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=True, seed=0, logging_steps=1,
        average_tokens_across_devices=False,  # it would double the loss of a classifier
    )  # fmt: skip
    run = transformers.Trainer(
        model, arguments, train_dataset=Rows(), callbacks=[UnmaskCallback(tuner)],
        optimizers=(tuner.optimizer(torch.optim.SGD, lr=1.0), None),
    )  # fmt: skip
    assert arguments.world_size == world
    run.train()
    norms = [log["grad_norm"] for log in run.state.log_history if "grad_norm" in log]
    return {**outcome(tuner), "norms": norms, "wrapped": run.model_wrapped is not model}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # met by then
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    found: dict[str, Any] = {}
    for name, run in in_many(rank, folder):
        try:
            found[name] = run()
        except unmask.UnmaskError as refused:
            found[name] = str(refused)
        torch.distributed.barrier()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the processes has to say."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def same(a: Found, b: Found) -> bool:
    return a["updates"] == b["updates"] and all(
        a[key].keys() == b[key].keys() and all(torch.equal(a[key][n], b[key][n]) for n in a[key])
        for key in ("selected", "weights")
    )


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", EXACT)
def test_as_one_process_with_the_whole_batch(name: str, passes: int, found: list[Found]) -> None:
    alone, base = in_one(name), exact().state_dict()
    assert any(not torch.equal(weight, base[n]) for n, weight in alone["weights"].items())
    for one in found:
        assert same(one[f"{name}-{passes}"], alone)


def test_all_end_alike(found: list[Found]) -> None:
    assert same(found[0]["adamw"], found[1]["adamw"])
    base = TRANSFORMER.build().state_dict()
    assert any(not torch.equal(w, base[n]) for n, w in found[0]["adamw"]["weights"].items())


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_a_trainer(found: list[Found], tmp_path: Path) -> None:
    first, second = (one["trainer"] for one in found)
    assert same(first, second)
    assert first["wrapped"]
    alone = trainer(str(tmp_path), 1)
    assert not alone["wrapped"]
    torch.testing.assert_close(first["norms"], alone["norms"], rtol=1e-4, atol=0.0)
    assert first["selected"].keys() == alone["selected"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("streaming", "averages gradients.*gradients='dense'"),
        ("sampled", "averages gradients.*gradients='dense'"),
        ("other data", "2 processes chose.*calibration="),
        ("other base", "2 processes chose.*the same model"),
        ("wrapped", "wrap it afterwards"),
        ("trainer streaming", "averages gradients.*gradients='dense'"),
        ("trainer sampled", "averages gradients.*gradients='dense'"),
        ("peft", r"unmask\.attach\(\) on the plain model"),
    ],
)
def test_what_would_come_apart_is_refused(name: str, message: str, found: list[Found]) -> None:
    for one in found:
        assert isinstance(one[name], str)
        with pytest.raises(unmask.UnmaskError, match=message):
            raise unmask.UnmaskError(one[name])


def test_a_copy_of_the_model_leaves_the_check_behind() -> None:
    model = MLP.build()
    tuner = unmask.attach(model, unmask.id3(budget=9), steps=2, gradients="streaming")
    assert model._forward_pre_hooks
    twin = copy.deepcopy(model)
    MLP.loss(twin, 0).backward()
    assert tuner.step == 0
    tuner.detach()
    assert not model._forward_pre_hooks
