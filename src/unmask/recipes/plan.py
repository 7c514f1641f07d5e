"""What a run will take in memory, part by part and mode by mode, before any weight is loaded.

No formula for activations: one training step of the very model runs on the meta device, where
tensors have sizes and no bytes, while every storage is metered from its birth to its death. So the
numbers follow the architecture, its attention, its dropout and its loss.
"""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unmask.errors import UnmaskError
from unmask.methods import Budget, Method
from unmask.recipes import choose, models

MODES = ("dense", "streaming", "sampled", "lora", "full")
PARTS = ("weights", "gradients", "optimizer", "selection", "activations")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda")
LORA_RANK = 8
STEPS = 1000  # of a run, as far as a step's share of the budget depends on it
# Bytes that a slot takes for the whole run: value, its gradient and its base, two int32 to find it.
SLOT = 4 + 4 + 4 + 4 + 4
# What a step adds while it lasts, as measured: for each slot its gradient in the making and the
# next table; for each scalar that it chooses the candidates, twice as many, and their sorting.
TABLE, CANDIDATE = 12, 108
WORKSPACE = 1 << 20  # blocks of scores in the making, however large the model
UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}} | {
    f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)
}


@dataclass(frozen=True)
class Row:
    """One way to train, in bytes: each part at its largest, and all of them at the worst moment.

    The parts don't add up to `peak`, since they aren't largest at the same time: activations are
    gone when the last gradient comes.
    """

    mode: str
    weights: int
    gradients: int
    optimizer: int
    selection: int
    activations: int
    peak: int


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `rows` are in the order of MODES."""

    model: str
    method: str
    parameters: int
    eligible: int
    budget: int
    batch_size: int
    sequence_length: int
    dtype: str
    device: str
    rows: tuple[Row, ...]

    def fitting(self, memory: int) -> tuple[str, ...]:
        """The modes whose peak is within so many bytes."""
        return tuple(row.mode for row in self.rows if row.peak <= memory)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan(
    model: str,
    method: str = "id3",
    budget: Budget = 38_000,
    batch_size: int = 16,
    sequence_length: int = 128,
    dtype: str = "fp32",
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """Memory of a training step with AdamW for each of MODES, from the model's config alone.

    The model has a new head, as `unmask train` gives it. No row for LoRA without PEFT.

    model     a folder with a config.json, a hub id, or a config of transformers
    device    one of DEVICES: where training will run, which decides how attention is computed
    settings  parts of the method by dotted key, as in `choose.method`
    """
    for name, count in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if count < 1:
            raise UnmaskError(f"{name}={count}; it is a whole number, 1 or more")
    for name, value, allowed in (("dtype", dtype, (*DTYPES,)), ("device", device, DEVICES)):
        if value not in allowed:
            raise UnmaskError(f"{name}={value!r}; it is one of {', '.join(allowed)}")
    config = _config(model)
    built = choose.method(method, budget, settings or {})

    def step(mode: str) -> tuple[_Step, Row] | None:
        fresh = _model(config, DTYPES[dtype])
        if mode == "lora" and not _can_lora(fresh):
            return None
        run = _Step(fresh, built, mode, device)
        try:
            return run, run.measure(_batch(config, run.model, batch_size, sequence_length))
        except (RuntimeError, ValueError, TypeError, AttributeError) as problem:
            if isinstance(problem, UnmaskError):
                raise
            raise UnmaskError(
                f"a step of {type(run.model).__name__} can't be planned with batch_size="
                f"{batch_size}, sequence_length={sequence_length}: {_first_line(problem)}"
            ) from problem

    done = [found for mode in MODES if (found := step(mode)) is not None]
    first = done[0][0]
    return Plan(
        model=model if isinstance(model, str) else type(config).__name__,
        method=method,
        parameters=sum(p.numel() for p in first.model.parameters()),
        eligible=first.eligible,
        budget=first.budget,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=dtype,
        device=device,
        rows=tuple(row for _, row in done),
    )


def parse_memory(text: str) -> int:
    """Bytes: "24GB" is 24 * 1000^3, "24GiB" is 24 * 1024^3.

    >>> parse_memory("1.5 KiB")
    1536
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise UnmaskError(f"{text!r} is no amount of memory; write 24GB, 80GiB or 512MB, say")
    return int(float(match[1]) * UNITS[match[2].upper()])


