"""Every benchmark runs in tiny sizes, and what it writes becomes tables and plots."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    - {"__init__", "__main__", "common", "plots", "gpu"}
)
MARKS = "<!-- results: {0} -->\n<!-- end -->"


def python(*given, timeout=600):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *map(str, given)],
        capture_output=True, text=True, cwd=ROOT, check=False, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize("what", SCRIPTS)
def test_a_benchmark(what, tmp_path):
    path, page = tmp_path / "result.json", tmp_path / "page.md"
    said = python(f"benchmarks.{what}", "--smoke", "--repeats", "1", "--json", path).stdout
    result = json.loads(path.read_text())
    assert {"hardware", "date", "versions", "threads", "load", "data"} <= result.keys()
    assert result["what"] == what
    assert result["smoke"] is True
    for table in result["tables"]:
        assert f"**{table['title']}**" in said
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    (tmp_path / f"{what}_here_2026-01-01.json").write_text(path.read_text())
    page.write_text(f"before\n{MARKS.format(what)}\nafter\n")
    python("benchmarks", "--render", "--results", tmp_path, "--page", page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    for table in result["tables"]:
        assert table["title"] in text
    for picture in tmp_path.glob("*.svg"):
        assert f"({picture.name})" in text
    if find_spec("matplotlib"):
        assert list(tmp_path.glob("*.svg"))


def test_rendering_twice_is_rendering_once(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(MARKS.format("step"))
    texts = []
    for _ in range(2):
        python("benchmarks", "--render", "--results", tmp_path, "--page", page)
        texts.append(page.read_text())
    assert texts[0] == texts[1]
    assert "Not measured yet" in texts[0]


def test_the_page_has_a_place_for_every_benchmark():
    page = (ROOT / "docs" / "performance.md").read_text()
    for what in SCRIPTS:
        assert f"<!-- results: {what} -->" in page, what
    assert page.count("<!-- results:") == page.count("<!-- end -->")


@pytest.mark.slow
def test_the_one_for_gpus(tmp_path):
    path = tmp_path / "result.json"
    said = python("benchmarks.gpu", "--smoke", "--repeats", "1", "--json", path).stdout
    result = json.loads(path.read_text())
    assert (result["what"], result["smoke"]) == ("gpu", True)
    assert result["data"]["training"]["active"] > 0
    assert all(f"**{table['title']}**" in said for table in result["tables"])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_the_one_for_gpus_without_one(tmp_path):
    path = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--json", path],
        capture_output=True, text=True, cwd=ROOT, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert "needs a GPU" in done.stderr
    assert not path.exists()
