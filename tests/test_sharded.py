"""Weights in pieces over processes: refused, in one process as in many."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import unmask

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module  # noqa: E402

Wrap = Callable[[Any], nn.Module]
pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP.*NO_SHARD"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def mesh() -> Any:
    return init_device_mesh("cpu", (1,))


def fsdp(model: nn.Module, own: bool = False) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=own, device_id=torch.device("cpu"))


def part(wrap: Wrap) -> Wrap:
    """Of the model, its first layer alone."""

    def within(model: nn.Sequential) -> nn.Module:
        model[0] = wrap(model[0])
        return model

    return within


def tensor_parallel(model: nn.Module) -> nn.Module:
    return parallelize_module(model, mesh(), {"0": ColwiseParallel()})


SHARDED: dict[str, tuple[Wrap, str]] = {
    "fsdp": (fsdp, "the model is sharded .FullyShardedDataParallel."),
    "fsdp, original parameters": (
        lambda model: fsdp(model, True),
        "the model is sharded .FullyShardedDataParallel.",
    ),
    "fsdp of a part": (part(fsdp), "'0' in the model is sharded .FullyShardedDataParallel."),
    "fsdp, unwrapped": (
        lambda model: fsdp(model).module,
        "'_flat_param' in .* sharded .FlatParameter.",
    ),
    "fully_shard": (
        lambda model: fully_shard(model, mesh=mesh()),
        "the model is sharded .FSDPModule.",
    ),
    "fully_shard of a part": (
        part(lambda layer: fully_shard(layer, mesh=mesh())),
        "'0' in the model is sharded .FSDPModule.",
    ),
    "tensor parallel": (tensor_parallel, "'0.weight' in the model is sharded .DTensor."),
}
sharded = pytest.mark.parametrize(("wrap", "message"), SHARDED.values(), ids=SHARDED)
REMEDY = ".*attach.. to the plain model and wrap that in DistributedDataParallel"


@sharded
def test_attach_refuses(wrap: Wrap, message: str) -> None:
    with pytest.raises(unmask.UnmaskError, match=message + REMEDY):
        unmask.attach(wrap(build()), unmask.id3(budget=5), steps=2)


@sharded
def test_peft_refuses(wrap: Wrap, message: str) -> None:
    peft = pytest.importorskip("peft")
    from unmask.integrations.peft import UnmaskConfig

    with pytest.raises(unmask.UnmaskError, match="is sharded" + REMEDY):
        peft.get_peft_model(wrap(build()), UnmaskConfig(budget=5, steps=2))


LATER = {name: wrap for name, (wrap, _) in SHARDED.items() if name != "fsdp, unwrapped"}
later = pytest.mark.parametrize("wrap", LATER.values(), ids=LATER)


@later
@pytest.mark.parametrize("gradients", ["dense", "streaming", "sampled"])
def test_sharded_after_attach(wrap: Wrap, gradients: str) -> None:
    """It used to choose and train nothing, without a word."""
    model = build()
    unmask.attach(model, unmask.id3(budget=5), steps=2, gradients=gradients)
    wrapped = wrap(model)
    with pytest.raises(unmask.UnmaskError, match=REMEDY):
        wrapped(torch.ones(2, 6))


@pytest.mark.parametrize("name", sorted(LATER.keys() - {"fsdp"}))  # that one FSDP itself refuses
def test_sharded_after_an_adapter_was_made(name: str) -> None:
    peft = pytest.importorskip("peft")
    from unmask.integrations.peft import UnmaskConfig

    model = peft.get_peft_model(build(), UnmaskConfig(budget=5, steps=2))
    wrapped = LATER[name](model.base_model.model)
    with pytest.raises(unmask.UnmaskError, match=REMEDY):
        wrapped(torch.ones(2, 6))


def test_a_part_that_is_wrapped_already_is_refused() -> None:
    with pytest.raises(unmask.UnmaskError, match="wrap it afterwards"):
        unmask.attach(part(DistributedDataParallel)(build()), unmask.id3(budget=5), steps=2)


@pytest.mark.parametrize("wrap", [lambda model: model, DistributedDataParallel])
@pytest.mark.parametrize("compiled", [False, True])
def test_whole_weights_are_trained(wrap: Wrap, compiled: bool) -> None:
    model: Any = build()
    tuner = unmask.attach(model, unmask.id3(budget=5), steps=2)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    model = wrap(model)
    run: Any = torch.compile(model, backend="eager") if compiled else model
    for _ in range(2):
        run(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.active == 5
