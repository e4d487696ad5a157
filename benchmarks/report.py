"""Results: JSON files, and from them tables and plots: `python -m benchmarks.report`.

A measurement is a module of this package with ``table(result)``, Markdown for this folder's
README.md. It may have ``headline(result)``, the table of the repository's README.md, and
``plot(result, path)`` with its ``CAPTION``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.machine import ROOT, describe

MEASUREMENTS = (
    "ops",
    "avx2",
    "curves",
    "phases",
    "run",
    "collection",
    "planning",
    "rollout",
    "options",
    "memory",
    "random_policy",
    "graph_overhead",
)
"""In the order in which `python -m benchmarks` makes them."""
RESULTS = Path(__file__).resolve().parent / "results"
README = Path(__file__).resolve().parent / "README.md"
TOP_README = ROOT / "README.md"

# Okabe and Ito's palette, told apart with every kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def publish(name: str, result: dict[str, Any], *, write: bool) -> None:
    """Print a measurement's table and, if asked, keep the result.

    Args:
        name: of the measurement, so of ``results/<name>.json`` and of the table's place in
            README.md, which is between the lines ``<!-- <name> -->`` and ``<!-- end -->``.
        result: with the key ``machine``, as ``machine.record()`` returns it.
        write: keep it and bring everything made from it up to date; otherwise only print.

    Raises:
        ValueError: a README.md has no such place.
    """
    print(f"\n{text(name, result)}\n")
    if write:
        documents = filled(name, result)
        RESULTS.mkdir(exist_ok=True)
        _replace(RESULTS / f"{name}.json", json.dumps(result, indent=1) + "\n")
        _publish(name, result, documents)


def text(name: str, result: dict[str, Any], kind: str = "table") -> str:
    """Return a table of a measurement and the circumstances below it."""
    table = getattr(_module(name), kind)(result)
    return f"{table}\n\nMeasured on: {describe(result['machine'])}."


def filled(name: str, result: dict[str, Any]) -> dict[Path, str]:
    """Return the documents that show a measurement with its tables in their places."""
    kinds = {README: "table"}
    if hasattr(_module(name), "headline"):
        kinds[TOP_README] = "headline"
    documents = {}
    for path, kind in kinds.items():
        shown = text(name, result, kind)
        if hasattr(_module(name), "plot"):
            picture = (RESULTS / f"{name}.png").relative_to(path.parent)
            shown += f"\n\n![{_module(name).CAPTION}]({picture})"
        documents[path] = fill(path.read_text(), name, shown)
    return documents


def _publish(name: str, result: dict[str, Any], documents: dict[Path, str]) -> None:
    for path, document in documents.items():
        _replace(path, document)
    if hasattr(_module(name), "plot"):
        _module(name).plot(result, RESULTS / f"{name}.png")


def _module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def fill(document: str, name: str, text: str) -> str:
    """Return the document with the text between its markers replaced."""
    place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if len(place.findall(document)) != 1:
        raise ValueError(f"README.md must have one place <!-- {name} --> … <!-- end -->")
    return place.sub(lambda found: f"{found[1]}{text}\n{found[2]}", document)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; the first column is left-aligned, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Every plot's fonts, lines and grid."""
    settings = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(settings):
        yield


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def main() -> None:
    description = "Redraw every table and plot from results/*.json; nothing is measured."
    argparse.ArgumentParser(description=description).parse_args()
    for name in MEASUREMENTS:
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            _publish(name, result, filled(name, result))
            print(f"{name}: from {path.relative_to(ROOT)}")
        else:
            print(f"{name}: not measured yet")


if __name__ == "__main__":
    main()
