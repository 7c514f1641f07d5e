"""What the documents say is true: their Python runs, and files that name each other agree."""

import contextlib
import gc
import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import unmask

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands():
    return re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if BLOCK.search(p.read_text())],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """Its blocks one after the other, as a reader would who types them in."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        lines_before = "\n" * text.count("\n", 0, block.start(1))  # so that an error names its line
        exec(compile(lines_before + block[1], str(page), "exec"), namespace)
    namespace.clear()
    gc.collect()  # classes that a page defines are no part of the library


def test_readme_has_two_commands():
    main_job, tests = commands()
    for command in (main_job, tests):
        assert "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt " in command
        extra = re.search(r"\.\[(\w+)\]", command)
        assert extra
        assert extra[1] in PROJECT["optional-dependencies"]
    assert main_job.endswith("&& .venv/bin/unmask train")
    assert tests.endswith("&& .venv/bin/pytest")


def test_ci_takes_its_commands_from_the_readme():
    script = (ROOT / ".ci/run").read_text()
    assert script.count("grep '^python3 -m venv' README.md") == 2
    assert "pip install -e" not in script
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True)


def test_constraints_pin_what_is_installed():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"].values()
    waiting = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    seen = {"unmask"}
    while waiting:  # the whole closure, as far as this environment has it
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and name not in seen:
            seen.add(name)
            assert name in pins, f"constraints.txt lacks {requirement}"
            assert pins[name] in requirement.specifier
            with contextlib.suppress(PackageNotFoundError):
                waiting += requires(name) or []


def test_every_pinned_version_installs_on_the_oldest_python():
    """A pip only sees what its own Python may install: 3.11.2 is many a distribution's."""
    oldest = re.fullmatch(r">=([\d.]+)", PROJECT["requires-python"])
    assert oldest
    for pin in re.findall(r"^[\w.-]+==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE):
        name, version = pin.split("==")
        with contextlib.suppress(PackageNotFoundError):
            found = metadata(name)
            needs = SpecifierSet(found["Requires-Python"] or "")
            alike = Version(found["Version"]).public == version
            assert not alike or f"{oldest[1]}.0" in needs, f"{pin} needs Python {needs}"


@pytest.mark.parametrize("name", unmask.methods.__all__)
def test_every_method_has_its_page(name):
    page = (ROOT / f"docs/methods/{name}.md").read_text()
    assert page.startswith(f"# `{name}`\n")
    for heading in ("Formula", "Memory", "When it is another method", "Source"):
        assert f"\n## {heading}\n" in page
    for contents in ("mkdocs.yml", "docs/methods/index.md"):
        assert f"{name}.md" in (ROOT / contents).read_text()
