"""All benchmarks, or those named: run, keep the results, put tables and plots into the docs.

python -m benchmarks                    everything
python -m benchmarks step training      these only
python -m benchmarks --render           run nothing, write the documentation from what is kept
python -m benchmarks --smoke            tiny sizes, nothing is kept
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.plots import plots

HELPERS = {"__init__", "__main__", "common", "plots", "gpu"}  # gpu: run by itself, on one
FIRST = ("step", "training", "sampled", "plan", "bytes", "swap")  # then others by name
SCRIPTS = sorted(
    {path.stem for path in Path(__file__).parent.glob("*.py")} - HELPERS,
    key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name),
)
PAGE = common.ROOT / "docs" / "performance.md"
IMAGES = common.ROOT / "docs" / "images" / "performance"
BUSY = 1.5  # load before a run from which on others are at work as well


def run(what: str, given: Sequence[str], path: Path) -> bool:
    """Whether the script ran to its end; its result is then in `path`."""
    command = [sys.executable, "-m", f"benchmarks.{what}", "--json", str(path)]
    done = subprocess.run(
        [*command, *given],
        cwd=common.ROOT,
        env={**os.environ, "PYTHONPATH": _search_path(), "PYTHONWARNINGS": "ignore"},
        check=False,
    )
    return done.returncode == 0 and path.is_file()


def keep(path: Path, load: float, where: Path) -> Path:
    """The result as <what>_<hardware>_<date>.json and .md."""
    result = json.loads(path.read_text(encoding="utf-8")) | {"load_before": round(load, 2)}
    name = f"{result['what']}_{common.slug(result['hardware'])}_{result['date']}"
    where.mkdir(parents=True, exist_ok=True)
    kept = where / f"{name}.json"
    kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    kept.with_suffix(".md").write_text(_heading(result) + "\n" + _tables(result), encoding="utf-8")
    return kept


def newest(what: str, where: Path) -> dict[str, Any] | None:
    """The latest result kept."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in where.glob(f"{what}_*.json")]
    return max(found, key=lambda result: result["date"], default=None)


def render(page: Path, images: Path, where: Path) -> None:
    """Put tables and plots between the page's marks `<!-- results: what -->` and `<!-- end -->`."""

    def filled(mark: re.Match[str]) -> str:
        result = newest(mark[1], where)
        if result is None:
            body = f"Not measured yet: `python -m benchmarks {mark[1]}`.\n"
        else:
            body = f"{_source(result)}\n\n{_tables(result)}\n{_pictures(result, page, images)}"
        return f"<!-- results: {mark[1]} -->\n\n{body}\n<!-- end -->"

    text = page.read_text(encoding="utf-8")
    marks = r"<!-- results: (\w+) -->.*?<!-- end -->"
    page.write_text(re.sub(marks, filled, text, flags=re.DOTALL), encoding="utf-8")


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(SCRIPTS)}")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--repeats", type=int, help="rounds; claims take 5 or more")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(given)
    if unknown := set(options.what) - set(SCRIPTS):
        parser.error(f"no benchmark is called {min(unknown)!r}; there are {', '.join(SCRIPTS)}")
    repeats = options.repeats or (2 if options.smoke else None)
    given_on = ["--smoke"] if options.smoke else []
    given_on += [] if repeats is None else ["--repeats", str(repeats)]
    failed = []
    wanted = [] if options.render else [s for s in SCRIPTS if s in (options.what or SCRIPTS)]
    began, load = time.monotonic(), os.getloadavg()[0]  # later on the load is our own
    if wanted and load > BUSY:
        common.say(f"the load is {load:.1f}: others are at work, so this is an orientation only")
    for i, what in enumerate(wanted, 1):
        common.say(f"[{i}/{len(wanted)}] {what}, after {time.monotonic() - began:.0f} s")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            if not run(what, given_on, path):
                failed.append(what)
            elif not options.smoke:
                common.say(f"kept in {keep(path, load, options.results)}")
    if not options.smoke:
        images = IMAGES if options.page == PAGE else options.page.parent
        render(options.page, images, options.results)
        common.say(f"written into {options.page}")
    if failed:
        common.say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _pictures(result: Mapping[str, Any], page: Path, images: Path) -> str:
    lines = []
    images.mkdir(parents=True, exist_ok=True)
    for name, figure in plots(result).items():
        path = images / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        lines.append(f"![{name}]({path.relative_to(page.parent).as_posix()})\n")
    return "\n".join(lines)


def _heading(result: Mapping[str, Any]) -> str:
    return f"# {result['what']}\n\n{_source(result)}\n"


def _source(result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    busy = ""
    if result.get("load_before", 0) > BUSY:
        busy = (
            f" Others were at work on the machine (load {result['load_before']}): orientation only."
        )
    return (
        f"`python -m benchmarks {result['what']}` on {result['hardware']}, {result['threads']} "
        f"threads, {versions}, {result['date']}.{busy}"
    )


def _tables(result: Mapping[str, Any]) -> str:
    return common.markdown(result["tables"])


def _search_path() -> str:
    source = str(common.ROOT / "src")
    return os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    sys.exit(main())
