"""Pretrained models with a new head: from a folder, the hub, or the installed demo package."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.delta import Delta
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.recipes import demo, hub, wrappers
from unmask.recipes.data import Example
from unmask.recipes.tasks import Task


@dataclass(frozen=True)
class Loaded:
    """A model for the task; `head` names the parameters that its checkpoint didn't have."""

    model: Any
    tokenizer: Any
    head: tuple[str, ...]


def load(name: str, task: Task, seed: int) -> Loaded:
    """The pretrained model `name` (folder, hub id or the demo's package) with a head for the task.

    The head is drawn from the seed, so that a run begins alike every time.
    """
    import transformers

    source = located(name)
    labels = dict(enumerate(task.labels))
    names = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}} if labels else {}
    transformers.set_seed(seed)
    with explained(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=max(1, len(labels)),
            problem_type="regression" if task.regression else "single_label_classification",
            **names,
            ignore_mismatched_sizes=True,  # a head for other classes is replaced by a new one
            output_loading_info=True,
        )
    mismatched = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    new = set(found["missing_keys"]) | mismatched
    head = tuple(n for n, _ in model.named_parameters() if n in new)
    if len(head) == len(dict(model.named_parameters())):
        raise UnmaskError(
            f"none of the weights in {source!r} belong to a {type(model).__name__}; "
            "give the folder of a pretrained model"
        )
    _pad(tokenizer, model, source)
    return Loaded(model, tokenizer, head)


def encode(loaded: Loaded, task: Task, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Token ids and labels, one dict a row, cut to the task's length and the model's own."""
    longest = min(task.max_length, _positions(loaded))
    pair = len(task.text) > 1
    if longest <= (marks := loaded.tokenizer.num_special_tokens_to_add(pair)):
        raise UnmaskError(
            f"max_length={longest} leaves no room for text beside the {marks} marks that this "
            "tokenizer adds; raise --max-length"
        )
    columns = [list(column) for column in zip(*(e.text for e in examples), strict=True)]
    encoded = loaded.tokenizer(*columns, truncation=True, max_length=longest)
    kind = float if task.regression else int
    return [
        {key: values[i] for key, values in encoded.items()} | {"labels": kind(example.label)}
        for i, example in enumerate(examples)
    ]


def merge(model_name: str, delta: Delta, out: Path) -> Any:
    """Write the base model with the delta in it into `out`, a plain folder for from_pretrained."""
    import transformers

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UnmaskError(f"{str(out)!r} exists and isn't empty; name another folder with --out")
    inside = delta.info.get("peft")
    if inside is not None:
        wrappers.check_mergeable(inside)
    model = _plain(model_name, delta)
    tuner = None if inside is None else _wrapped(model, delta)
    delta.apply(model)
    if tuner is not None:
        model = tuner.merge_and_unload(safe_merge=True)
    model.save_pretrained(out)
    with contextlib.suppress(OSError, ValueError):  # a model without a tokenizer is whole too
        transformers.AutoTokenizer.from_pretrained(located(model_name)).save_pretrained(out)
    return model


def built(model_name: str, delta: Delta) -> Any:
    """The model that the delta was made on: the base, with its head and its other modules."""
    model = _plain(model_name, delta)
    if "peft" in delta.info:
        _wrapped(model, delta)
    return model


def _wrapped(model: Any, delta: Delta) -> Any:
    return wrappers.wrap(str(delta.info["peft"]), model, int(delta.info.get("steps") or 1))


def _plain(model_name: str, delta: Delta) -> Any:
    """The base model, with a head for the delta's."""
    import transformers

    head, source = delta.info.get("head", {}), located(model_name)
    with explained(source):
        config = transformers.AutoConfig.from_pretrained(source, **head.get("config", {}))
        wanted = head.get("class") or (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, wanted, transformers.AutoModel)
        return kind.from_pretrained(source, config=config)


def located(name: str) -> str:
    """What from_pretrained takes: the demo's package stands for the folder installed with it."""
    return str(demo.model_folder()) if name == demo.MODEL[0] else name


def described(model: Any) -> dict[str, Any]:
    """What `merge` must know of the head to build the model anew."""
    config = model.config
    return {
        "class": type(model).__name__,
        "config": {
            "num_labels": config.num_labels,
            "id2label": {str(k): v for k, v in config.id2label.items()},
            "label2id": dict(config.label2id),
            "problem_type": config.problem_type,
            "pad_token_id": config.pad_token_id,
        },
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its loading bars and reports, for a while."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def explained(source: str) -> Iterator[None]:
    """Loading errors as one sentence that says what to do."""
    from safetensors import SafetensorError

    local = Path(source).expanduser()
    is_path = local.is_absolute() or source.startswith(".") or source.count("/") > 1
    if is_path and not local.is_dir():
        raise UnmaskError(
            f"no folder {source!r}; give the folder of a pretrained model, or a hub id"
        )
    if local.is_dir() and not (local / "config.json").is_file():
        raise UnmaskError(
            f"{source!r} holds no config.json, so it is no model folder; give one that "
            "save_pretrained() or `hf download` wrote"
        )
    try:
        with hub.cached_only() if not local.is_dir() else contextlib.nullcontext():
            yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as problem:
        if isinstance(problem, UnmaskError):
            raise
        first = str(problem).strip().split("\n")[0] or type(problem).__name__
        if local.is_dir() or hub.reachable():
            raise UnmaskError(f"the model {source!r} can't be loaded: {first}") from problem
        raise UnmaskError(
            f"the model {source!r} is no folder here, it isn't cached, and the Hugging Face hub "
            "can't be reached; give --model a folder that holds it (where there is a network: "
            f"`hf download {source} --local-dir DIR`), or leave --model out for the embedded one"
        ) from problem


def _pad(tokenizer: Any, model: Any, source: str) -> None:
    """Batches need a padding token: decoders get their end-of-text token for one."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UnmaskError(
                f"the tokenizer of {source!r} has neither a padding nor an end-of-text token; "
                "set tokenizer.pad_token and save it into the model's folder"
            )
        tokenizer.pad_token = tokenizer.eos_token
        warnings.warn(
            f"the tokenizer of {source!r} has no padding token; using {tokenizer.eos_token!r}, its "
            "end-of-text token, which attention masks out",
            UnmaskWarning,
            stacklevel=3,
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _positions(loaded: Loaded) -> int:
    limits: list[int | None] = [
        loaded.tokenizer.model_max_length,
        getattr(loaded.model.config, "max_position_embeddings", None),
    ]
    return min(limit for limit in limits if limit is not None and limit > 0)
