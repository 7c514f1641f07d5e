"""Rows of text and label, from the hub, from a folder of such files, or from the user's own."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from unmask.errors import UnmaskError
from unmask.recipes import hub
from unmask.recipes.tasks import Task

Row = Mapping[str, Any]


class Example(NamedTuple):
    """One or two texts, and a class id or a number."""

    text: tuple[str, ...]
    label: int | float


@dataclass(frozen=True)
class Data:
    """A task with its rows; `validation` holds one or more parts by name, the first one counts."""

    task: Task
    train: list[Example]
    validation: dict[str, list[Example]]


def from_hub(task: Task) -> Data:
    """The task's splits from the hub, or from the cache that an earlier run left."""
    import datasets

    try:
        with hub.cached_only():
            loaded = datasets.load_dataset(*task.hub)
    except (OSError, ValueError, RuntimeError) as problem:
        found = f"answers: {problem}" if hub.reachable() else "can't be reached, nor is it cached"
        raise UnmaskError(
            f"task {task.name!r} reads {'/'.join(task.hub)} from the hub, which {found}"
            f"; put {task.name}/train.jsonl.gz and {task.name}/validation.jsonl.gz into a folder D"
            " and give --data-dir D, or give --train-file and --validation-file"
        ) from problem
    return _of_task(task, {split: list(loaded[split]) for split in (task.train, *task.validation)})


def from_folder(task: Task, folder: str | Path) -> Data:
    """`folder/<task>/{train,validation}.jsonl[.gz]`, with the fields that the hub has.

    Where the hub has several validation splits (MNLI), either their names or `validation` do.
    """
    home = Path(folder) / task.name
    found = {split: _split_file(home, split) for split in (task.train, *task.validation)}
    if len(task.validation) > 1 and not any(found[split] for split in task.validation):
        task = replace(task, validation=("validation",))
        found["validation"] = _split_file(home, "validation")
    for split in (task.train, task.validation[0]):
        if found.get(split) is None:
            raise UnmaskError(
                f"--data-dir has no {home / f'{split}.jsonl.gz'}; put the task's rows there, one "
                f"JSON object a line with {', '.join((*task.text, task.label))}"
            )
    task = replace(task, validation=tuple(s for s in task.validation if found[s]))
    return _of_task(task, {s: read(f) for s, f in found.items() if f is not None})


def from_files(
    train_file: str | Path,
    validation_file: str | Path | None,
    text: Sequence[str] = ("text",),
    label: str = "label",
) -> Data:
    """The user's own JSONL or CSV files. Text labels and whole numbers are classes; numbers
    written with a point are a quantity to predict. Without a validation file a tenth of the rows
    is held out (see `hold_out`)."""
    if not 1 <= len(text) <= 2:
        raise UnmaskError(f"--text names {len(text)} columns ({', '.join(text)}); name one or two")
    columns = (*text, label)
    train = _columns(read(train_file), columns, train_file)
    values = [row[-1] for row in train]
    numbers = _quantities(values)
    stem = Path(train_file).name.split(".")[0]
    if numbers is not None:
        task = Task(stem, text=tuple(text), label=label, metric="pearson_spearman")
        ids = None
    else:
        names = sorted({_class(v) for v in values}, key=_numeric_first)
        if len(names) < 2:
            raise UnmaskError(
                f"column {label!r} of {train_file} holds one label only, {names[0]!r}; "
                "a classifier needs at least two"
            )
        metric = "matthews" if len(names) == 2 else "accuracy"
        task = Task(stem, text=tuple(text), label=label, metric=metric, labels=tuple(names))
        ids = {name: i for i, name in enumerate(names)}
    if validation_file is None:
        train, validation = hold_out(train, share=0.1, by_label=ids is not None)
        validation_file = train_file
        if not validation:
            raise UnmaskError(
                f"{train_file} has no row to hold out: no label is on two rows with different "
                "words; give more rows, or --validation-file"
            )
    else:
        validation = _columns(read(validation_file), columns, validation_file)
    return Data(
        task,
        [_example(row, ids, train_file) for row in train],
        {"validation": [_example(row, ids, validation_file) for row in validation]},
    )