class Meter(TorchDispatchMode):
    """Bytes of the tensors that are alive on a device, by kind; `most` of each, `peak` of all."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.peak = 0
        self.kind = "activations"  # of what is born from now on
        self._kinds: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        asked = func is torch.ops.aten._local_scalar_dense.default
        if asked and args[0].is_meta and args[0].dtype == torch.bool:
            return True  # models ask whether a mask lets everything through
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Within, what is born is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def add(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count the tensor's storage; with a kind, as of that kind from now on."""
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            if kind is None:
                return
            old, size = self._kinds[key]
            self.live[old] -= size
        else:
            size = storage.nbytes()
            weakref.finalize(storage, self._freed, key).atexit = False
        kind = kind or self.kind
        self._kinds[key] = kind, size
        self.live[kind] += size
        self.most[kind] = max(self.most[kind], self.live[kind])
        self.peak = max(self.peak, self.live.total())

    def _freed(self, key: int) -> None:
        kind, size = self._kinds.pop(key)
        self.live[kind] -= size


class _Step:
    """One training step in one mode, from a model on the meta device."""

    def __init__(self, model: Any, method: Method, mode: str, device: str) -> None:
        self.mode, self.device, self.method = mode, device, method
        self.model = _with_lora(model) if mode == "lora" else model
        head = () if mode in ("lora", "full") else _head(model)
        self.full = [p for n, p in model.named_parameters() if n in head]
        self.chosen = [p for n, p in self.model.named_parameters() if n not in head]
        self.chosen = [p for p in self.chosen if p.requires_grad]
        self.eligible = sum(p.numel() for p in self.chosen)
        self.selective = mode not in ("lora", "full")
        self.budget = method.resolve(self.eligible, len(self.chosen)) if self.selective else 0
        self.meter = Meter()
        self._held: list[Tensor] = []  # what the selection keeps for the run

    def measure(self, batch: Mapping[str, Tensor]) -> Row:
        meter = self.meter
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            meter.add(tensor, "weights")
        self.model.train()
        for parameter in (*self.chosen, *self.full):
            parameter.register_post_accumulate_grad_hook(self._arrived)
        # Twice: in a second step the optimiser's state is there from the start.
        with meter, _Attention(self.device):
            optimizer = self._optimizer()
            for _ in range(2):
                out = self.model(**batch)
                loss = getattr(out, "loss", None)
                (out[0].float().sum() if loss is None else loss).backward()
                del out, loss
                drafted = self._select()
                with meter.making("optimizer"):
                    optimizer.step()
                del drafted
                optimizer.zero_grad()
                self.model.zero_grad()  # with `dense`, gradients are in the model
        return Row(mode=self.mode, peak=meter.peak, **{kind: meter.most[kind] for kind in PARTS})

    def _arrived(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.meter.add(parameter.grad, "gradients")
        whole = any(parameter is p for p in self.full)
        if self.mode in ("streaming", "sampled") and not whole:
            parameter.grad = None

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = self.chosen if not self.selective else [self._vector(), *self.full]
        with self.meter.making("optimizer"):
            return torch.optim.AdamW(trained, foreach=self.device == "cuda")

    def _vector(self) -> nn.Parameter:
        with self.meter.making("selection"):
            values = nn.Parameter(torch.empty(self.budget, device="meta"))
            self._held = [_bytes(SLOT - 8, self.budget), values]
            if self.full:
                self._held += [torch.empty_like(p) for p in self.full]  # their base, to go back to
        return values

    def _select(self) -> Any:
        """What the choice holds while it is made, and the gradient of the vector it gives."""
        if not self.selective:
            return None
        strategy = self.method.strategy
        share = strategy.quota(1, 0, self.budget, STEPS).grow
        with self.meter.making("selection"):
            values = self._held[1]
            values.grad = torch.empty_like(values)
            choosing = _bytes(CANDIDATE, share), _bytes(1, WORKSPACE)
            return choosing, _bytes(TABLE, self.budget)


class _Attention(TorchFunctionMode):
    """Computes attention as the device would: fused, the matrix of weights never whole, on a GPU,
    and on a CPU unless attention has dropout."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is Tensor.__contains__ and args[0].is_meta:
            return False  # no row holds a padding token
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        dropout = args[4] if len(args) > 4 else given.get("dropout_p", 0.0)
        if self.device == "cpu" and dropout:
            return func(*args, **given)
        named = [*args, *(given[n] for n in ("query", "key", "value") if n in given)]
        return _Fused.apply(*named[:3])  # type: ignore[no-untyped-call]


class _Fused(torch.autograd.Function):
    """What fused attention keeps for backward: its inputs, its output, one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _config(model: Any) -> Any:
    import transformers

    if isinstance(model, str):
        source = models.located(model)
        with models.explained(source):
            config = transformers.AutoConfig.from_pretrained(source)
    else:
        config = copy.deepcopy(model)
    config.problem_type = "single_label_classification"
    config.use_cache = False
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # decoders look for where a row ends
    return config


def _model(config: Any, dtype: torch.dtype) -> Any:
    """A model with a head to classify with, as `unmask train` builds it; else the bare model."""
    import transformers

    kinds = ("AutoModelForSequenceClassification", "AutoModelForImageClassification", "AutoModel")
    for name in kinds:
        kind = getattr(transformers, name)
        if type(config) in kind._model_mapping:
            with torch.device("meta"):
                return kind.from_config(config, dtype=dtype)
    raise UnmaskError(f"no model of transformers is built from a {type(config).__name__}")


def _batch(config: Any, model: Any, batch: int, length: int) -> dict[str, Tensor]:
    size = getattr(config, "image_size", None)
    if model.main_input_name == "pixel_values":
        height, width = (size, size) if isinstance(size, int) else size or (224, 224)
        dtype = next(model.parameters()).dtype
        shape = batch, getattr(config, "num_channels", 3), height, width
        given = {"pixel_values": torch.empty(shape, dtype=dtype, device="meta")}
    else:
        longest = getattr(config, "max_position_embeddings", None) or length
        if length > longest:
            raise UnmaskError(
                f"sequence_length={length} exceeds the model's {longest} positions; lower it"
            )
        ids = torch.empty(batch, length, dtype=torch.long, device="meta")
        given = {model.main_input_name: ids}
    if "Classification" in type(model).__name__:
        given["labels"] = torch.empty(batch, dtype=torch.long, device="meta")
    return given


def _head(model: Any) -> set[str]:
    """Names of what `unmask train` trains in full: all that isn't the pretrained body."""
    if "Classification" not in type(model).__name__:
        return set()
    body = {id(p) for p in model.base_model.parameters()}
    return {n for n, p in model.named_parameters() if id(p) not in body}


def _linear(model: Any, head: set[str]) -> list[str]:
    """The layers that LoRA is put on: every linear one but the head's."""
    kinds = "Linear", "Conv1D"
    layers = [n for n, m in model.named_modules() if type(m).__name__ in kinds]
    return [name for name in layers if f"{name}.weight" not in head]


def _with_lora(model: Any) -> Any:
    """As PEFT puts it on all linear layers, the new head trained in full."""
    import peft

    head = _head(model)
    config = peft.LoraConfig(r=LORA_RANK, target_modules=_linear(model, head))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between PEFT and transformers, no user's business
        adapted = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if name in head:
            parameter.requires_grad_(True)
    return adapted


def _can_lora(model: Any) -> bool:
    return find_spec("peft") is not None and bool(_linear(model, _head(model)))


def _bytes(each: int, count: int) -> Tensor:
    return torch.empty(each * count, dtype=torch.uint8, device="meta")


def _first_line(problem: Exception) -> str:
    return str(problem).strip().split("\n")[0] or type(problem).__name__
