"""Imports go only downwards, optional packages stay at the rim, and `import unmask` is light."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import unmask
from unmask import Method

ROOT = Path(__file__).parent.parent / "src" / "unmask"

# A module imports only from modules above it. A new module has to find its place here.
ORDER = [
    "errors",
    "part",
    "allot",
    "eligible",
    "batches",
    "calibrate",
    "rehearse",
    "heuristics",
    "schedules",
    "strategies",
    "kernels",
    "select",
    "selectors",
    "scopes",
    "units",
    "method",
    "methods",
    "states",
    "slots",
    "rows",
    "draft",
    "intake",
    "hooks",
    "products",
    "derivatives",
    "sampled",
    "processes",
    "elementwise",
    "driver",
    "sealed",
    "sparse",
    "places",
    "codec",
    "layouts",
    "delta",
    "fresh",
    "course",
    "whole",
    "heap",
    "algebra",
    "tuner",
    "integrations",
    "recipes",
    "analysis",
    "screens",
    "cli",
    "__main__",
]
# The rim sees the public API, not the machine: that one can then be rebuilt freely.
MACHINE = {
    "kernels",
    "select",
    "selectors",
    "slots",
    "rows",
    "draft",
    "intake",
    "derivatives",
    "sampled",
    "elementwise",
    "driver",
}
RIM = ("integrations", "recipes", "analysis", "screens", "cli", "__main__")
LIGHT = {  # what each of the lowest modules needs besides the standard library
    "errors": set(),
    "part": set(),
    "allot": set(),
    "schedules": set(),
    "strategies": set(),
    "heuristics": {"torch", "jaxtyping"},
    "eligible": {"torch", "jaxtyping"},
    "batches": {"torch", "jaxtyping"},
    "calibrate": {"torch", "jaxtyping"},
    "rehearse": {"torch", "jaxtyping"},
}
CORE = {"torch", "numpy", "safetensors", "numba", "llvmlite", "jaxtyping", "triton"}
FILES = sorted(ROOT.rglob("*.py"))


def top(path: Path) -> str:
    """`kernels/cpu.py` -> `kernels`; the package's own `__init__` is ``."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node that runs: all but the body of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from runtime_nodes(node)


def imported(path: Path) -> set[str]:
    """Absolute dotted names of all imports, inside functions too."""
    package = ["unmask", *path.relative_to(ROOT).parts[:-1]]
    names: set[str] = set()
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*stem, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def inner(path: Path) -> set[str]:
    """Top-level modules of this package that the file imports; `` for a public name."""
    own = [name.split(".")[1] for name in imported(path) if name.startswith("unmask.")]
    modules = {top(file) for file in FILES}
    return {name if name in modules else "" for name in own} | (
        {""} if "unmask" in imported(path) else set()
    )


def outer(path: Path) -> set[str]:
    """Packages that the file imports, less the standard library and our own."""
    return {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names - {"unmask"}


def files(*tops: str) -> list[Path]:
    return [path for path in FILES if top(path) in tops]


def test_every_module_has_its_place() -> None:
    assert {top(path) for path in FILES} - {""} <= set(ORDER), "add the new module to ORDER"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    own = top(path)
    if own == "":
        assert not inner(path) & set(RIM), "the public names must not pull in the rim"
        return
    above = set(ORDER[: ORDER.index(own)]) | {own}
    assert inner(path) - {""} <= above
    if own not in RIM:
        assert "" not in inner(path), "the core must not import its own package's public names"


@pytest.mark.parametrize("path", files(*RIM), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_rim_uses_the_public_api(path: Path) -> None:
    assert not inner(path) & MACHINE


@pytest.mark.parametrize(
    "path", [p for p in FILES if top(p) not in RIM], ids=lambda path: str(path.relative_to(ROOT))
)
def test_optional_packages_stay_at_the_rim(path: Path) -> None:
    assert outer(path) <= LIGHT.get(top(path), CORE)


def test_numba_and_triton_stay_in_the_kernels() -> None:
    for path in FILES:
        if top(path) != "kernels":
            assert not outer(path) & {"numba", "llvmlite", "triton"}, path


def modules_after(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True, text=True, check=True, cwd=ROOT.parent,
    )  # fmt: skip
    return {name.split(".")[0] for name in out.stdout.split()}


def test_importing_the_library_is_light() -> None:
    everything = "import unmask; [getattr(unmask, name) for name in unmask.__all__]"
    added = modules_after(everything) - modules_after("import torch, safetensors.torch")
    added = {name for name in added - sys.stdlib_module_names if not name.startswith("_")}
    assert added <= {"unmask", "jaxtyping", "wadler_lindig"}
    assert "torch" in modules_after("import unmask; unmask.id3")
    assert "torch" not in modules_after("import unmask; unmask.UnmaskError, unmask.schedules")


@pytest.mark.parametrize("command", ["", "train", "methods"])
def test_help_imports_nothing_heavy(command: str) -> None:
    out = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "unmask", *command.split(), "--help"],
        capture_output=True, text=True, check=True, cwd=ROOT.parent,
    )  # fmt: skip
    imports = {line.rpartition("|")[2].strip().split(".")[0] for line in out.stderr.splitlines()}
    assert "typer" in imports
    assert not imports & {"torch", "numpy", "transformers", "numba", "safetensors"}


def test_public_names_are_what_type_checkers_see() -> None:
    block = next(
        node
        for node in ast.parse((ROOT / "__init__.py").read_text()).body
        if isinstance(node, ast.If)
    )
    homes = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(homes) == sorted(unmask.__all__)
    for name, home in homes.items():
        assert getattr(unmask, name) is getattr(importlib.import_module(str(home)), name)
    assert set(homes) <= set(dir(unmask))
    with pytest.raises(AttributeError, match="has no attribute 'id4'"):
        unmask.id4  # noqa: B018
    with pytest.raises(ImportError, match="id4"):
        exec("from unmask import id4")


@pytest.mark.parametrize("name", ["Units", "PerLayer"])
def test_a_description_finds_classes_that_nobody_has_used_yet(name: str) -> None:
    described = Method(unmask.D3(), unmask.Static(), 1, scope=getattr(unmask, name)()).to_dict()
    assert "unmask" in modules_after(f"import unmask; unmask.Method.from_dict({described!r})")


def test_no_wildcard_imports() -> None:
    for path in FILES:
        assert not any(name.endswith(".*") for name in imported(path)), path