def hold_out(
    rows: Sequence[tuple[Any, ...]], share: float, *, by_label: bool = True
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Split rows (texts..., label) into the rest and a held-out share, the same way every time.

    Rows whose texts differ only in case, digits, punctuation or spacing fall on the same side, so
    nothing held out was seen in training; of such twins only the first is held out. Each label
    gives its own share and keeps a row (not `by_label`: all rows are one). The order is that of a
    hash of the text: adding rows moves no other.
    """
    groups: dict[Any, dict[str, list[int]]] = {}
    owner: dict[str, dict[str, list[int]]] = {}
    labels = [_class(row[-1]) if by_label else "" for row in rows]
    counts = Counter(labels)
    for i, (*texts, _) in enumerate(rows):
        key = _skeleton(texts)
        # Twins with different labels follow the label that came first.
        mine = owner.setdefault(key, groups.setdefault(labels[i], {}))
        mine.setdefault(key, []).append(i)
    held: set[int] = set()
    away: set[int] = set()
    for label, twins in groups.items():
        wanted = max(1, round(share * counts[label]))
        ranked = sorted(twins, key=lambda key: hashlib.sha256(key.encode()).digest())
        for key in ranked[: min(wanted, len(ranked) - 1)]:
            held.add(twins[key][0])
            away.update(twins[key][1:])
    rest = [row for i, row in enumerate(rows) if i not in held and i not in away]
    return rest, [rows[i] for i in sorted(held)]


def read(file: str | Path) -> list[Row]:
    """The rows of a .jsonl, .csv or .tsv file, also gzipped (.gz)."""
    path = Path(file)
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if kind not in {"jsonl", "json", "csv", "tsv"}:
        raise UnmaskError(f"{path} is no .jsonl, .csv or .tsv file (.gz may follow); convert it")
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
            rows = list(_parse(lines, kind, path))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as problem:
        raise UnmaskError(
            f"{path} can't be read: {problem}; give an existing UTF-8 file"
        ) from problem
    if not rows:
        raise UnmaskError(f"{path} holds no rows; give a file with at least one")
    return rows


def _parse(lines: Iterable[str], kind: str, path: Path) -> Iterator[Row]:
    if kind in {"csv", "tsv"}:
        yield from csv.DictReader(lines, delimiter="\t" if kind == "tsv" else ",", strict=True)
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise UnmaskError(
                    f"{path}, line {number} is no JSON object ({problem}); one object a line"
                ) from problem
            if not isinstance(row, dict):
                raise UnmaskError(f"{path}, line {number} is no JSON object; one object a line")
            yield row


def _columns(rows: Sequence[Row], columns: Sequence[str], source: Any) -> list[tuple[Any, ...]]:
    """The named columns of every row as tuples, texts as str."""
    missing = [c for c in columns if c not in rows[0]]
    if missing:
        raise UnmaskError(
            f"{source} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, rows[0]))}; name the right ones with --text and --label"
        )
    picked = []
    for number, row in enumerate(rows, 1):
        values = [row.get(c) for c in columns]
        for column, value in zip(columns, values, strict=True):
            if value is None or (value == "" and column == columns[-1]):
                raise UnmaskError(
                    f"{source}, row {number} has no {column!r}; fill it in or drop it"
                )
            if not _is_text(value):
                raise UnmaskError(
                    f"{source}, row {number} has {value!r:.80} as its {column!r}; it must be "
                    "a text that UTF-8 can write, or a number"
                )
        picked.append((*map(str, values[:-1]), values[-1]))
    return picked


def _is_text(value: Any) -> bool:
    """Lists and objects aren't, nor is half of a surrogate pair, which JSON can write."""
    try:
        str(value).encode()
    except ValueError:
        return False
    return not isinstance(value, list | dict)


def _of_task(task: Task, splits: Mapping[str, Sequence[Row]]) -> Data:
    """Rows as on the hub, where a class already is an id."""
    examples = {}
    for split, rows in splits.items():
        if not rows:
            raise UnmaskError(f"task {task.name!r}: split {split!r} holds no rows; give some")
        source = f"task {task.name!r}, split {split!r}"
        examples[split] = [
            Example(texts, _known(task, label, source))
            for *head, label in _columns(rows, (*task.text, task.label), source)
            for texts in [tuple(head)]
        ]
    return Data(task, examples[task.train], {s: examples[s] for s in task.validation})


def _known(task: Task, label: Any, source: str) -> int | float:
    try:
        number = float(label)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if task.regression and math.isfinite(number):
        return number
    if not task.regression and number in range(len(task.labels)):
        return int(number)
    allowed = "a number" if task.regression else f"an id from 0 to {len(task.labels) - 1}"
    raise UnmaskError(f"{source} has the label {label!r}; it must be {allowed}")


def _split_file(home: Path, split: str) -> Path | None:
    files = (home / f"{split}{end}" for end in (".jsonl.gz", ".jsonl"))
    return next((file for file in files if file.is_file()), None)


def _example(row: tuple[Any, ...], ids: Mapping[str, int] | None, source: Any) -> Example:
    *texts, label = row
    if ids is None:
        number = _quantities([label], whole=True)
        if number is None:
            raise UnmaskError(f"{source} has the label {label!r} among numbers; give numbers only")
        return Example(tuple(texts), number[0])
    if _class(label) not in ids:
        raise UnmaskError(
            f"{source} has the label {label!r}, which is not among the {len(ids)} of the training "
            f"file ({', '.join(list(ids)[:8])}); add training rows for it or drop these rows"
        )
    return Example(tuple(texts), ids[_class(label)])


def _quantities(values: Sequence[Any], *, whole: bool = False) -> list[float] | None:
    """The labels as numbers, if all are finite numbers and one has a point (or `whole`)."""
    pointed = whole
    numbers = []
    for value in values:
        if isinstance(value, bool):
            return None
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        if not math.isfinite(number):
            return None
        pointed |= isinstance(value, float) or (isinstance(value, str) and not _is_int(value))
        numbers.append(number)
    return numbers if pointed else None


def _is_int(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _class(label: Any) -> str:
    return str(label).strip()


def _numeric_first(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if _is_int(name) else (1, 0, name)


def _skeleton(texts: Sequence[str]) -> str:
    """The letters of the texts alone; texts without letters stay as they are."""
    joined = "\n".join(texts)
    words = "".join(c if c.isalpha() else " " for c in joined.lower()).split()
    return " ".join(words) or joined
